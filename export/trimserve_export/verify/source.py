"""The check against the source: what the original folder gives in its own library, on the runtime's public API.

Every other check compares one of our exports with another. This one loads the original in transformers or
sentence-transformers, in fp32, and compares ids, numbers and generated ids with what the trimmed folder gives.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.encoder import EMBEDDING_TASK, Encoder
from trimserve.folder import GENERATION_TASK, TEXT2TEXT_TASK
from trimserve.generator import Generator
from trimserve.loading import ENCODER_TASKS, load
from trimserve.vocab import Ids
from trimserve_export.tasks import has_vocab_head
from trimserve_export.verify.context import Context
from trimserve_export.verify.graph import GraphModel, Seq2SeqModel
from trimserve_export.verify.original import Original
from trimserve_export.verify.result import Check
from trimserve_export.verify.texts import HOSTILE, ORDINARY

Floats = npt.NDArray[np.float32]
NAME = "source"
_TEXTS, _PROMPTS, _NEW_TOKENS = 32, 3, 12
# How far embeddings of sentence-transformers may lie apart, relative to the largest number of them.
_EMBEDDING, _COSINE = 1e-5, 1e-6
# Unit roundoff of fp32, and how many standard deviations of a sum's rounding error are allowed.
_ROUNDOFF, _DEVIATIONS = 2.0**-24, 4
# Products one after the other in a layer: query and key, value, output, and the two of the feed-forward part.
_PRODUCTS = 5
# Positions of a long text that are compared, counted from its end.
_LAST = 8
# A text of more tokens than this is not run; fewer where the model is large (tokens x parameters).
_MOST_TOKENS, _LEAST_TOKENS, _WORK = 2048, 128, 4e11
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "original_max_position_embeddings")
_LENGTH_KEYS += ("sliding_window", "window_size", "local_attention")


@dataclass(frozen=True, slots=True)
class Part:
    """One comparison.

    Attributes:
        ok: it holds; None where it was not made.
        largest: the largest difference of numbers, if any were compared.
        note: what was compared and what was found, as a clause.
    """

    ok: bool | None
    largest: float | None
    note: str


class _Differs(Exception):  # noqa: N818 - no error: it ends a comparison
    """What was found to differ, and by how much."""

    def __init__(self, note: str, largest: float | None = None) -> None:
        super().__init__(note)
        self.part = Part(False, largest, note)


def check_source(context: Context) -> Check:
    """Compare the folder with the original in its own library; see docs/verify.md."""
    if context.source.graph is not None:
        return Check(NAME, None, None, "not comparable: no checkpoint (the source is an ONNX graph)")
    original = Original(context.source.path, context.folder.manifest.task)
    notes, largest = [], None
    for compare in _comparisons(context, original):
        try:
            part = compare(context, original)
        except _Differs as difference:
            part = difference.part
        if part.ok is False:
            return Check(
                NAME, False, part.largest, f"{original.library} in fp32 gives another result: {part.note}"
            )
        notes.append(part.note)
        numbers = [number for number in (largest, part.largest) if number is not None]
        largest = max(numbers, default=None)
    return Check(NAME, True, largest, f"as {original.library} in fp32: {'; '.join(notes)}")


def _comparisons(context: Context, original: Original) -> Iterator[Callable[[Context, Original], Part]]:
    manifest = context.folder.manifest
    if manifest.layout == "runtime":
        yield _compare_ids
    if manifest.quantization is not None or manifest.dtype != "fp32":
        yield _measure
        return
    if manifest.layout != "runtime" or manifest.task in (GENERATION_TASK, TEXT2TEXT_TASK):
        yield _compare_graph
    elif original.sentence_kind in ("SentenceTransformer", "SparseEncoder"):
        yield _compare_embeddings
    else:
        yield _compare_encoder
        if original.sentence_kind == "CrossEncoder":
            yield _compare_pairs
    yield _compare_lengths
    if manifest.layout == "runtime" and manifest.task in (GENERATION_TASK, TEXT2TEXT_TASK):
        yield _compare_generated


def _compare_ids(context: Context, original: Original) -> Part:
    """Token ids of every text: AutoTokenizer's, special tokens included."""
    for text in context.texts:
        expected, found = original.token_ids(text), context.encode(text)
        if found is None:  # an id that the model has no row for
            if max(expected, default=0) < context.folder.vocab.vocab_size:
                raise _Differs(f"{text[:40]!r} has no token ids here")
        elif found.tolist() != expected:
            raise _Differs(
                f"the token ids of {text[:40]!r} are {_short(expected)}, found {_short(found.tolist())}"
            )
    return Part(True, None, f"token ids of {len(context.texts)} texts equal")


