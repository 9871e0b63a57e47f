"""What a step of several tokens costs, and whether it gives the very bits of as many steps of one pair.

Reading the weights is most of a step of one token, so that a few more tokens cost little in fp32; in 4 bits
the kernels are bound by arithmetic, and each token costs nearly the same again. It is measured, not guessed.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from trimserve.runtime.decoder import Decoder, Step

logger = logging.getLogger(__name__)
_SIZES = (2, 4, 8, 16)
_PROMPT = 37  # tokens before those that are compared: no multiple of any kernel's block
_REPEATS = 3  # the first run of a size makes what is made once, and a neighbour disturbs some


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Seconds of a step, by the tokens that it feeds.

    Attributes:
        seconds: of one token (`Decoder.step_in_pair`), and of those sizes that leave every bit as such steps
            have it.
    """

    seconds: Mapping[int, float]

    def best(self, stands: float, most: int) -> int:
        """How many tokens to feed at once: the size with the lowest cost a token.

        If each guess stands with probability p, a step of n tokens gives ``(1 - p^n) / (1 - p)``: those up to
        and with the first that differs (Leviathan et al. 2023, arXiv 2211.17192, equation 1).

        Args:
            stands: p, between 0 and 1.
            most: tokens at hand, the known one among them.
        """
        p = min(stands, 0.9999)
        sizes = [size for size in self.seconds if size <= most]
        return min(sizes, key=lambda size: self.seconds[size] * (1 - p) / (1 - p**size), default=1)


ONE_BY_ONE = RowCosts(MappingProxyType({1: 0.0}))


def measure_rows(decoder: Decoder, kept: int, context: int | None) -> RowCosts:
    """Compare and time steps of several tokens with steps of one, in a few dozen of them at most.

    Args:
        decoder: the graph.
        kept: compact ids are below it.
        context: positions of the model; None for no end.
    """
    longest = _SIZES[-1]
    prompt = _PROMPT if context is None else min(_PROMPT, context - longest)
    if decoder.no_several_because is not None or prompt < 1:
        return ONE_BY_ONE
    ids = np.random.default_rng(0).integers(0, kept, (1, prompt + longest))
    cache = decoder.empty_cache(1)
    decoder.step(cache, ids[:, :prompt], decoder.no_rows)
    single, alone = np.inf, []
    for place in range(prompt, prompt + longest):
        start = time.perf_counter()
        alone.append(_bits(decoder.step_in_pair(cache, ids[:, place : place + 1], decoder.no_rows)))
        single = min(single, time.perf_counter() - start)
    cache.cut(np.array([longest]))
    seconds = {1: single}
    for size in _SIZES:
        shortest = np.inf
        same = True
        for _ in range(_REPEATS):
            start = time.perf_counter()
            step = decoder.step(cache, ids[:, prompt : prompt + size], decoder.no_rows, keep=size)
            cache.cut(np.array([size]))  # a part of what a wrong guess costs
            shortest = min(shortest, time.perf_counter() - start)
            same = same and _bits(step) == b"".join(alone[:size])
        if same:
            seconds[size] = shortest
    logger.info("steps of several tokens, milliseconds: %s", {n: 1000 * s for n, s in seconds.items()})
    return RowCosts(MappingProxyType(seconds))


def _bits(step: Step) -> bytes:
    """Logits and hidden states, position by position."""
    return np.concatenate([step.logits[0], step.hidden[0].astype(np.float32)], axis=1).tobytes()
