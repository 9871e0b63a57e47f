"""Drafts from the text: fewer steps where it repeats itself, and never another token."""

from contextlib import closing
from types import MappingProxyType

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.models import needs_transformers_5
from trimserve.decoding import text_drafts
from trimserve.decoding.request import Request
from trimserve.decoding.sampling import SamplingParams
from trimserve.decoding.text_drafts import TextDrafts, _continuation
from trimserve.engine import Engine, EngineSettings, GenerationRequest
from trimserve.errors import UsageError
from trimserve.loading import load
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.kv_cache import SharedCache
from trimserve.runtime.row_costs import ONE_BY_ONE, RowCosts, measure_rows

pytestmark = [pytest.mark.export, needs_transformers_5]

# As if more tokens in a step cost nothing, and as if each cost a step more.
FREE = RowCosts(MappingProxyType(dict.fromkeys((1, 2, 4, 8, 16), 1.0)))
LINEAR = RowCosts(MappingProxyType({size: float(size) for size in (1, 2, 4, 8, 16)}))
PROMPTS = [
    "the cat sat on the mat, the cat sat on the",
    "a b a b a b a b",
    "Grüße 🎉 Grüße 🎉 Grüße",
    "dog",
    "",
]


@pytest.fixture(scope="module")
def model(served):
    return load(served("shared_kv"), threads=1)


def believing(model, costs, monkeypatch):
    """The generator, for which steps cost what they are said to."""
    monkeypatch.setattr(model, "measured_rows", lambda: costs)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "compact"},
        {"certify": False, "max_block": 3},
        {"temperature": 0.4, "seed": 5},
        {"temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 2, "mode": "compact"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "greedy",
)
def test_tokens_are_those_of_single_steps(model, options, monkeypatch):
    assert 16 in measure_rows(model.decoder, model.folder.vocab.kept_ids.size, None).seconds
    random = np.random.default_rng(7)
    stood = 0
    for prompt in PROMPTS:
        (alone,) = ask(model, ONE_BY_ONE, monkeypatch, prompt, **options)
        steps = len(count_runs(monkeypatch, lambda p=prompt: ask(model, LINEAR, monkeypatch, p, **options)))

        (request,) = model.requests(model.codec.encode([prompt]), model.plan({}))

        def guessed(text, most, known=alone.ids, start=request.prompt.size):
            """What comes next, at times up to an error."""
            at = text.size - start
            right = list(known[at : at + most])
            if random.integers(3) == 0 and right:
                right[random.integers(len(right))] = int(random.integers(200))
            return right

        before = model.stats.guesses_stood
        with monkeypatch.context() as patch:
            patch.setattr(text_drafts, "_continuation", guessed)
            found = []
            runs = count_runs(
                patch, lambda p=prompt, f=found: f.extend(ask(model, FREE, patch, p, **options))
            )
        assert found[0].ids == alone.ids
        stood += model.stats.guesses_stood - before
        if options.get("mode") == "compact":  # blocks of exact mode follow the clock
            assert len(runs) == steps - (model.stats.guesses_stood - before)
    assert stood > 30, "hardly a guess stood: this test would not see a wrong one"


def ask(model, costs, monkeypatch, prompt, **options):
    generator = believing(model, costs, monkeypatch)
    return generator.generate(prompt, max_new_tokens=40, text_drafts=True, **options)


def count_runs(monkeypatch, work):
    runs, run = [], Decoder._run

    def counted(self, inputs, cache):
        runs.append(1)
        return run(self, inputs, cache)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_run", counted)
        work()
    return runs


def test_the_cache_holds_all_but_the_last_token(model, monkeypatch):
    """Whatever was guessed and taken back."""
    generator = believing(model, FREE, monkeypatch)
    caches, made = [], generator.decoder.empty_cache
    monkeypatch.setattr(
        generator.decoder, "empty_cache", lambda batch: caches.append(made(batch)) or caches[-1]
    )
    monkeypatch.setattr(text_drafts, "_continuation", lambda _, most: [5, 6, 7][:most])
    for prompt in PROMPTS[:3]:
        plan = generator.plan({"mode": "compact", "max_new_tokens": 30, "text_drafts": True})
        (request,) = generator.requests(generator.codec.encode([prompt]), plan)
        for _ in generator.run([request], plan, generator.checker(plan)):
            assert caches[-1].lengths[0] == request.prompt.size + len(request.output) - 1
        assert request.guessed > 3
    assert isinstance(caches[-1], SharedCache)