def _short(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 12 else f"{str(ids[:12])[:-1]}, …]"


def _texts(context: Context) -> list[str]:
    """Texts that have tokens, the user's first."""
    found = [text for text in context.texts if (ids := context.encode(text)) is not None and len(ids)]
    return found[:_TEXTS]


def _bound(original: Original, numbers: Floats) -> float:
    """How far two fp32 computations of the same numbers may lie apart.

    A sum of n products has a rounding error of about sqrt(n) u times the numbers' size (Higham & Mary 2019,
    https://doi.org/10.1137/18M1226312), and errors of the products that follow one another add up.
    """
    config = original.model.config.get_text_config()
    widths = (
        getattr(config, name, None)
        for name in ("hidden_size", "intermediate_size", "d_model", "d_ff", "n_embd")
    )
    width = max((int(number) for number in widths if isinstance(number, int)), default=1024)
    layers = int(getattr(config, "num_hidden_layers", None) or 12)
    products = _PRODUCTS * layers + 2
    relative = 2 * _DEVIATIONS * products * math.sqrt(width) * _ROUNDOFF
    return relative * max(1.0, float(np.abs(numbers).max(initial=0.0)))


@dataclass(slots=True)
class _Numbers:
    """Compares arrays with the original's and keeps the largest difference and its bound."""

    original: Original
    largest: float = 0.0
    bound: float = 0.0

    def add(self, expected: Floats, found: Floats, what: str) -> None:
        """Compare.

        Raises:
            _Differs: the shapes are not equal, or a number lies beyond the bound.
        """
        if expected.shape != found.shape:
            raise _Differs(f"{what} have the shape {expected.shape}, found {found.shape}")
        bound = _bound(self.original, expected)
        difference = float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))
        if not difference <= bound:
            raise _Differs(f"{what} differ by {difference:.3g}, the bound is {bound:.3g}", difference)
        self.largest, self.bound = max(self.largest, difference), max(self.bound, bound)

    def part(self, what: str) -> Part:
        """What to say of all that was compared."""
        return Part(True, self.largest, f"{what} within {self.largest:.2g} (rounding bound {self.bound:.2g})")


def _model(context: Context) -> GraphModel | Seq2SeqModel:
    return context.trimmed if context.folder.manifest.layout == "runtime" else context.full


def _graph_outputs(context: Context, ids: Ids, past: dict[str, Floats] | None = None) -> dict[str, Floats]:
    model = _model(context)
    return model.run(ids, past) if isinstance(model, GraphModel) else model.run(ids)


def _columns(context: Context) -> Ids | slice:
    """The original's columns that the graph has."""
    model = _model(context)
    return model.vocab.head.kept_ids if model.has_vocab_head else slice(None)


def _compare_graph(context: Context, original: Original) -> Part:
    """Logits, or another head's output, of every text's ids."""
    numbers, model, columns = _Numbers(original), _model(context), _columns(context)
    start = model.start_id if isinstance(model, Seq2SeqModel) else None
    sequences = context.token_ids[:_TEXTS]
    for ids in sequences:
        expected = original.outputs(ids.tolist(), start_id=start)[..., columns]
        made = _graph_outputs(context, ids)
        found = made["logits"] if "logits" in made else made["last_hidden_state"]
        numbers.add(expected, found[0], f"the numbers for {len(ids)} tokens")
    return numbers.part(f"logits or states of {len(sequences)} texts")


def _compare_encoder(context: Context, original: Original) -> Part:
    """What `forward` gives for each text, cut where the runtime cuts."""
    model, numbers, texts = _encoder(context), _Numbers(original), _texts(context)
    for text in texts:
        numbers.add(*_both_forward(context, original, model, text), f"the outputs for {text[:40]!r}")
    return numbers.part(f"outputs of {len(texts)} texts")


def _both_forward(context: Context, original: Original, model: Encoder, text: str) -> tuple[Floats, Floats]:
    columns = context.folder.vocab.kept_ids if has_vocab_head(context.folder.manifest.task) else slice(None)
    expected = original.outputs(original.token_ids(text, model.max_tokens))[..., columns]
    return expected, np.asarray(model.forward([text])[0])


def _encoder(context: Context) -> Encoder:
    model = load(context.folder.path)
    if not isinstance(model, Encoder):
        raise _Differs(f"{context.folder.path} does not load as an encoder")
    return model


