"""The engine as its clients see it: events, cancelling, limits, the end."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("torch")

from trimserve.decoding.scoring import Scorer
from trimserve.engine import (
    Engine,
    EngineClosed,
    EngineSettings,
    Failed,
    Finished,
    GenerationRequest,
    Piece,
    QueueFull,
)
from trimserve.errors import UsageError
from trimserve.loading import load

PROMPT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def model(served):
    return load(served("tied"), threads=1)


@pytest.fixture
def engine(model):
    engine = Engine(model, EngineSettings(max_queued_requests=8))
    yield engine
    engine.close()


def ask(model, **options) -> GenerationRequest:
    (ids,) = model.codec.encode([PROMPT])
    return GenerationRequest(ids, {"max_new_tokens": 12, **options})


def test_the_events_add_up_to_what_generate_gives(engine, model):
    (alone,) = model.generate(PROMPT, max_new_tokens=12)
    *pieces, end = engine.submit(ask(model)).events()
    assert isinstance(end, Finished)
    assert tuple(token for piece in pieces for token in piece.ids) == end.generation.ids == alone.ids
    assert "".join(piece.text for piece in pieces) + end.text == end.generation.text == alone.text
    assert end.reason == alone.stopped
    assert end.usage.completion_tokens == len(alone.ids)


def test_async_code_reads_the_same(engine, model):
    async def read() -> list[int]:
        return [
            i
            async for event in engine.submit(ask(model)).aevents()
            if isinstance(event, Piece)
            for i in event.ids
        ]

    assert asyncio.run(read()) == list(model.generate(PROMPT, max_new_tokens=12)[0].ids)


def test_a_cancelled_request_ends_with_what_it_has(engine, model):
    handle = engine.submit(ask(model, max_new_tokens=40, min_new_tokens=40))
    events = handle.events()
    first = next(events)
    handle.cancel()
    *_, end = events
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    assert 0 < len(end.generation.ids) < 40
    assert end.generation.ids[: len(first.ids)] == first.ids
    assert engine.metrics().finished == {"cancelled": 1}


def test_a_full_queue_says_so_at_once(engine, model):
    request = ask(model, max_new_tokens=40, min_new_tokens=40)
    with pytest.raises(QueueFull, match="the queue is full, 8 requests wait, and 8 may") as full:
        [engine.submit(request) for _ in range(100)]
    assert full.value.retry_after >= 1
    assert engine.metrics().rejected == 1


def test_a_drained_engine_finishes_and_takes_nothing_more(engine, model):
    handles = [engine.submit(ask(model)) for _ in range(3)]
    assert engine.drain(60)
    assert [handle.result().stopped for handle in handles] == ["length"] * 3
    with pytest.raises(EngineClosed):
        engine.submit(ask(model))


def test_a_closed_engine_ends_what_runs_and_waits(engine, model):
    handles = [engine.submit(ask(model, max_new_tokens=40, min_new_tokens=40)) for _ in range(3)]
    engine.close()
    ends = [list(handle.events())[-1] for handle in handles]
    assert {type(end) for end in ends} <= {Finished, Failed}
    assert ends[-1].reason == "cancelled"


def test_a_request_out_of_time_ends_with_what_it_has(engine, model):
    (ids,) = model.codec.encode([PROMPT])
    *_, end = engine.submit(GenerationRequest(ids, {"max_new_tokens": 40}, timeout=0.0)).events()
    assert end.reason == "timeout"
    assert end.generation.ids == ()


def test_what_cannot_be_honoured_is_refused_at_once(engine, model):
    with pytest.raises(UsageError, match="temperature"):
        engine.submit(ask(model, temperature=-1))
    with pytest.raises(UsageError, match="top_logprobs means nothing to a beam search"):
        engine.submit(GenerationRequest(ask(model).prompt, {"num_beams": 2}, top_logprobs=1))


def test_an_error_of_one_request_leaves_the_others(engine, model):
    def wrong(*_):
        raise ZeroDivisionError

    bad, good = engine.submit(ask(model, logits_processor=wrong)), engine.submit(ask(model))
    *_, end = bad.events()
    assert isinstance(end, Failed)
    assert isinstance(end.error, ZeroDivisionError)
    assert good.result().ids == model.generate(PROMPT, max_new_tokens=12)[0].ids


def test_log_probabilities_are_those_of_the_full_vocab(engine, model):
    (ids,) = model.codec.encode([PROMPT])
    *pieces, end = engine.submit(GenerationRequest(ids, {"max_new_tokens": 12}, top_logprobs=3)).events()
    found = [entry for piece in pieces for entry in piece.logprobs]
    assert tuple(entry.id for entry in found) == end.generation.ids
    scored = Scorer(model._decoder, model.folder.vocab, model._cold, model.cold_head("a test"))
    probabilities = scored.score(np.array([*ids, *end.generation.ids], np.int32)).log_probs[-12:]
    assert [entry.logprob for entry in found] == pytest.approx(probabilities.tolist(), abs=1e-4)
    # Greedy: the token is the likeliest.
    assert all(entry.top[0] == (entry.id, entry.logprob) and len(entry.top) == 3 for entry in found)


def test_other_work_is_done_between_steps(engine, model):
    running = engine.submit(ask(model, max_new_tokens=40, min_new_tokens=40))
    assert engine.call(lambda model: model.score(PROMPT)[0].total).result(60) == model.score(PROMPT)[0].total
    failed = engine.call(lambda _: 1 // 0)
    assert isinstance(failed.exception(60), ZeroDivisionError)
    assert len(running.result().ids) == 40