def test_guesses_follow_the_longest_agreement_that_is_last():
    text = np.array([1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 6, 7, 8, 4, 2, 3], np.int32)
    assert _continuation(text, 3) == [6, 7, 8]
    assert _continuation(np.array([1, 2, 3, 4, 9, 2, 3, 5, 5, 5, 1, 2, 3], np.int32), 2) == [4, 9]
    assert _continuation(np.array([7, 7, 7, 7, 7, 7], np.int32), 3) == [7, 7]
    assert _continuation(np.array([1, 2, 1], np.int32), 3) == []
    for size in range(3):
        assert _continuation(np.arange(size, dtype=np.int32), 4) == []
    random = np.random.default_rng(3)
    for size in random.integers(2, 40, 300):
        text = random.integers(0, 4, size).astype(np.int32)
        found = _continuation(text, 4)
        assert (found != []) == any((text[at : at + 2] == text[-2:]).all() for at in range(size - 2))
        assert not found or any(
            text[at : at + 2 + len(found)].tolist() == [*text[-2:].tolist(), *found] for at in range(size - 2)
        )


def test_guesses_are_fed_as_they_pay_and_stand():
    request = Request(np.array([1, 2, 3, 4, 5, 6, 1, 2], np.int32), SamplingParams(), 20)
    costs = RowCosts(MappingProxyType({1: 1.0, 2: 1.3, 4: 1.9}))
    text = TextDrafts(request, lambda: costs)
    assert text.guess([], 10) == ([3, 4, 5, 6, 1, 2], 1)  # of every other: 1.3 / 1.5, 1.9 / 1.875
    for _ in range(40):
        text.note(stood=True, was_fed=True)
    assert text.guess([], 10)[1] == 3
    assert text.guess([3], 2) == ([4, 5], 1)
    for _ in range(40):
        text.note(stood=False, was_fed=False)
    assert text.guess([3, 4], 10) == ([5, 6, 1, 2, 3, 4], 0)
    assert (request.guessed, request.guesses_stood) == (5, 40)
    request.output += [3, 4]
    assert text.guess([], 10)[0][:2] == [5, 6]
    assert text.guess([5, 5, 5] * 200, 2)[0] == [5, 5]


def test_sizes_with_other_bits_are_not_used(model, monkeypatch):
    decoder, step = model.decoder, model.decoder.step

    def disturbed(cache, ids, cold_rows, **options):
        found = step(cache, ids, cold_rows, **options)
        if ids.shape[1] == 4:
            found.logits[0, 2, 0] += 1e-3
        return found

    kept = model.folder.vocab.kept_ids.size
    assert {1, 2, 4} <= measure_rows(decoder, kept, None).seconds.keys()
    monkeypatch.setattr(decoder, "step", disturbed)
    sizes = measure_rows(decoder, kept, None).seconds
    assert {1, 2} <= sizes.keys()
    assert 4 not in sizes
    assert measure_rows(decoder, kept, 16) is ONE_BY_ONE


def test_it_ends_where_the_positions_do(model, monkeypatch):
    prompt = "a b " * 168
    size = model.codec.encode([prompt])[0].size
    assert 490 < size < model.config.context == 512
    for mode in ("exact", "compact"):
        found = []
        for costs in (ONE_BY_ONE, FREE):
            generator = believing(model, costs, monkeypatch)
            (result,) = generator.generate(prompt, max_new_tokens=99, text_drafts=True, mode=mode)
            found.append(result.ids)
        assert found[0] == found[1]
        assert len(found[0]) + size == 513


def test_what_cannot_draft_from_the_text_says_so(model, monkeypatch):
    with pytest.raises(UsageError, match="text_drafts means nothing to a beam search"):
        model.generate("a", num_beams=2, text_drafts=True)
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "_shares_buffers", False)
        with pytest.raises(UsageError, match=r"cannot draft from the text .*: leave text_drafts out"):
            model.generate("a", text_drafts=True)
    with closing(Engine(model, EngineSettings(max_rows=2))) as engine:
        request = GenerationRequest(np.array([5], np.int32), {"text_drafts": True})
        with pytest.raises(UsageError, match="text_drafts is for generate and stream"):
            engine.submit(request)