def _compare_embeddings(context: Context, original: Original) -> Part:
    """What `encode` gives, with each of the folder's prompts."""
    model, texts = _encoder(context), [*_texts(context), ""]
    names = [None, *getattr(original.sentence_model, "prompts", {})]
    largest = 0.0
    for name in names:
        largest = max(largest, _embedding_difference(original, model, texts, name))
    prompts = f" and with {len(names) - 1} prompts" if len(names) > 1 else ""
    note = f"embeddings of {len(texts)} texts{prompts} within {largest:.2g} (bounds: {_EMBEDDING:g} of the largest "
    return Part(True, largest, f"{note}number, cosine {_COSINE:g})")


def _embedding_difference(original: Original, model: Encoder, texts: list[str], prompt: str | None) -> float:
    options = {} if prompt is None else {"prompt_name": prompt}
    kind = (
        {"convert_to_tensor": True}
        if original.sentence_kind == "SparseEncoder"
        else {"convert_to_numpy": True}
    )
    made = original.sentence_model.encode(texts, batch_size=1, show_progress_bar=False, **kind, **options)
    dense = made.to_dense().float().numpy() if hasattr(made, "to_dense") else made
    expected, found = np.asarray(dense, np.float32), np.asarray(model.encode(texts, **options))  # type: ignore[call-arg]
    what = "the embeddings" if prompt is None else f"the embeddings with prompt {prompt!r}"
    if expected.shape != found.shape:
        raise _Differs(f"{what} have the shape {expected.shape}, found {found.shape}")
    gaps = np.abs(expected - found).max(axis=1)
    allowed = _EMBEDDING * np.maximum(1.0, np.abs(expected).max(axis=1))
    turned = np.array([1 - _cosine(one, other) for one, other in zip(expected, found, strict=True)])
    wrong = np.flatnonzero(~((gaps <= allowed) & (turned <= _COSINE)))
    if wrong.size:
        place = int(wrong[0])
        text = (
            f"{what} of {texts[place][:40]!r} differ by {gaps[place]:.3g}, the bound is {allowed[place]:.3g}"
        )
        raise _Differs(
            f"{text}; 1 - cosine is {turned[place]:.3g}, the bound {_COSINE:g}", float(gaps[place])
        )
    return float(gaps.max(initial=0.0))


def _cosine(one: Floats, other: Floats) -> float:
    norms = float(np.linalg.norm(one.astype(np.float64)) * np.linalg.norm(other.astype(np.float64)))
    if norms == 0:
        return 1.0 if np.array_equal(one, other) else 0.0
    return float(np.dot(one.astype(np.float64), other.astype(np.float64))) / norms


def _compare_pairs(context: Context, original: Original) -> Part:
    """What `predict` gives for pairs of texts."""
    predict = getattr(_encoder(context), "predict", None)
    if predict is None:
        return Part(None, None, "pairs NOT compared: this runtime reads single texts alone")
    texts = [text for text in _texts(context) if text.strip()]
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    expected = np.asarray(original.sentence_model.predict(pairs, batch_size=1, show_progress_bar=False))
    found = np.asarray(predict(pairs))
    if expected.shape != found.shape:
        raise _Differs(f"the scores of pairs have the shape {expected.shape}, found {found.shape}")
    largest = float(np.abs(expected - found).max(initial=0.0))
    bound = _EMBEDDING * max(1.0, float(np.abs(expected).max(initial=0.0)))
    if not largest <= bound:
        raise _Differs(f"the scores of pairs differ by {largest:.3g}, the bound is {bound:.3g}", largest)
    return Part(True, largest, f"scores of {len(pairs)} pairs within {largest:.2g} (bound {bound:.2g})")


def _limits(context: Context) -> list[int]:
    """Lengths at which something may change, by the configs."""
    configs = [found for found in context.source.text_configs() if isinstance(found, dict)]
    ropes = [found.get(key) for found in configs for key in ("rope_scaling", "rope_parameters")]
    configs += [found for found in ropes if isinstance(found, dict)]
    numbers = [found[key] for found in configs for key in _LENGTH_KEYS if key in found]
    lengths, pooling = context.folder.manifest.lengths, context.folder.manifest.pooling
    numbers += [] if lengths is None else [lengths.longest, lengths.unchanged]
    numbers += [getattr(pooling, "max_tokens", None)]
    return sorted({number for number in numbers if isinstance(number, int) and number > 1})


