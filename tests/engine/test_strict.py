"""What the engine finds out about a graph, and what it does about it."""

import dataclasses
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.models import needs_transformers_5
from trimserve.engine import Engine, EngineSettings, GenerationRequest
from trimserve.engine.strict import prove
from trimserve.errors import UsageError
from trimserve.loading import load
from trimserve.runtime.decoder import Decoder

pytestmark = needs_transformers_5
SETTINGS = EngineSettings(max_rows=4)


@pytest.fixture(scope="module")
def model(served):
    return load(served("shared_kv"), threads=1)


def disturb(monkeypatch, when):
    """Move one bit of the logits of every step whose ids (B, T) are such."""
    step = Decoder.step

    def disturbed(self, cache, ids, *args, **options):
        made = step(self, cache, ids, *args, **options)
        if not (made.logits.size and when(ids)):
            return made
        return dataclasses.replace(made, logits=np.nextafter(made.logits, np.float32(np.inf)))

    monkeypatch.setattr(Decoder, "step", disturbed)


def test_a_graph_that_gives_the_same_bits_is_batched(model):
    proof = prove(model, SETTINGS)
    assert (proof.is_strict, proof.least_rows, proof.chunks, proof.reuses_prefixes) == (True, 1, True, True)


def test_a_step_of_one_row_with_other_bits_is_never_made(monkeypatch, model):
    disturb(monkeypatch, lambda ids: ids.shape == (1, 1))
    proof = prove(model, SETTINGS)
    # A text of one token is read by such a step, alone and in a batch.
    assert (proof.is_strict, proof.least_rows) == (True, 2)
    assert proof.batching == "batches, of 2 rows at least"
    engine = Engine(model, SETTINGS)
    handle = engine.submit(GenerationRequest(np.array([5, 6, 7], np.int32), {"max_new_tokens": 4}))
    assert len(handle.result().ids) == 4
    engine.close()


def test_other_bits_in_a_batch_make_it_run_one_by_one_and_say_so(monkeypatch, model):
    disturb(monkeypatch, lambda ids: len(ids) == 3)
    engine = Engine(model, SETTINGS)
    assert engine.metrics().batching == (
        "one by one: in a batch this graph's results have other last bits than alone"
    )
    assert engine.metrics().strict
    engine.close()
    engine = Engine(model, dataclasses.replace(SETTINGS, strict=False))
    assert engine.metrics().batching == "batches, with other last bits than alone"
    *_, end = engine.submit(GenerationRequest(np.array([5], np.int32), {"max_new_tokens": 1})).events()
    assert not end.strict
    engine.close()


def test_other_bits_in_chunks_make_it_read_prompts_whole(monkeypatch, model):
    disturb(monkeypatch, lambda ids: ids.shape == (1, 5))
    proof = prove(model, SETTINGS)
    assert (proof.is_strict, proof.chunks, proof.reuses_prefixes) == (True, False, False)


def test_only_what_a_prompt_has_left_is_reused_never_what_an_answer_has(model):
    prompt = np.arange(20, 60, dtype=np.int32)
    engine = Engine(model, SETTINGS)
    first = engine.submit(GenerationRequest(prompt, {"max_new_tokens": 8})).result()
    following = np.concatenate([prompt, np.array(first.ids, np.int32), prompt[:5]])
    *_, end = engine.submit(GenerationRequest(following, {"max_new_tokens": 4})).events()
    assert end.usage.cached_tokens == prompt.size
    *_, end = engine.submit(GenerationRequest(prompt, {"max_new_tokens": 4})).events()
    assert end.usage.cached_tokens == prompt.size - 2
    engine.close()


def test_a_prompt_is_left_when_its_client_leaves(monkeypatch, model):
    fed = []
    step = Decoder.step

    def noted(self, cache, ids, *args, **options):
        fed.append(ids.shape)
        while not handles:
            time.sleep(0.001)
        handles[0].cancel()
        return step(self, cache, ids, *args, **options)

    engine = Engine(model, EngineSettings(max_rows=4, chunk=4))
    monkeypatch.setattr(Decoder, "step", noted)
    handles = []
    handles.append(engine.submit(GenerationRequest(np.arange(20, 220, dtype=np.int32))))
    *_, end = handles[0].events()
    engine.close()
    assert end.reason == "cancelled"
    assert fed == [(1, 4)]


def test_memory_is_kept_within_its_limit_and_what_never_fits_is_refused(model):
    position = model.decoder.rows(1).position_bytes
    engine = Engine(model, EngineSettings(max_rows=4, kv_memory=100 * position))
    with pytest.raises(UsageError, match="lower max_new_tokens, or raise kv_memory"):
        engine.submit(GenerationRequest(np.arange(20, 90, dtype=np.int32), {"max_new_tokens": 40}))
    handles = [
        engine.submit(GenerationRequest(np.arange(20, 50, dtype=np.int32) + n, {"max_new_tokens": 20}))
        for n in range(6)
    ]
    most = 0
    while engine.metrics().running or engine.metrics().waiting:
        most = max(most, engine.metrics().kv_bytes)
        time.sleep(0.001)
    assert all(len(handle.result().ids) <= 20 for handle in handles)
    assert most <= 100 * position
    engine.close()
