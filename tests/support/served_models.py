"""Served models of every kind, and calls of all their methods, to compare what they give under stress.

Needs torch and the exporter: import it after `pytest.importorskip("torch")`.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.folders import make_vocab
from tests.support.models import save_model
from tests.support.translators import save_translator
from trimserve.encoder.encoder import Encoder
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.pipeline import export

# A call of a model gives something that can be compared: floats as their bytes.
Call = Callable[[Any], Any]
_PROMPTS = ("the cat sat on the mat", "a", "Grüße, Welt! 🎉 dog", "the dog sat on the cat " * 5, "[MASK] the")
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}


@dataclass(frozen=True)
class Kind:
    """How to make a model, and what to do with it."""

    make: Callable[[Path], Path]
    calls: Callable[[], Mapping[str, Call]]
    exporter: str = "auto"
    options: Mapping[str, Any] | None = None

    def export(self, root: Path) -> Path:
        """Make the trimmed folder."""
        source = resolve_model(self.make(root / "model"))
        structural = structural_ids(source)
        others = np.setdiff1d(np.arange(source.vocab_size), structural)
        kept = np.union1d(structural, others[::3])
        vocab = make_vocab(kept.tolist(), source.vocab_size, source.tokenizer_sha256)
        options = dict(self.options or {})
        export(source, vocab, root / "trimmed", exporter=self.exporter, progress=False, **options)
        return root / "trimmed"


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


def _closed(model: Generator, prompt: str) -> list[str]:
    stream = model.stream(prompt, max_new_tokens=24, max_block=1)
    pieces = [piece for _, piece in zip(range(3), stream, strict=False)]
    stream.close()  # type: ignore[attr-defined]
    return pieces


def _interrupted(model: Generator, prompt: str) -> list[str]:
    stream = model.stream(prompt, max_new_tokens=24, max_block=1)
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
    for number, prompt in enumerate(_PROMPTS):
        calls[f"streamed, {number}"] = lambda model, p=prompt: "".join(model.stream(p, max_new_tokens=14))
        calls[f"abandoned, {number}"] = lambda model, p=prompt: _abandoned(model, p)
        calls[f"closed, {number}"] = lambda model, p=prompt: _closed(model, p)
        calls[f"interrupted, {number}"] = lambda model, p=prompt: _interrupted(model, p)
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


def _embedding_calls() -> dict[str, Call]:
    own: dict[str, Call] = {
        "encode": lambda model: _floats(model.encode(list(_PROMPTS))),
        "encode one": lambda model: _floats(model.encode(_PROMPTS[0])),
        "encode, prompted": lambda model: _floats(model.encode(list(_PROMPTS), prompt="a cat: ")),
        "encode, cut": lambda model: _floats(
            model.encode(["the cat sat " * 60], truncate_dim=4, normalize=True)
        ),
    }
    return encoder_calls(**own)


def _pair_calls() -> dict[str, Call]:
    pairs = [(first, second) for first in _PROMPTS[:2] for second in _PROMPTS[2:]]
    return {
        "predict": lambda model: _floats(model.predict(pairs)),
        "rank": lambda model: [tuple(found.values()) for found in model.rank(_PROMPTS[0], list(_PROMPTS))],
        "classify": lambda model: [[tuple(label.values()) for label in row] for row in model.classify(pairs)],
    }


def _tagger_calls() -> dict[str, Call]:
    # The tokenizer is lent, with another truncation, while others encode.
    return encoder_calls(
        tag=lambda model: repr(model.tag(list(_PROMPTS), ignore_labels=())),
        **{"tag, joined": lambda model: repr(model.tag(["the cat sat " * 60], aggregation="simple"))},
    )


def _mask_calls() -> dict[str, Call]:
    return encoder_calls(
        fill=lambda model: repr(model.fill_mask(["the [MASK] sat", "[MASK] [MASK]"], top_k=4))
    )


_BYTES = {"tokenizer": "byte_level_bpe", "seed": 1}
KINDS: dict[str, Kind] = {
    "untied": Kind(lambda path: save_model("llama", path, **_BYTES), generator_calls),
    "tied": Kind(lambda path: save_model("llama_tied", path, **_BYTES), generator_calls),
    "int4": Kind(
        lambda path: save_model("qwen3", path, **_BYTES, **_WIDE | {"head_dim": 32}),
        generator_calls,
        options={"quantize": "int4"},
    ),
    "no_cold": Kind(
        lambda path: save_model("gpt2", path, **_BYTES),
        functools.partial(generator_calls, exact=False),
        options={"cold": False},
    ),
    "seq2seq": Kind(lambda path: save_translator("t5", path), functools.partial(generator_calls, pairs=True)),
    "embeddings": Kind(lambda path: save_model("bert_encoder", path, rows=37), _embedding_calls),
    "pairs": Kind(lambda path: save_model("bert_classifier", path, rows=37, num_labels=1), _pair_calls),
    "tagger": Kind(lambda path: save_model("bert_tagger", path, rows=37), _tagger_calls),
    "masks": Kind(lambda path: save_model("bert", path, rows=37), _mask_calls),
    # Past and present share their buffers: a graph of onnxruntime-genai's builder.
    "shared_kv": Kind(
        lambda path: save_model("llama_tied", path, **_BYTES, **_WIDE | {"num_key_value_heads": 1}),
        functools.partial(generator_calls, beams=False),
        exporter="genai",
    ),
}
# Those that are made without transformers 5.
USUAL = tuple(name for name, kind in KINDS.items() if kind.exporter == "auto")


def open_model(folder: Path, threads: int = 1) -> Encoder | Generator:
    """A model that nobody has used yet."""
    return load(folder, threads=threads)
