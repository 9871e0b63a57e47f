"""A request has the same ids alone and in any batch, whatever joins or leaves, in chunks, after a prefix."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.models import needs_transformers_5
from tests.support.replaying import alone, make_requests, replay, wrong
from trimserve.engine import Engine, EngineSettings
from trimserve.engine.table import RowTable
from trimserve.loading import load

pytestmark = [pytest.mark.export, needs_transformers_5]
SETTINGS = EngineSettings(max_rows=6, chunk=7)


@pytest.fixture(scope="module")
def asked(served):
    """Requests for the folder of shared buffers, with their ids alone."""
    model = load(served("shared_kv"), threads=1)
    requests = make_requests(0, 40, model.folder.vocab.vocab_size)
    return requests, [alone(model, request) for request in requests]


@pytest.fixture
def engine(served):
    engine = Engine(load(served("shared_kv"), threads=1), SETTINGS)
    yield engine
    engine.close()


def test_a_replay_gives_what_each_request_gets_alone(engine, asked):
    requests, expected = asked
    for schedule in range(3):
        ends = replay(engine, requests, schedule)
        assert not wrong(requests, ends, expected)
        assert all(end.strict for end in ends)
    metrics = engine.metrics()
    # Else it would prove nothing.
    assert metrics.decode_rows > 1.5 * metrics.decode_steps
    assert metrics.cached_tokens > 100
    assert metrics.batching == "batches of up to 6 rows"
    assert metrics.kv_used_bytes == metrics.running == 0


def test_weights_that_are_not_packed_give_the_same_ids_alone_and_together(served, asked):
    # Without packed copies a product of one row has other last bits than one of several.
    requests, _ = asked
    requests = [dataclasses.replace(request, cancelled=False) for request in requests[:20]]
    engine = Engine(load(served("shared_kv"), threads=1, memory="low"), SETTINGS)
    by_themselves = [replay(engine, [request], 0)[0] for request in requests]
    ends = replay(engine, requests, 0)
    assert [end.generation.ids for end in ends] == [end.generation.ids for end in by_themselves]
    engine.close()


@pytest.mark.slow
def test_fifty_schedules_of_three_hundred_requests(served):
    model = load(served("shared_kv"), threads=1)
    requests = make_requests(1, 300, model.folder.vocab.vocab_size)
    expected = [alone(model, request) for request in requests]
    for schedule in range(50):
        engine = Engine(load(served("shared_kv"), threads=1), dataclasses.replace(SETTINGS, max_rows=12))
        assert not wrong(requests, replay(engine, requests, schedule), expected), schedule
        engine.close()


def _one_position_too_far(table, *args):
    place, length = RowTable.longest(table, *args)
    return place, length + bool(length)


def _without_last(table, drop):
    RowTable.cut_all(table, np.maximum(drop - 1, 0))


@pytest.mark.parametrize("fault", ["prefix", "cut"])
def test_a_fault_of_the_strict_path_shows(monkeypatch, served, asked, fault):
    """The replay itself is tested: what breaks strictness must make it fail."""
    if fault == "prefix":
        monkeypatch.setattr(RowTable, "longest", RowTable._longest_prefix, raising=False)
        monkeypatch.setattr(RowTable, "_longest_prefix", _one_position_too_far)
    else:
        monkeypatch.setattr(RowTable, "cut_all", RowTable.cut, raising=False)
        monkeypatch.setattr(RowTable, "cut", _without_last)
    requests, expected = asked
    engine = Engine(load(served("shared_kv"), threads=1), SETTINGS)
    assert wrong(requests, replay(engine, requests, 0), expected)
    engine.close()
