"""Changes that a model's generation config makes to single logits, apart from what it forces and forbids.

The names and meanings are those of transformers' GenerationConfig; the arithmetic is float32, in the order of
its processors (transformers/generation/logits_process.py). All ids are token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.decoding.token_rules import as_ids, completes

Floats = npt.NDArray[np.float32]
_LARGEST_GROWTH = 1e20


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What is done to logits, by ids so far.

    Attributes:
        sequence_bias: (ids, bias): added to the last id's logit where it would complete the sequence.
        encoder_repetition_penalty: above 1 favours ids of the text that was given, below 1 does the opposite.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens the ends' logits grow by
            their size times ``factor ** steps - 1``; None is off.
        eos_token_id: these ends.
        remove_invalid_values: NaN becomes 0 and infinity the largest number.
        words_from_start: see `TokenRules`.
    """

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    exponential_decay_length_penalty: tuple[int, float] | None = None
    eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    words_from_start: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, words_from_start: bool = False) -> Self:
        """Read them from a generation config."""
        decay = config.get("exponential_decay_length_penalty")
        return cls(
            sequence_bias=read_sequence_bias(config.get("sequence_bias")),
            encoder_repetition_penalty=float(config.get("encoder_repetition_penalty") or 1.0),
            exponential_decay_length_penalty=(int(decay[0]), float(decay[1])) if decay else None,
            eos_token_id=as_ids(config.get("eos_token_id")),
            remove_invalid_values=bool(config.get("remove_invalid_values")),
            words_from_start=words_from_start,
        )

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sequence_bias or self.encoder_repetition_penalty != 1 or self.bends)

    @property
    def bends(self) -> bool:
        """Whether a larger logit may come out smaller than another: bounds of logits are none afterwards."""
        return self.exponential_decay_length_penalty is not None or self.remove_invalid_values

    def biases(self, ids: Ids) -> dict[int, np.float32]:
        """What is added to which ids after these, int32 (T,)."""
        found: dict[int, np.float32] = {}
        for sequence, bias in self.sequence_bias:
            if completes(sequence, ids, from_start=self.words_from_start):
                found[sequence[-1]] = np.float32(found.get(sequence[-1], 0) + np.float32(bias))
        return found

    def favour_given(self, logits: Floats) -> Floats:
        """The logits of ids of the given text, float32 (n,), with the encoder's repetition penalty."""
        penalty = np.float32(1 / self.encoder_repetition_penalty)
        return np.where(logits < 0, logits * penalty, logits / penalty)

    def hasten_ends(self, logits: Floats, steps: int) -> Floats:
        """The ends' logits, float32 (n,), after so many new tokens."""
        if self.exponential_decay_length_penalty is None:
            return logits
        start, factor = self.exponential_decay_length_penalty
        if steps <= start:
            return logits
        growth = np.where(np.isfinite(logits), np.abs(logits), np.float32(0)).astype(np.float32)
        grown: Floats = logits + growth * np.float32(_power(factor, steps - start) - 1)
        return grown


def _power(factor: float, steps: int) -> float:
    """A power, no larger than what ends a text anyhow: above, float32 logits would overflow."""
    return factor**steps if steps * np.log(factor) < np.log(_LARGEST_GROWTH) else _LARGEST_GROWTH


def read_sequence_bias(value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    """The (ids, bias) pairs of a config entry: a list of ``[[ids], bias]``, or ``{(ids): bias}``."""
    if isinstance(value, Mapping):
        return tuple((as_ids(ids), float(bias)) for ids, bias in value.items())
    if isinstance(value, list | tuple):
        # As in transformers, the last of two entries for one sequence counts.
        return tuple({as_ids(ids): float(bias) for ids, bias in value}.items())
    return ()
