"""Calls of all methods of served models, to compare what they give under stress, and answers in short."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trimserve.generation.generator import Generator

# A call of a model gives something that can be compared: floats as their bytes.
Call = Callable[[Any], Any]
_PROMPTS = ("the cat sat on the mat", "a", "Grüße, Welt! 🎉 dog", "the dog sat on the cat " * 5, "[MASK] the")
_TEXTS = ["the cat sat on the mat", "a dog latte", "the dog the cat sat"]


def _floats(values: Any) -> tuple[Any, ...]:
    array = np.asarray(values)
    return array.shape, array.dtype.str, zlib.crc32(array.tobytes()), array.tobytes()[:64]


def _generated(results: Any) -> list[Any]:
    return [(result.ids, result.text, result.stopped, result.cold_mass) for result in results]


def _backwards(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """A processor: the larger the id, the less likely, by how long the text is."""
    return logits - np.float32(0.001 * len(ids)) * np.arange(logits.size, dtype=np.float32)


def _abandoned(model: Generator, prompt: str) -> str:
    """A stream that nobody wants any more: it is left to the garbage collector, within a cycle."""
    stream = model.stream(prompt, max_new_tokens=24, temperature=0.9, seed=5)
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    # How much comes at a time depends on what other requests have taught.
    return "".join(piece for _, piece in zip(range(2), stream, strict=False))[:1]


def _closed(model: Generator, prompt: str, **options: Any) -> list[str]:
    stream = model.stream(prompt, max_new_tokens=24, **options)
    pieces = [piece for _, piece in zip(range(3), stream, strict=False)]
    stream.close()  # type: ignore[attr-defined]
    return pieces


def _interrupted(model: Generator, prompt: str, **options: Any) -> list[str]:
    stream = model.stream(prompt, max_new_tokens=24, **options)
    pieces = [next(stream, "")]
    try:
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        pieces.append("interrupted")
    return pieces


def _in_a_batch(model: Generator, **options: Any) -> list[Any]:
    return _generated(model.generate(list(_PROMPTS[:3]), max_new_tokens=10, **options))


_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "exact, not certified": {"certify": False},
    "exact, short blocks": {"max_block": 4},
    "compact": {"mode": "compact"},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "sampled, filtered": {"temperature": 1.3, "top_k": 40, "min_p": 0.01, "typical_p": 0.9, "seed": 11},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.2, "no_repeat_ngram_size": 2},
    "processed": {"logits_processor": _backwards},
    "stopped": {"stop": ["e", "t "], "max_new_tokens": 30},
    "mass": {"mode": "compact", "report_mass": True},
}


def generator_calls(*, beams: bool = True, exact: bool = True, pairs: bool = False) -> dict[str, Call]:
    """Every way to call a generator; `pairs` where scores need a source."""
    calls: dict[str, Call] = {}

    def one(prompt: str, options: Mapping[str, Any], model: Generator) -> list[Any]:
        return _generated(model.generate(prompt, **({"max_new_tokens": 14} | dict(options))))

    every = dict(_OPTIONS) | ({"beams": {"num_beams": 3, "max_new_tokens": 8}} if beams else {})
    for name, options in every.items():
        if not exact and ("exact" in name or name == "mass"):
            continue
        for number, prompt in enumerate(_PROMPTS):
            calls[f"{name}, {number}"] = functools.partial(one, prompt, options)
    step = {"max_block": 1} if exact else {}  # a token at a time
    for number, prompt in enumerate(_PROMPTS):
        calls[f"streamed, {number}"] = lambda model, p=prompt: "".join(model.stream(p, max_new_tokens=14))
        calls[f"abandoned, {number}"] = lambda model, p=prompt: _abandoned(model, p)
        calls[f"closed, {number}"] = lambda model, p=prompt: _closed(model, p, **step)
        calls[f"interrupted, {number}"] = lambda model, p=prompt: _interrupted(model, p, **step)
        if exact and pairs:
            calls[f"scored, {number}"] = lambda model, p=prompt: [
                _floats(score.log_probs) for score in model.score([p], [_PROMPTS[0]])
            ]
        elif exact:
            calls[f"scored, {number}"] = lambda model, p=prompt: [
                _floats(score.log_probs) for score in model.score(p)
            ]
    calls["batch"] = _in_a_batch
    calls["batch, sampled"] = lambda model: _in_a_batch(model, temperature=0.9, seed=2)
    return calls


def encoder_calls(**own: Call) -> dict[str, Call]:
    """Calls of any encoder, and those of its task."""
    calls = dict(own)
    for number in range(len(_PROMPTS)):
        texts = list(_PROMPTS[number:] + _PROMPTS[:number])
        calls[f"forward, {number}"] = lambda model, t=texts: [_floats(row) for row in model.forward(t)]
        calls[f"ids, {number}"] = lambda model, t=texts: [ids.tolist() for ids in model.token_ids(t)]
    return calls


def embedding_calls() -> dict[str, Call]:
    own: dict[str, Call] = {
        "encode": lambda model: _floats(model.encode(list(_PROMPTS))),
        "encode one": lambda model: _floats(model.encode(_PROMPTS[0])),
        "encode, prompted": lambda model: _floats(model.encode(list(_PROMPTS), prompt="a cat: ")),
        "encode, cut": lambda model: _floats(
            model.encode(["the cat sat " * 60], truncate_dim=4, normalize=True)
        ),
    }
    return encoder_calls(**own)


def pair_calls() -> dict[str, Call]:
    pairs = [(first, second) for first in _PROMPTS[:2] for second in _PROMPTS[2:]]
    return {
        "predict": lambda model: _floats(model.predict(pairs)),
        "rank": lambda model: [tuple(found.values()) for found in model.rank(_PROMPTS[0], list(_PROMPTS))],
        "classify": lambda model: [[tuple(label.values()) for label in row] for row in model.classify(pairs)],
    }


def tagger_calls() -> dict[str, Call]:
    # The tokenizer is lent, with another truncation, while others encode.
    return encoder_calls(
        tag=lambda model: repr(model.tag(list(_PROMPTS), ignore_labels=())),
        **{"tag, joined": lambda model: repr(model.tag(["the cat sat " * 60], aggregation="simple"))},
    )


def mask_calls() -> dict[str, Call]:
    return encoder_calls(
        fill=lambda model: repr(model.fill_mask(["the [MASK] sat", "[MASK] [MASK]"], top_k=4))
    )


# A few calls that together read every file of a folder.


def generator_answers(model: Any) -> list[Any]:
    messages = [{"role": "user", "content": "cat sat"}]
    return [
        [result.ids for result in model.generate(_TEXTS, max_new_tokens=8)],
        model.generate(_TEXTS[0], max_new_tokens=8, temperature=0.8, top_k=5, seed=3)[0].ids,
        model.chat(messages, max_new_tokens=5).text,
        [list(map(float, score.log_probs)) for score in model.score(_TEXTS)],
    ]


def translator_answers(model: Any) -> list[Any]:
    return [
        [result.ids for result in model.generate(_TEXTS, max_new_tokens=8)],
        [list(map(float, score.log_probs)) for score in model.score(_TEXTS, _TEXTS)],
    ]


def mask_answers(model: Any) -> list[Any]:
    filled = model.fill_mask(["the [MASK] sat", "a [MASK]"], top_k=3)
    return [np.asarray(model.forward(_TEXTS)[0]).tolist(), repr(filled)]


def sentence_answers(model: Any) -> list[Any]:
    plain = model.encode(_TEXTS)
    return [plain.tolist(), model.encode_query(_TEXTS).tolist(), model.similarity(plain, plain).tolist()]
