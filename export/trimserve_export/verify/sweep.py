"""Run two models over the same token ids once and count what differs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve_export.verify.plain_run import Model
from trimserve_export.verify.rounding import RoundingBound

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Differences:
    """What a sweep over the texts has seen so far.

    Attributes:
        values: numbers compared.
        unequal: those that differ.
        max_abs_diff: the largest difference.
        beyond_bound: those that differ by more than their bound.
        of_one_processor: numbers with a bound were among them: matrices of another width, whose last columns
            a processor may add up in an order of its own. What was seen holds for the one that computed.
    """

    values: int = 0
    unequal: int = 0
    max_abs_diff: float = 0.0
    beyond_bound: int = 0
    of_one_processor: bool = False

    def add(self, full: Array, trimmed: Array, bound: float = 0.0) -> None:
        """Compare two arrays; equal infinities and equal NaNs are equal.

        Args:
            full: what the full model gives.
            trimmed: what the trimmed one gives.
            bound: what they may differ by; 0 where every processor gives the same bits.
        """
        if full.shape != trimmed.shape:
            self.beyond_bound += 1
            self.max_abs_diff = float("nan")
            return
        self.values += full.size
        self.of_one_processor |= bound > 0
        if full.tobytes() == trimmed.tobytes():
            return
        wide = full.astype(np.float64), trimmed.astype(np.float64)
        unequal = ~((wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1])))
        gaps = np.abs(wide[0][unequal] - wide[1][unequal])
        self.unequal += gaps.size
        self.beyond_bound += int((~(gaps <= bound)).sum())  # a NaN gap is beyond every bound
        self.max_abs_diff = max(self.max_abs_diff, float(gaps.max(initial=0.0)))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Differences over all texts: of the vocab logits, and of every other output."""

    logits: Differences = field(default_factory=Differences)
    others: Differences = field(default_factory=Differences)


def sweep(full: Model, trimmed: Model, texts: Iterable[Ids], bound: RoundingBound) -> Sweep:
    """Compare all outputs of a full and a trimmed model.

    Args:
        full: model with V rows.
        trimmed: model with K rows.
        texts: token ids (T,) of each text.
        bound: what vocab logits may differ by where the head's input is the same.
    """
    seen = Sweep()
    names = unchanged_outputs(full)
    for ids in texts:
        expected, found = full.run(ids), trimmed.run(ids)
        for name in names:
            seen.others.add(expected[name], found[name])
        if full.has_vocab_head:
            same_input = expected["hidden_states"].tobytes() == found["hidden_states"].tobytes()
            allowed = bound.of(expected["hidden_states"]) if same_input else 0.0
            seen.logits.add(expected["logits"][..., trimmed.vocab.head.kept_ids], found["logits"], allowed)
    return seen


def unchanged_outputs(model: Model) -> tuple[str, ...]:
    """Outputs that trimming must not change at all: every one without a vocab axis."""
    return tuple(name for name in model.outputs if name != "logits" or not model.has_vocab_head)
