"""States of a fixed size in the cache: cutting goes back to the state of that time."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from trimserve.runtime.kv_cache import GrowingCache, KVLayout
from trimserve.runtime.state_cache import StateCache, StateLayout

FLOAT = np.dtype(np.float32)
STATES = StateLayout(("past_key_values.0.conv",), ("present.0.conv",), ((3, 2),), (FLOAT,))


def make(batch: int, states: StateLayout = STATES) -> tuple[StateCache, KVLayout]:
    layout = KVLayout(["past_key_values.1.key"], ["present.1.key"], [(1, 4)], FLOAT, "cpu")
    return StateCache(GrowingCache(layout, batch), layout, states, batch), layout


def feed(cache: StateCache, layout: KVLayout, number: float, tokens: int = 1) -> None:
    """A step whose keys and state are its number, for row b plus b / 10."""
    batch = len(cache.mask)
    cache.append(np.ones((batch, tokens), np.int64))
    fed = cache.inputs(tokens)
    past = fed["past_key_values.1.key"].numpy()
    rows = np.arange(batch, dtype=np.float32)[:, None, None] / 10 + number
    keys = np.concatenate([past, np.broadcast_to(rows[..., None], (batch, 1, tokens, 4))], axis=2)
    state = np.broadcast_to(rows, (batch, 3, 2))
    cache.take([layout.to_device(np.ascontiguousarray(part, np.float32)) for part in (keys, state)])


def state_of(cache: StateCache) -> np.ndarray:
    return cache.inputs(1)["past_key_values.0.conv"].numpy()[:, 0, 0]


def test_cutting_goes_back_to_the_state_of_that_time():
    cache, layout = make(1)
    assert state_of(cache).tolist() == [0]
    feed(cache, layout, 1, tokens=5)
    for number in (2, 3, 4):
        feed(cache, layout, number)
    cache.cut(np.array([2]))
    assert (state_of(cache).tolist(), cache.lengths.tolist()) == ([2], [6])
    feed(cache, layout, 9)
    cache.cut(np.array([0]))
    assert (state_of(cache).tolist(), cache.lengths.tolist()) == ([9], [7])


def test_sequences_go_back_by_different_numbers_of_tokens():
    cache, layout = make(3)
    feed(cache, layout, 1, tokens=2)
    for number in (2, 3):
        feed(cache, layout, number)
    cache.cut(np.array([0, 2, 1]))
    np.testing.assert_array_equal(state_of(cache), np.float32([3, 1.1, 2.2]))
    assert cache.lengths.tolist() == [4, 2, 3]
    cache.select([2, 0, 0])
    np.testing.assert_array_equal(state_of(cache), np.float32([2.2, 3, 3]))
    assert cache.lengths.tolist() == [3, 4, 4]


def test_what_is_not_kept_is_an_error():
    large = StateLayout(STATES.past, STATES.present, ((1 << 20, 16),), (FLOAT,))  # 64 MiB
    assert (large.reach, STATES.reach) == (3, 64)
    cache, layout = make(1, StateLayout(STATES.past, STATES.present, ((3, 2),), (FLOAT,)))
    feed(cache, layout, 1, tokens=4)
    with pytest.raises(ValueError, match="before the last 3 tokens are not kept"):
        cache.cut(np.array([3]))
    for number in range(STATES.reach + 1):
        feed(cache, layout, number)
    with pytest.raises(ValueError, match="not kept"):
        cache.cut(np.array([STATES.reach + 1]))
    cache.cut(np.array([STATES.reach]))
    assert state_of(cache).tolist() == [0]
