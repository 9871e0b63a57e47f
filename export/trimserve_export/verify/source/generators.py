"""Generators against the source: logits, and greedy ids with the folder's own generation settings."""

from functools import partial

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.generation.generator import Generator
from trimserve.generation.options import Mode
from trimserve_export.checkpoint.rounding import rounding_bound
from trimserve_export.verify.source.lengths import across_limits, longest_text
from trimserve_export.verify.source.original import Original
from trimserve_export.verify.source.sides import Differs, Numbers, Part, Sides, shortened

_PROMPTS, _NEW_TOKENS = 3, 12


def compare_logits(sides: Sides) -> Part:
    """Logits, or another head's output, of every text's ids, by the graph."""
    numbers = Numbers(sides.original)

    def of(ids: Ids) -> Floats:
        made: Floats = sides.original.outputs(ids.tolist(), start_id=sides.start_id)[..., sides.columns]
        return made

    for ids in sides.sequences:
        what = f"the numbers for a text of {len(ids)} tokens"
        numbers.add(of(ids), sides.run(ids), what, partial(of, ids))
    return numbers.part(f"numbers of {len(sides.sequences)} texts")


def compare_generated(sides: Sides) -> Part:
    """What `generate` gives on both sides, without drawing at random."""
    if not isinstance(sides.runtime, Generator):
        raise Differs(f"{sides.context.folder.path} does not load as a generator")
    mode: Mode = "exact" if sides.runtime.can_be_exact else "compact"
    prompts, ties = _prompts(sides), 0
    for text in prompts:
        ids = sides.original.token_ids(text)
        expected = sides.original.generate(ids, _NEW_TOKENS)
        (made,) = sides.runtime.generate(text, max_new_tokens=_NEW_TOKENS, temperature=0, mode=mode)
        found = list(made.ids)
        if mode == "compact":  # as far as it can produce the original's
            expected = _producible(sides, expected)
            found = found[: len(expected)]
        if expected == found:
            continue
        if not _is_tie(sides.original, ids, expected, found):
            raise Differs(
                f"generate() gives {shortened(expected)} for {text[:40]!r}, found {shortened(found)}"
            )
        ties += 1
    note = f"{len(prompts)} x {_NEW_TOKENS} generated ids equal in {mode} mode"
    return Part(note + (f" but for {ties} ties" if ties else ""), made=bool(prompts))


def _prompts(sides: Sides) -> list[str]:
    """The first texts, and for each limit one that generation takes across it."""
    longest = longest_text(sides)
    lengths = ((text, len(sides.original.token_ids(text))) for text in sides.texts)
    fits = [text for text, size in lengths if size > 0 and (longest is None or size + _NEW_TOKENS <= longest)]
    if sides.context.folder.manifest.task != GENERATION_TASK:
        return fits[:_PROMPTS]
    across = filter(sides.can_feed, across_limits(sides, _NEW_TOKENS))
    return [*fits[:_PROMPTS], *across]


def _producible(sides: Sides, ids: list[int]) -> list[int]:
    """The beginning of an output that compact mode can produce."""
    kept = sides.context.folder.vocab.head.is_kept(np.array(ids, np.int32))
    return ids if kept.all() else ids[: int(kept.argmin())]


def _is_tie(original: Original, prompt: list[int], expected: list[int], found: list[int]) -> bool:
    """Whether the ids part where the original's two logits lie within the rounding bound."""
    pairs = enumerate(zip(expected, found, strict=False))
    step = next((place for place, (one, other) in pairs if one != other), None)
    if step is None or original.task != GENERATION_TASK:
        return False
    logits = original.outputs([*prompt, *expected[:step]], last=1)[-1]
    return abs(float(logits[expected[step]] - logits[found[step]])) <= rounding_bound(
        original.model.config, logits
    )
