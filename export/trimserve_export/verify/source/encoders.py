"""Encoders against the source: outputs of the head, sentence embeddings, scores of pairs."""

from typing import Any

import numpy as np

from trimserve.arrays import Floats
from trimserve.folder.tasks import has_vocab_head
from trimserve_export.verify.source.sides import Differs, Numbers, Part, Sides

# How far embeddings and scores of sentence-transformers may lie apart, relative to the largest number.
EMBEDDING_BOUND, _COSINE = 1e-5, 1e-6


def compare_outputs(sides: Sides) -> Part:
    """What `forward` gives for each text, cut where the runtime cuts."""
    numbers = Numbers(sides.original)
    for text in sides.texts:
        add_outputs(sides, numbers, text, f"the outputs for {text[:40]!r}")
    return numbers.part(f"outputs of {len(sides.texts)} texts")


def add_outputs(sides: Sides, numbers: Numbers, text: str, what: str) -> None:
    """Compare the outputs of one text.

    Raises:
        Differs: see `Numbers`.
    """
    vocab, task = sides.context.folder.vocab, sides.context.folder.manifest.task
    columns = vocab.head.kept_ids if has_vocab_head(task) else slice(None)
    ids = sides.original.token_ids(text, sides.runtime.max_tokens)

    def expected() -> Floats:
        made: Floats = sides.original.outputs(ids)[..., columns]
        return made

    numbers.add(expected(), np.asarray(sides.runtime.forward([text])[0]), what, expected)


def compare_embeddings(sides: Sides) -> Part:
    """What `encode` gives, also with each of the folder's prompts."""
    texts = [*sides.texts, ""]
    declared = getattr(sides.original.sentence_model, "prompts", None) or {}
    prompts = [name for name, prompt in declared.items() if prompt]
    largest = max(embedding_difference(sides, texts, name) for name in (None, *prompts))
    with_prompts = f", also with the prompts {', '.join(prompts)}," if prompts else ""
    note = f"embeddings of {len(texts)} texts{with_prompts} within {largest:.2g}"
    return Part(f"{note} (bounds: {EMBEDDING_BOUND:g} of the largest number, cosine {_COSINE:g})", largest)


def embedding_difference(sides: Sides, texts: list[str], prompt: str | None = None) -> float:
    """The largest difference of two sides' embeddings.

    Raises:
        Differs: it is beyond the bounds.
    """
    options: dict[str, Any] = {} if prompt is None else {"prompt_name": prompt}
    expected = sides.original.embeddings(texts, **options)
    found = np.asarray(sides.runtime.encode(texts, **options))
    what = "the embeddings" if prompt is None else f"the embeddings with prompt {prompt!r}"
    if expected.shape != found.shape:
        raise Differs(f"{what} have the shape {expected.shape}, found {found.shape}")
    gaps = np.abs(expected - found).max(axis=1)
    allowed = EMBEDDING_BOUND * np.maximum(1.0, np.abs(expected).max(axis=1))
    turned = np.array([1 - cosine(one, other) for one, other in zip(expected, found, strict=True)])
    wrong = np.flatnonzero(~((gaps <= allowed) & (turned <= _COSINE)))
    if wrong.size:
        place = int(wrong[0])
        raise Differs(
            f"{what} of {texts[place][:40]!r} differ by {gaps[place]:.3g} (bound {allowed[place]:.3g}), and "
            f"1 - cosine is {turned[place]:.3g} (bound {_COSINE:g})",
            float(gaps[place]),
        )
    return float(gaps.max(initial=0.0))


def cosine(one: Floats, other: Floats) -> float:
    """The cosine of two vectors in double precision; 1 for two zeros."""
    first, second = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(first, second))


def compare_pairs(sides: Sides) -> Part:
    """What `predict` gives for pairs of texts."""
    if not hasattr(sides.runtime, "predict"):
        return Part("pairs NOT compared: this runtime reads single texts alone", made=False)
    if reason := getattr(getattr(sides.runtime, "settings", None), "no_pairs", None):
        return Part(f"pairs NOT compared: {reason}", made=False)
    texts = [text for text in sides.texts if text.strip()]
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    expected, found = sides.original.scores(pairs), np.asarray(sides.runtime.predict(pairs))
    if expected.shape != found.shape:
        raise Differs(f"the scores of pairs have the shape {expected.shape}, found {found.shape}")
    largest = float(np.abs(expected - found).max(initial=0.0))
    bound = EMBEDDING_BOUND * max(1.0, float(np.abs(expected).max(initial=0.0)))
    if not largest <= bound:
        raise Differs(f"the scores of pairs differ by {largest:.3g}, the bound is {bound:.3g}", largest)
    return Part(f"scores of {len(pairs)} pairs within {largest:.2g} (bound {bound:.2g})", largest)
