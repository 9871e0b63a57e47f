"""Encoders behind an engine: callers share batches, and get the numbers of their texts alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("torch")

from trimserve.encoder.graph import EncoderGraph
from trimserve.engine import Engine, EngineClosed, EngineSettings, GenerationRequest
from trimserve.errors import UsageError
from trimserve.loading import load

TEXTS = ["the cat sat on the mat", "a cat", "the dog", "the cat sat on the mat and the dog sat too", "mat"]


@pytest.fixture(scope="module")
def model(served):
    return load(served("embeddings"), threads=1)


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


def test_callers_share_batches_and_get_the_bits_of_their_texts_alone(engine, model):
    futures = [engine.call(lambda model, text=text: model.encode(text)) for text in TEXTS * 8]
    found = [future.result(60) for future in futures]
    alone = [model.encode(text) for text in TEXTS] * 8
    assert all(np.array_equal(mine, expected) for mine, expected in zip(found, alone, strict=True))
    metrics = engine.metrics()
    assert metrics.strict
    assert metrics.batching == "batches of texts"
    assert metrics.decode_rows == len(TEXTS) * 8 > metrics.decode_steps


def test_one_caller_with_many_texts_gets_them_in_their_order(engine, model):
    with ThreadPoolExecutor(2) as clients:
        jobs = [
            clients.submit(lambda: engine.call(lambda model: model.encode(TEXTS)).result(60)) for _ in "ab"
        ]
    alone = np.concatenate([model.encode(text) for text in TEXTS])
    assert all(np.array_equal(job.result(), alone) for job in jobs)


def test_other_bits_in_a_batch_make_it_feed_texts_one_by_one(monkeypatch, model):
    run = EncoderGraph._call

    def disturbed(self, feeds, result):
        values, hidden = run(self, feeds, result)
        return (np.nextafter(values, np.float32(9)) if len(feeds["input_ids"]) > 1 else values), hidden

    monkeypatch.setattr(EncoderGraph, "_call", disturbed)
    engine = Engine(model)
    assert engine.metrics().batching.startswith("one by one")
    assert np.array_equal(
        engine.call(lambda model: model.encode(TEXTS)).result(60)[1], model.encode(TEXTS[1])[0]
    )
    assert engine.metrics().decode_steps == engine.metrics().decode_rows == len(TEXTS)
    engine.close()
    engine = Engine(model, EngineSettings(strict=False))
    assert not engine.metrics().strict
    engine.close()


def test_an_error_is_its_callers_own(engine, model):
    good, bad = (
        engine.call(lambda model: model.encode("a cat")),
        engine.call(lambda model: model.predict(("a", "b"))),
    )
    assert isinstance(bad.exception(60), UsageError)
    assert np.array_equal(good.result(60), model.encode("a cat"))


def test_an_encoder_generates_nothing_and_ends_when_drained(engine):
    with pytest.raises(UsageError, match="is an encoder, which generates nothing"):
        engine.submit(GenerationRequest(np.zeros(1, np.int32)))
    future = engine.call(lambda model: model.encode(TEXTS))
    assert engine.drain(60)
    assert future.done()
    with pytest.raises(EngineClosed):
        engine.call(lambda model: model.encode("a cat"))