def _compare_lengths(context: Context, original: Original) -> Part:
    """Numbers on both sides of each limit, as far as they can be run here."""
    limits, longest = _limits(context), _longest(context)
    wanted = sorted({length for limit in limits for length in (limit - 1, limit, limit + 1)})
    wanted = [length for length in wanted if longest is None or length <= longest]
    most = _affordable(original)
    run = [length for length in wanted if length <= most]
    if not wanted:
        return Part(True, None, "no length at which anything changes")
    compare = _length_of_text if context.folder.manifest.task in ENCODER_TASKS else _length_of_graph
    if context.folder.manifest.layout != "runtime":
        compare = _length_of_graph
    numbers = _Numbers(original)
    for length in run:
        compare(context, original, numbers, length)
    left = (
        f"; NOT run, above {most:,} tokens: {', '.join(map(str, wanted[len(run) :]))}"
        if run != wanted
        else ""
    )
    if not run:
        return Part(None, None, left.removeprefix("; "))
    part = numbers.part(f"texts of {', '.join(map(str, run))} tokens")
    return Part(True, part.largest, part.note + left)


def _longest(context: Context) -> int | None:
    lengths = context.folder.manifest.lengths
    return None if lengths is None else lengths.longest


def _affordable(original: Original) -> int:
    if original.sentence_kind is not None:
        parameters = sum(tensor.numel() for tensor in original.sentence_model.parameters())
    else:
        parameters = original.model.num_parameters()
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_WORK / max(1, parameters))))


def _length_of_text(context: Context, original: Original, numbers: _Numbers, length: int) -> None:
    model, text = _encoder(context), _text_of(context, length)
    if original.sentence_kind in ("SentenceTransformer", "SparseEncoder"):
        largest = _embedding_difference(original, model, [text], None)
        numbers.largest, numbers.bound = max(numbers.largest, largest), max(numbers.bound, _EMBEDDING)
        return
    numbers.add(*_both_forward(context, original, model, text), f"the outputs of a text of {length:,} tokens")


def _text_of(context: Context, length: int) -> str:
    """A text of `length` tokens, or of the nearest number below that its words allow."""
    words = " ".join(ORDINARY).split()
    words *= length // len(words) + 1
    low, high = 1, len(words)
    while low < high:  # most words with which it is not longer
        middle = (low + high + 1) // 2
        ids = context.encode(" ".join(words[:middle]))
        low, high = (middle, high) if ids is not None and len(ids) <= length else (low, middle - 1)
    text = " ".join(words[:low])
    for _ in range(8):
        longer, ids = f"{text} a", context.encode(f"{text} a")
        if ids is None or len(ids) > length:
            break
        text = longer
    return text


def _ids_of(context: Context, length: int) -> Ids:
    """So many token ids of ordinary texts, without special tokens."""
    parts = [context.encode(text) for text in ORDINARY]
    ids = np.concatenate([part for part in parts if part is not None])
    ids = ids[~np.isin(ids, list(context.codec.special_ids))]
    return np.resize(ids if ids.size else np.zeros(1, np.int32), length).astype(np.int32)


def _length_of_graph(context: Context, original: Original, numbers: _Numbers, length: int) -> None:
    """The last positions of one run, and the same in steps: a cache keeps what was computed before."""
    ids, model, columns = _ids_of(context, length), _model(context), _columns(context)
    start = model.start_id if isinstance(model, Seq2SeqModel) else None
    expected = original.outputs(ids.tolist(), last=_LAST, start_id=start)[..., columns]
    made = _graph_outputs(context, ids)
    found = made["logits"] if "logits" in made else made["last_hidden_state"]
    what = f"the numbers for a text of {length:,} tokens"
    numbers.add(expected, found[0][-_LAST:] if found.ndim > 2 else found[0], what)
    if isinstance(model, GraphModel) and context.folder.manifest.task == GENERATION_TASK and length > 2:
        parts = [ids[:-2], ids[-2:-1], ids[-1:]]
        past: dict[str, Floats] = {}
        for part, logits in zip(parts, original.steps([part.tolist() for part in parts]), strict=True):
            past |= model.run(part, past)
            numbers.add(logits[-1:, columns], past["logits"][0][-1:], f"{what}, fed in steps,")


