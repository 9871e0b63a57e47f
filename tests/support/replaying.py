"""Random requests for an engine, in random order of arrival, and what each gets alone."""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimserve.engine import Engine, Failed, Finished, GenerationRequest
from trimserve.generation.generator import Generator


@dataclass(frozen=True)
class Asked:
    """One request of a replay: its prompt, its options, and whether it is cancelled at some time."""

    prompt: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False


def make_requests(seed: int, count: int, vocab_size: int, *, exact: bool = True) -> list[Asked]:
    """Prompts of many lengths that often begin alike, with mixed options."""
    chance = random.Random(seed)
    begin = [chance.randrange(vocab_size) for _ in range(60)]
    return [_make(chance, begin, vocab_size, exact=exact) for _ in range(count)]


def _make(chance: random.Random, begin: list[int], vocab_size: int, *, exact: bool) -> Asked:
    own = [chance.randrange(vocab_size) for _ in range(chance.choice([1, 2, 3, 9, 40]))]
    prompt = begin[: chance.choice([0, 0, 5, 20, 60])] + own
    options: dict[str, Any] = {"max_new_tokens": chance.choice([1, 2, 6, 12])}
    options |= chance.choice(
        [
            {},
            {},
            {"temperature": 0.8, "top_p": 0.9, "seed": chance.randrange(99)},
            {"temperature": 1.3, "seed": chance.randrange(99)},
            {"repetition_penalty": 1.3},
            {"stop": "a"},
            {"mode": "compact"},
            {"max_block": 2} if exact else {},
        ]
    )
    return Asked(np.array(prompt, np.int32), options, cancelled=chance.random() < 0.1)


def alone(model: Generator, asked: Asked) -> tuple[int, ...]:
    """The ids of a request that nobody else is beside, by `Generator`'s own loop."""
    (found,) = model._generate([asked.prompt], asked.options)
    return found.ids


def replay(engine: Engine, asked: list[Asked], seed: int) -> list[Finished]:
    """Submit requests in a random order, with pauses; give their ends in the order of `asked`."""
    chance = random.Random(seed)
    order = list(range(len(asked)))
    chance.shuffle(order)
    handles = {}
    for place in order:
        handles[place] = engine.submit(GenerationRequest(asked[place].prompt, asked[place].options))
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.01)
        for running in [place for place in handles if asked[place].cancelled]:
            if chance.random() < 0.2:
                handles[running].cancel()
    ends = []
    for place in range(len(asked)):
        *_, end = handles[place].events()
        if isinstance(end, Failed):
            raise end.error
        ends.append(end)
    return ends


def wrong(asked: list[Asked], ends: list[Finished], expected: list[tuple[int, ...]]) -> list[int]:
    """Places of requests whose ids are not those they have alone; a cancelled one has the first of them."""
    return [
        place
        for place, (request, end, ids) in enumerate(zip(asked, ends, expected, strict=True))
        if (
            end.generation.ids != ids[: len(end.generation.ids)]
            if request.cancelled and end.reason == "cancelled"
            else end.generation.ids != ids
        )
    ]
