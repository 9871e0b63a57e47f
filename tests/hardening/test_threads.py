"""Many threads and one model: each call gives what it gives alone, ids and floats to the bit."""

import gc
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.counting import Counter
from tests.support.limits import PATIENCE
from tests.support.served_models import KINDS, USUAL, open_model
from trimserve.concurrency import Lock, Once
from trimserve.encoder.encoder import Encoder
from trimserve.encoder.graph import EncoderStats
from trimserve.exact.certificate import Worth
from trimserve.exact.checker import ExactChecker
from trimserve.exact.draft_length import LearnedCosts
from trimserve.generation.generator import Generator
from trimserve_export.exporters.choice import is_installed

pytestmark = pytest.mark.export

THREADS = 8
SEED = 15
# Of one kind of model; the slow suite makes 4,000 in all.
CI_CALLS = 48
SLOW_CALLS = 4_000 // (len(USUAL) + 1)


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """Run jobs at the same time; a hang is a failure."""
    together = threading.Barrier(len(jobs))

    def start(job: Callable[[], None]) -> None:
        together.wait()
        job()

    threads = [threading.Thread(target=start, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"


def mixed_up(folder: Path, name: str, count: int, threads: int) -> list[str]:
    """Make so many calls from all threads; gives those that do not give what they give alone."""
    calls, rng = KINDS[name].calls(), random.Random(SEED)
    chosen = [rng.choice(sorted(calls)) for _ in range(count)]
    model = open_model(folder, threads)
    alone = {call: calls[call](model) for call in sorted(set(chosen))}
    model = open_model(folder, threads)  # whatever is made at first use is made by many at once
    counter = Counter(f"calls of {name} from {THREADS} threads", SEED)

    results: list[tuple[str, str | None]] = []

    def job(number: int) -> None:
        for call in chosen[number::THREADS]:
            fault = None
            try:
                if (found := calls[call](model)) != alone[call]:
                    fault = f"{call}: {found} instead of {alone[call]}"
            except BaseException as error:
                fault = f"{call}: {error!r}"
            results.append((call, fault))

    in_threads([lambda number=number: job(number) for number in range(THREADS)])
    gc.collect()
    for call, fault in results:
        counter.add("calls", call, fault)
    print(f"\n{counter.line}")
    return list(counter.faults.values())


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("name", USUAL)
def test_calls_from_threads_give_what_they_give_alone(served, name):
    assert mixed_up(served(name), name, CI_CALLS, threads=1) == []


@pytest.mark.usefixtures("switching")
def test_so_they_do_with_threads_of_the_sessions_own(served):
    assert mixed_up(served("untied"), "untied", CI_CALLS, threads=2) == []


@pytest.mark.optimum
@pytest.mark.usefixtures("switching")
@pytest.mark.skipif(not is_installed("genai"), reason="needs transformers 5 and onnxruntime-genai")
@pytest.mark.parametrize("count", [CI_CALLS, pytest.param(SLOW_CALLS, marks=pytest.mark.fuzz)])
def test_so_they_do_where_past_and_present_share_buffers(served, count):
    assert mixed_up(served("shared_kv"), "shared_kv", count, threads=2) == []


@pytest.mark.fuzz
@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("name", USUAL)
def test_many_calls_from_threads_give_what_they_give_alone(served, name):
    assert mixed_up(served(name), name, SLOW_CALLS, threads=2) == []


@pytest.mark.usefixtures("switching")
def test_these_tests_see_requests_that_share_what_they_learn(served, monkeypatch):
    """They must be able to fail: one checker for all calls, which counts and drafts for all of them."""
    shared: list[ExactChecker] = []
    make = Generator.checker

    def one_for_all(self, plan):
        if not shared:
            shared.append(make(self, plan))
        return shared[0]

    monkeypatch.setattr(Generator, "checker", one_for_all)
    assert mixed_up_stats(served("untied")) != 0


def mixed_up_stats(folder: Path) -> int:
    """How far the statistics are from what the results of many calls add up to."""
    model = open_model(folder)
    assert isinstance(model, Generator)
    results: list[Any] = []

    def job(number: int) -> None:
        for turn in range(6):
            prompt = "the cat " * (1 + (number + turn) % 3)
            results.extend(model.generate(prompt, max_new_tokens=6 + turn, temperature=0.7, seed=number))

    in_threads([lambda number=number: job(number) for number in range(THREADS)])
    stats = model.stats
    found = (stats.tokens, stats.drafted, stats.rejected, stats.cold_reads.steps)
    added = tuple(sum(getattr(r, name) for r in results) for name in ("drafted", "rejected"))
    expected = (sum(len(result.ids) for result in results), *added, sum(r.drafted for r in results))
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("switching")
def test_statistics_add_up(served):
    assert mixed_up_stats(served("untied")) == 0


@pytest.mark.usefixtures("switching")
def test_statistics_of_an_encoder_add_up(served):
    model = open_model(served("embeddings"))
    assert isinstance(model, Encoder)
    texts = ["the cat sat", "a dog 😀", "the mat " * 100]
    alone = open_model(served("embeddings"))
    alone.encode(texts)
    in_threads([lambda: [model.encode(texts) for _ in range(20)] and None for _ in range(THREADS)])
    for name in ("texts", "tokens", "cold_tokens", "truncated"):
        assert getattr(model.stats, name) == 20 * THREADS * getattr(alone.stats, name) > 0, name


def test_a_stream_that_the_collector_closes_within_a_count_is_counted():
    stats = EncoderStats()

    class Closing:
        """Adding it runs what a collection could run there."""

        def __radd__(self, other: int) -> int:
            stats.count(texts=5)
            return other + 1

    stats.count(tokens=Closing())  # type: ignore[arg-type]
    assert (stats.texts, stats.tokens) == (5, 1)


# What may change while a model is used, and why that mixes nothing up: (class or attribute, reason).
CHANGES = {
    "GeneratorStats": "sums, under a lock",
    "EncoderStats": "sums, under a lock",
    "Once": "made once, under a lock",
    "LearnedCosts": "speed alone, under a lock",
    "Worth": "speed alone, under a lock",
    "Fallback._cache": "pieces of an id, which are the same for all",
    "Codec._limit": "the tokenizer's truncation, under the codec's lock",
    "Generator._learned": "costs by their key",
}


def state_of(thing: object, path: str = "model", seen: dict[int, str] | None = None) -> dict[str, Any]:
    """Everything that a model holds, by the way to it: values, or which object it is."""
    seen = {} if seen is None else seen
    if isinstance(thing, bool | int | float | str | bytes | type(None)):
        return {path: thing}
    if id(thing) in seen or type(thing).__name__ in CHANGES:
        return {path: id(thing)}
    seen[id(thing)] = path
    found: dict[str, Any] = {path: id(thing)}
    if isinstance(thing, np.ndarray):
        return found | {f"{path}[...]": zlib.crc32(np.ascontiguousarray(thing).view(np.uint8).data)}
    if isinstance(thing, dict):
        parts = {f"{path}[{key!r}]": value for key, value in thing.items()}
    elif isinstance(thing, list | tuple):
        parts = {f"{path}[{place}]": value for place, value in enumerate(thing)}
    elif type(thing).__module__.startswith("trimserve"):
        names = {*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())}
        allowed = {cls.__name__ for cls in type(thing).__mro__}
        parts = {
            f"{path}.{name}": getattr(thing, name)
            for name in names
            if not any(f"{cls}.{name}" in CHANGES for cls in allowed)
            # A value that does not depend on who asks.
            and not isinstance(getattr(type(thing), name, None), cached_property)
        }
    else:
        return found
    for way, part in parts.items():
        found |= state_of(part, way, seen)
    return found


@pytest.mark.parametrize("name", USUAL)
def test_nothing_of_a_call_stays_in_the_model(served, name):
    model = open_model(served(name))
    before = state_of(model)
    assert len(before) > 100
    for number, call in enumerate(KINDS[name].calls().values()):
        if number % 3 == 0:  # of each option with some text
            call(model)
    gc.collect()
    assert state_of(model) == before


def test_that_test_sees_what_stays(served):
    model = open_model(served("untied"))
    before = state_of(model)
    model._decoder.last = np.zeros(1)
    assert state_of(model) != before


@pytest.mark.usefixtures("switching")
def test_a_value_is_made_once_by_whoever_comes_first():
    made: list[int] = []
    once: Once[object] = Once()
    got: list[object] = []

    def make() -> object:
        made.append(1)
        for _ in range(1000):
            pass
        return object()

    in_threads([lambda: got.append(once.get(make)) for _ in range(THREADS)])
    assert (len(made), len({id(value) for value in got})) == (1, 1)


def test_a_value_that_could_not_be_made_is_tried_again():
    once: Once[int] = Once()
    with pytest.raises(ZeroDivisionError):
        once.get(lambda: 1 // 0)
    assert once.get(lambda: 3) == 3


@pytest.mark.usefixtures("switching")
def test_what_is_learned_from_many_threads_counts_each_block():
    costs, worth = LearnedCosts(), Worth()

    def job() -> None:
        for size in range(1, 400):
            costs.note(1 << size % 6, 1, 1, 0.001, 0.002)
            worth.asks()
            worth.note(1.0)

    in_threads([job] * THREADS)
    # stood and drafted get the same sums but for where they began.
    assert costs.now.drafted - costs.now.stood == pytest.approx(0.2 * 0.98 ** (399 * THREADS), abs=1e-9)
    assert set(costs.now.check_seconds) == {1, 2, 4, 8, 16, 32}


def test_a_copy_of_what_holds_a_lock_has_its_own():
    import copy

    lock = Lock()
    with lock:
        assert copy.deepcopy(lock) is not lock
    stats = EncoderStats(texts=3)
    assert copy.deepcopy(stats) == stats