def _compare_generated(context: Context, original: Original) -> Part:
    """Greedy ids of `generate` on both sides, with the folder's own generation settings."""
    model = load(context.folder.path)
    if not isinstance(model, Generator):
        raise _Differs(f"{context.folder.path} does not load as a generator")
    mode = "exact" if model.can_be_exact else "compact"
    prompts, ties = _prompts(context), 0
    for text in prompts:
        ids = original.token_ids(text)
        expected = original.generate(ids, _NEW_TOKENS)
        (generated,) = model.generate(text, max_new_tokens=_NEW_TOKENS, temperature=0, mode=mode)
        found = list(generated.ids)
        if mode == "compact":
            expected = _producible(context, expected)
            found = found[: len(expected)]
        step = next(
            (place for place, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
            None,
        )
        if step is None and len(expected) == len(found):
            continue
        if step is None or not _is_tie(original, ids, expected, found, step):
            raise _Differs(f"generate() gives {_short(expected)} for {text[:40]!r}, found {_short(found)}")
        ties += 1
    note = f"{len(prompts)} prompts x {_NEW_TOKENS} generated ids equal in {mode} mode"
    return Part(True if prompts else None, None, note + (f" but for {ties} ties" if ties else ""))


def _prompts(context: Context) -> list[str]:
    """The first texts, and for each limit one that generation takes across it."""
    longest = _longest(context)
    fits = _MOST_TOKENS if longest is None else longest
    usable = [text for text in _texts(context) if len(context.encode(text) or ()) + _NEW_TOKENS <= fits]
    limits = [
        limit
        for limit in _limits(context)
        if _NEW_TOKENS < limit <= min(_LEAST_TOKENS * 4, fits - _NEW_TOKENS)
    ]
    across = [_text_of(context, limit - _NEW_TOKENS // 2) for limit in limits]
    return [*usable[:_PROMPTS], *(across if context.folder.manifest.task == GENERATION_TASK else [])]


def _producible(context: Context, ids: list[int]) -> list[int]:
    """The beginning that compact mode can produce."""
    kept = context.folder.vocab.head.is_kept(np.array(ids, np.int32))
    return ids if kept.all() else ids[: int(kept.argmin())]


def _is_tie(original: Original, prompt: list[int], expected: list[int], found: list[int], step: int) -> bool:
    """Whether the original's logits of the two ids lie within the rounding bound."""
    if original.task != GENERATION_TASK:
        return False
    logits = original.outputs([*prompt, *expected[:step]], last=1)[-1]
    return abs(float(logits[expected[step]] - logits[found[step]])) <= _bound(original, logits)


def _measure(context: Context, original: Original) -> Part:
    """How far rounded weights move the result from fp32, on texts that are not hostile."""
    manifest = context.folder.manifest
    what = "int weights" if manifest.quantization is not None else manifest.dtype
    texts = [text for text in _texts(context) if text not in HOSTILE] or _texts(context)
    if original.sentence_kind in ("SentenceTransformer", "SparseEncoder") and manifest.layout == "runtime":
        found = np.asarray(_encoder(context).encode(texts))
        expected = original.sentence_model.encode(
            texts, batch_size=1, show_progress_bar=False, convert_to_numpy=True
        )
        cosines = [_cosine(one, other) for one, other in zip(np.asarray(expected), found, strict=True)]
        least = min(cosines)
        return Part(
            True,
            None,
            f"with {what}: mean cosine {np.mean(cosines):.6f}, least {least:.6f}, on {len(texts)} texts",
        )
    model, values = context.full, []
    start = model.start_id if isinstance(model, Seq2SeqModel) else None
    for ids in (found for text in texts if (found := context.encode(text)) is not None):
        ids = ids[: context.max_tokens]
        expected = original.outputs(ids.tolist(), start_id=start)
        made = model.run(ids)
        found = (made["logits"] if "logits" in made else made["last_hidden_state"])[0]
        if manifest.task == EMBEDDING_TASK:
            values += [_cosine(one, other) for one, other in zip(expected, found, strict=True)]
        else:
            values += _divergence(np.atleast_2d(expected), np.atleast_2d(found)).tolist()
    unit = "mean cosine of states" if manifest.task == EMBEDDING_TASK else "nats a token (KL from fp32)"
    return Part(
        True, None, f"with {what}: {np.mean(values):.4g} {unit}, on {len(texts)} texts; measured, not judged"
    )


def _divergence(expected: Floats, found: Floats) -> npt.NDArray[np.float64]:
    """KL(fp32 || rounded) of each row, in nats."""
    ours, theirs = _log_softmax(found), _log_softmax(expected)
    result: npt.NDArray[np.float64] = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return result


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
