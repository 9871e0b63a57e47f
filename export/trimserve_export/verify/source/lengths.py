"""Texts on both sides of every limit in a model's config, as far as they can be run here."""

from collections.abc import Iterator

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.folder.tasks import ENCODER_TASKS
from trimserve_export.checkpoint.lengths import limits_of
from trimserve_export.verify.source.encoders import EMBEDDING_BOUND, add_outputs, embedding_difference
from trimserve_export.verify.source.sides import Numbers, Part, Sides
from trimserve_export.verify.texts import ORDINARY

# Positions of a long text that are compared, counted from its end.
_LAST = 8
# A text of more tokens than this is not run; fewer where the model is large (tokens x parameters).
_MOST_TOKENS, _LEAST_TOKENS, _WORK = 8300, 128, 4e12
_FILLERS = 8


def compare_lengths(sides: Sides) -> Part:
    """Numbers of texts that are one token shorter than a limit, as long, and one token longer."""
    longest, most = longest_text(sides), _affordable(sides)
    near = {length for limit in _limits(sides) for length in (limit - 1, limit, limit + 1)}
    wanted = sorted(length for length in near if longest is None or length <= longest)
    run = [length for length in wanted if length <= most]
    numbers = Numbers(sides.original)
    for length in run:
        _compare_length(sides, numbers, length)
    left = f"texts of {_listed(wanted[len(run) :])} tokens NOT run, above {most:,} here"
    if not run:
        return Part(left if wanted else "no length at which anything changes", made=not wanted)
    part = numbers.part(f"texts of {_listed(run)} tokens")
    return part if run == wanted else Part(f"{part.note}; {left}", part.largest)


def longest_text(sides: Sides) -> int | None:
    """Tokens of the longest text that the folder takes; None for no limit."""
    lengths = sides.context.folder.manifest.lengths
    return None if lengths is None else lengths.longest


def across_limits(sides: Sides, count: int) -> Iterator[str]:
    """For each limit a text that is shorter, and longer with `count` tokens more."""
    longest = longest_text(sides)
    for limit in _limits(sides):
        if count < limit <= _LEAST_TOKENS * 4 and (longest is None or limit + count <= longest):
            yield _text_of(sides, limit - count // 2)


def _listed(lengths: list[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)


def _limits(sides: Sides) -> list[int]:
    """Lengths at which something may change, by the configs."""
    numbers: list[int | None] = [*limits_of(sides.context.source.text_configs())]
    manifest = sides.context.folder.manifest
    if manifest.lengths is not None:
        numbers += [manifest.lengths.longest, manifest.lengths.unchanged]
    if sides.is_runtime and manifest.task in ENCODER_TASKS:
        numbers.append(sides.runtime.max_tokens)
    return sorted({number for number in numbers if isinstance(number, int) and number > 2})


def _affordable(sides: Sides) -> int:
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_WORK / max(1, sides.original.parameters))))


def _compare_length(sides: Sides, numbers: Numbers, length: int) -> None:
    manifest = sides.context.folder.manifest
    # Without cold rows few texts of a length can be fed, but ids that are kept can.
    if not sides.is_runtime or manifest.task not in ENCODER_TASKS or not sides.context.folder.has_cold:
        _compare_ids_of_length(sides, numbers, length)
    elif sides.original.is_sentence_encoder:
        numbers.note(embedding_difference(sides, [_text_of(sides, length)]), EMBEDDING_BOUND)
    else:
        add_outputs(sides, numbers, _text_of(sides, length), f"the outputs of a text of {length:,} tokens")


def _compare_ids_of_length(sides: Sides, numbers: Numbers, length: int) -> None:
    """The last positions of one run, and the same in steps: a cache keeps what was computed before."""
    ids, what = _ids_of(sides, length), f"the numbers for a text of {length:,} tokens"

    def expected() -> Floats:
        outputs = sides.original.outputs(ids.tolist(), last=_LAST, start_id=sides.start_id)
        made: Floats = outputs[..., sides.columns]
        return made

    found = sides.run(ids)
    numbers.add(expected(), found[-_LAST:] if found.ndim > 1 else found, what, expected)
    if (graph := sides.steps) is None:
        return
    parts = [ids[:-2], ids[-2:-1], ids[-1:]]
    past: dict[str, Floats] = {}
    logits = sides.original.steps([part.tolist() for part in parts])
    for part, of_step in zip(parts, logits, strict=True):
        past |= graph.run(part, past)
        numbers.add(of_step[-1:, sides.columns], past["logits"][0][-1:], f"{what}, fed in steps,")


def _ids_of(sides: Sides, length: int) -> Ids:
    """So many token ids of ordinary texts, without special tokens."""
    parts = [ids for text in ORDINARY if (ids := sides.encode(text)) is not None]
    ids = np.concatenate([np.zeros(0, np.int32), *parts])
    ids = ids[~np.isin(ids, sides.original.tokenizer.all_special_ids)]
    if not sides.context.folder.has_cold:
        ids = ids[sides.graph.vocab.is_kept(ids)]
    ids = ids if ids.size else sides.context.folder.vocab.kept_ids
    return np.resize(ids, length).astype(np.int32)


def _text_of(sides: Sides, length: int) -> str:
    """A text of `length` tokens, or of as many below that as its words allow."""
    words = " ".join(ORDINARY).split()
    words *= length // len(words) + 1
    low, high = 1, len(words)
    while low < high:  # most words with which it is not too long
        middle = (low + high + 1) // 2
        fits = _tokens(sides, " ".join(words[:middle])) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    text = " ".join(words[:low])
    for _ in range(_FILLERS):
        if _tokens(sides, f"{text} a") > length:
            break
        text = f"{text} a"
    return text


def _tokens(sides: Sides, text: str) -> int:
    ids = sides.encode(text)
    return 0 if ids is None else len(ids)
