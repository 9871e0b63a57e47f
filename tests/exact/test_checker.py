"""Exact mode against the full model: transformers in torch (greedy), the untrimmed graph (sampling)."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.support.generators import FullSampler, make_pair
from tests.support.rounding import assert_within, model_bound
from trimserve.decoding.sampling import SamplingParams
from trimserve.errors import UsageError
from trimserve.exact import checker as exact
from trimserve.exact.draft_length import DraftLength, LearnedCosts

pytestmark = pytest.mark.export

TEXTS = ["the cat sat on the mat", "a", "Grüße, Welt! 🎉", "数学 ábc\n\ndef", "dog"]


@pytest.fixture(
    scope="module", params=["llama", "llama_tied", "qwen3", "gemma2", "gemma3", "granite", "gpt2", "phi"]
)
def pair(request, tmp_path_factory):
    """The structural ids (the byte alphabet above all) and a few others are kept."""
    root = tmp_path_factory.mktemp(request.param)
    # A tied Gemma 3 with random weights, its embedding scaled up, repeats its last token for ever.
    options = {"tie_word_embeddings": False} if request.param == "gemma3" else {}
    return make_pair(root, request.param, tokenizer="byte_level_bpe", kept=275, seed=1, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """V = 37, H = 8, K = 11, untied."""
    root = tmp_path_factory.mktemp("tiny")
    kept = [0, 1, 2, 3, 4, 9, 17, 20, 25, 30, 36]
    return make_pair(root, "llama", tokenizer="wordpiece", kept_ids=kept, hidden_size=8, intermediate_size=12)


def greedy_of_full(pair, ids, tokens):
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    return sampler.run(ids, SamplingParams(), tokens, pair.generator.stop_ids)


def test_greedy_ids_equal_the_torch_models(pair):
    from tests.support.generators import greedy_by_torch

    model, generator = pair.torch_model(), pair.generator
    cold = 0
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        expected = greedy_by_torch(model, ids, 30)
        for certify in (True, False):
            (result,) = generator.generate(text, max_new_tokens=30, certify=certify)
            _assert_same_or_tied(list(result.ids), expected, pair, ids)
        cold += int((~generator.folder.vocab.is_kept(np.array(result.ids))).sum())
    assert cold > 0, "no cold token was produced: this test would not see a broken check"


def _assert_same_or_tied(found, expected, pair, prompt):
    """Equal ids; at a first difference the full graph's two logits must tie within rounding."""
    if found == expected:
        return
    place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    past = np.concatenate([prompt, np.array(expected[:place], np.int32)])
    logits = FullSampler(pair.full_graph, pair.vocab_size).logits(past)[-1]
    # torch and ONNX Runtime sum in different orders, and each of the two logits may be off.
    fed = torch.tensor(past[None].astype(np.int64))
    bound = 2 * model_bound(pair.torch_model(), lambda model: model(fed).logits[0, -1])
    gap = abs(float(logits[found[place]]) - float(logits[expected[place]]))
    assert gap <= bound, f"token {place}: {found[place]} for {expected[place]}, logits {gap} apart"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.5},
        {"logit_bias": {5: 4.0, 290: 6.0}, "temperature": 0.5, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    ],
    ids=lambda params: "-".join(params),
)
def test_sampled_ids_equal_those_of_the_untrimmed_graph(pair, params, monkeypatch):
    monkeypatch.setattr(exact, "_STEPS_AT_ONCE", 3)  # a block's logits come in several pieces
    generator = pair.generator
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    for seed, text in enumerate(TEXTS):
        ids = generator.codec.encode([text])[0]
        expected = sampler.run(ids, SamplingParams(seed=seed, **params), 24, generator.stop_ids)
        for certify in (True, False):
            options = {"max_new_tokens": 24, "certify": certify, "seed": seed}
            (result,) = generator.generate(text, **options, **params)
            assert list(result.ids) == expected


def test_sampled_tokens_are_distributed_as_the_full_models(tiny):
    """Pearson's chi-square of first tokens, of which 26 of 37 are cold, against torch's softmax."""
    generator, temperature, draws = tiny.generator, 1.5, 1500
    ids = generator.codec.encode(["dog"])[0]
    with torch.no_grad():
        logits = tiny.torch_model()(torch.tensor(ids[None].astype(np.int64))).logits[0, -1]
    expected = draws * torch.softmax(logits.double() / temperature, -1).numpy()
    options = {"max_new_tokens": 1, "temperature": temperature}
    drawn = [generator.generate("dog", seed=seed, **options)[0].ids[0] for seed in range(draws)]
    observed = np.bincount(drawn, minlength=tiny.vocab_size)
    rare = expected < 5  # too few for the approximation: one bin together
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert degrees > 10
    # The statistic has mean `degrees` and variance 2 * degrees; the draws are fixed by the seeds.
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("max_block", [1, 2, 3, 7, 32])
def test_tokens_do_not_depend_on_the_block_size(tiny, max_block):
    generator = tiny.generator
    reference = [r.ids for r in generator.generate(TEXTS, max_new_tokens=20, temperature=1.0, seed=3)]
    found = generator.generate(TEXTS, max_new_tokens=20, temperature=1.0, seed=3, max_block=max_block)
    assert [r.ids for r in found] == reference


def test_the_tiny_odd_model_is_exact_though_nearly_every_token_is_cold(tiny):
    generator = tiny.generator
    sampler = FullSampler(tiny.full_graph, 37)
    for seed in range(20):
        ids = generator.codec.encode([TEXTS[seed % len(TEXTS)]])[0]
        for params in ({}, {"temperature": 1.0}):
            (result,) = generator._generate([ids], {"max_new_tokens": 25, "seed": seed, **params})
            expected = sampler.run(ids, SamplingParams(seed=seed, **params), 25, generator.stop_ids)
            assert list(result.ids) == expected


def test_cold_tokens_at_every_position_of_a_block(tiny):
    """A processor that forces a cold id at one step after the other: each place of a block is hit."""
    generator = tiny.generator
    ids = generator.codec.encode(["the cat"])[0]
    cold_id = int(generator.folder.vocab.cold_ids[7])
    sampler = FullSampler(tiny.full_graph, 37)
    for place in range(12):
        expected, found = [], []
        for run in (expected, found):

            def force(history, logits, place=place):
                out = logits.copy()
                if history.size - ids.size == place:
                    out[:] = -np.inf
                    out[cold_id] = 0
                return out

            options = {"logits_processor": force, "temperature": 0.0}
            if run is expected:
                run += sampler.run(ids, SamplingParams(**options), 14, generator.stop_ids)
            else:
                run += generator._generate([ids], {"max_new_tokens": 14, **options})[0].ids
        assert found == expected
        assert len(found) <= place or found[place] == cold_id


def test_a_processor_that_bans_every_kept_id_leaves_only_cold_tokens(pair):
    generator = pair.generator
    kept = generator.folder.vocab.kept_ids

    def ban_kept(_, logits):
        out = logits.copy()
        out[kept] = -np.inf
        return out

    ids = generator.codec.encode(["the cat"])[0]
    (result,) = generator._generate([ids], {"max_new_tokens": 12, "logits_processor": ban_kept})
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    expected = sampler.run(ids, SamplingParams(logits_processor=ban_kept), 12, generator.stop_ids)
    assert list(result.ids) == expected
    assert not generator.folder.vocab.is_kept(result.ids).any()


def test_a_cold_stop_id_ends_the_sequence(tiny):
    generator = tiny.generator
    ids = generator.codec.encode(["dog"])[0]
    full = greedy_of_full(tiny, ids, 25)
    cold = [t for t in full if not generator.folder.vocab.is_kept(t)]
    plan = generator.plan({"max_new_tokens": 25})
    (request,) = generator.requests([ids], plan)
    request.stop_ids = frozenset({cold[-1]})
    checker = generator.checker(generator.plan({}))
    for _ in generator.run([request], plan, checker):
        pass
    assert request.output == full[: full.index(cold[-1]) + 1]


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(pair):
    generator = pair.generator
    for params in ({}, {"temperature": 1.0, "seed": 4}):
        together = generator.generate(TEXTS, max_new_tokens=20, **params)
        alone = [generator.generate(text, max_new_tokens=20, **params)[0] for text in TEXTS]
        assert [r.ids for r in together] == [r.ids for r in alone]
        assert [r.text for r in together] == [r.text for r in alone]
        assert [r.stopped for r in together] == [r.stopped for r in alone]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 6}], ids=["greedy", "sampled"])
def test_drafts_decide_the_cost_and_never_the_tokens(tiny, monkeypatch, params):
    expected = tiny.generator.generate(TEXTS, max_new_tokens=15, **params)
    rng = np.random.default_rng(0)
    kept = tiny.generator.folder.vocab.kept_ids
    monkeypatch.setattr("trimserve.decoding.request.Request.draft", lambda *_: int(rng.choice(kept)))
    found = tiny.generator.generate(TEXTS, max_new_tokens=15, **params)
    assert [r.ids for r in found] == [r.ids for r in expected]
    assert sum(r.rejected for r in found) > sum(r.rejected for r in expected)


def test_checking_while_drafting_on_changes_nothing(pair):
    """The order of a device: the next block is drafted while the last one is checked."""
    from tests.support.generators import open_generator

    apart, overlapped = pair.generator, open_generator(pair.generator.folder.path, overlap=True)
    for params in ({}, {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.2}, {"max_block": 3}):
        expected = apart.generate(TEXTS, max_new_tokens=25, **params)
        found = overlapped.generate(TEXTS, max_new_tokens=25, **params)
        assert [r.ids for r in found] == [r.ids for r in expected]
    assert overlapped.stats.drafted > overlapped.stats.tokens  # something was drafted ahead, or wasted


@pytest.mark.parametrize("overlap", [False, True])
def test_output_ends_where_the_table_of_positions_ends(tmp_path, overlap):
    """GPT-2's 64 positions; in a batch the longest prompt ends first."""
    from tests.support.generators import open_generator

    pair = make_pair(tmp_path, "gpt2", tokenizer="byte_level_bpe", kept=275, seed=1)
    generator = open_generator(pair.generator.folder.path, overlap=overlap)
    prompts = ["the cat sat on the mat", "a"]
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    results = generator.generate(prompts, max_new_tokens=200, temperature=1.0)
    for ids, result in zip(generator.codec.encode(prompts), results, strict=True):
        expected = sampler.run(ids, SamplingParams(temperature=1.0), 65 - ids.size, generator.stop_ids)
        assert list(result.ids) == expected
    with pytest.raises(UsageError, match="reads 64 at most"):
        generator.generate(["the cat " * 40])


def test_streamed_text_is_the_generated_text(pair):
    generator = pair.generator
    for text in TEXTS:
        (result,) = generator.generate(text, max_new_tokens=25, temperature=1.0)
        pieces = list(generator.stream(text, max_new_tokens=25, temperature=1.0))
        assert "".join(pieces) == result.text
        assert all(pieces)


def test_compact_mode_is_the_full_model_with_its_logits_masked(pair):
    """Allowed: the kept ids and the prompt's own cold ids, which hold slots."""
    generator = pair.generator
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        allowed = np.union1d(generator.folder.vocab.kept_ids, ids)

        def mask(_, logits, allowed=allowed):
            out = np.full_like(logits, -np.inf)
            out[allowed] = logits[allowed]
            return out

        (result,) = generator.generate(text, max_new_tokens=24, mode="compact")
        expected = sampler.run(ids, SamplingParams(logits_processor=mask), 24, generator.stop_ids)
        assert list(result.ids) == expected


def test_scores_are_the_full_models_log_probabilities(pair):
    model = pair.torch_model()
    for score in pair.generator.score(TEXTS):
        ids = torch.tensor(score.ids.astype(np.int64))

        @torch.no_grad()
        def log_probs(model, ids=ids):
            table = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
            return table[:-1].gather(1, ids[1:, None])[:, 0]

        # float32 logits from two libraries; the reductions themselves are in float64.
        assert_within(score.log_probs, log_probs(model), model_bound(model, log_probs, draws=2), rows=0)


def test_the_cold_mass_is_what_the_full_model_gives_the_ids_out_of_reach(tiny):
    generator = tiny.generator
    ids = generator.codec.encode(["a"])[0]
    (result,) = generator._generate([ids], {"max_new_tokens": 6, "mode": "compact", "report_mass": True})
    sampler = FullSampler(tiny.full_graph, 37)
    fed = np.concatenate([ids, np.array(result.ids[:-1], np.int32)])
    logits = sampler.logits(fed)[ids.size - 1 :].astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    reach = np.union1d(generator.folder.vocab.kept_ids, ids)
    expected = 1 - probabilities[:, reach].sum(axis=1)
    # Logits that are each off by b move a share p of a softmax by no more than exp(2 b) p.
    bound = np.expm1(2 * sampler.rounding(fed))
    assert_within(result.cold_mass, expected.mean(), bound, rows=None)
    shifted = 1 - probabilities[:, (reach + 1) % 37].sum(axis=1)
    assert abs(shifted.mean() - expected.mean()) > bound  # it sees the neighbours of these ids
    assert 0.05 < result.cold_mass < 1


def test_stats_count_drafts_and_cold_tokens(tiny):
    from tests.support.generators import open_generator

    generator = open_generator(tiny.generator.folder.path)
    (result,) = generator.generate("dog", max_new_tokens=20)
    stats = generator.stats
    is_cold = ~generator.folder.vocab.is_kept(np.array(result.ids))
    assert stats.tokens == len(result.ids)
    assert stats.rejected == result.rejected > 0
    assert stats.drafted == result.drafted >= len(result.ids) - result.rejected
    prompt_cold = int((~generator.folder.vocab.is_kept(generator.codec.encode(["dog"])[0])).sum())
    assert stats.cold_tokens == is_cold.sum() + prompt_cold
    assert stats.accepted == stats.tokens - stats.rejected
    assert set(stats.seconds) == {"body", "compact_head", "cold_head", "sampler", "other"}
    assert all(spent >= 0 for spent in stats.seconds.values())


def test_a_step_without_the_head_makes_no_logits(tiny):
    decoder = tiny.generator._decoder
    step = decoder.step(decoder.empty_cache(1), np.zeros((1, 1), np.int64), decoder.no_rows, keep=-1)
    assert step.logits.shape[:2] == step.hidden.shape[:2] == (1, 0)
    assert 0 <= decoder.head_share() <= 1


def test_a_wrong_cold_row_is_noticed_by_these_tests(tiny, tmp_path):
    """The comparison above must be able to fail: shift one cold row and see other tokens."""
    import shutil

    from tests.support.generators import open_generator
    from trimserve.files.tensors import read_header
    from trimserve.folder.manifest import read_manifest, write_manifest
    from trimserve.folder.names import COLD_NAME
    from trimserve.folder.opening import list_files

    broken = tmp_path / "broken"
    shutil.copytree(tiny.generator.folder.path, broken)
    specs, _ = read_header(broken / COLD_NAME)
    with (broken / COLD_NAME).open("r+b") as file:
        file.seek(specs["head"].offset)
        file.write(np.full(8, 9.0, np.float32).tobytes())
    import dataclasses

    write_manifest(broken, dataclasses.replace(read_manifest(broken), files=list_files(broken)))
    texts = TEXTS[:3]
    good = [r.ids for r in tiny.generator.generate(texts, max_new_tokens=20)]
    bad = [r.ids for r in open_generator(broken).generate(texts, max_new_tokens=20)]
    assert good != bad


def test_exact_mode_without_cold_rows_is_refused(tmp_path):
    from tests.support.folders import make_vocab
    from tests.support.generators import open_generator
    from tests.support.models import save_model
    from trimserve.model.resolve import resolve_model
    from trimserve_export.pipeline import export

    source = resolve_model(str(save_model("llama_tied", tmp_path / "model", tokenizer="byte_level_bpe")))
    vocab = make_vocab(list(range(290)), source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "out", cold=False, progress=False)
    generator = open_generator(tmp_path / "out")
    assert generator.generate("the cat", max_new_tokens=3)[0].ids
    with pytest.raises(UsageError, match="without --no-cold"):
        generator.generate("the cat", max_new_tokens=3, mode="exact")
    with pytest.raises(UsageError, match="without --no-cold"):
        generator.score("the cat")


def test_the_block_grows_while_drafts_stand_and_shrinks_after_a_rejection():
    block = DraftLength(32)
    sizes = []
    for _ in range(8):
        sizes.append(block.size)
        block.note(block.size, block.size, block.size, 0.001, 0.010)
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 16
    before = block.size
    block.note(before, 0, 1, 0.001, 0.010)
    assert block.size < before


def test_the_block_stays_small_where_drafts_fall_and_steps_are_dear():
    block = DraftLength(32)
    for _ in range(60):
        size = block.size
        stood = size // 2
        block.note(size, stood, stood + 1, 0.050, 0.001)
    assert block.size <= 2


def test_what_a_block_size_learned_stays_for_the_next_request():
    costs = LearnedCosts()
    block = DraftLength(32, learned=costs)
    for _ in range(20):
        block.note(block.size, block.size, block.size, 0.001, 0.010)
    learned = block.size
    block = DraftLength(32, learned=costs)
    assert block.size == 1
    sizes = []
    while block.size < learned and len(sizes) < 8:
        sizes.append(block.size)
        block.note(block.size, block.size, block.size, 0.001, 0.010)
    assert len(sizes) <= 3, sizes


def test_the_greedy_draft_is_the_largest_of_kept_and_slots_and_the_lowest_id_on_a_tie(tiny):
    from trimserve.decoding.columns import Columns, History
    from trimserve.decoding.sampling import choose
    from trimserve.decoding.slots import DraftSlots

    generator = tiny.generator
    vocab, decoder = generator.folder.vocab, generator._decoder
    kept = Columns(vocab.kept_ids, vocab.vocab_size)
    random = np.random.default_rng(0)
    for cold_ids in ([], [35, 5], [6, 24, 7]):
        slots = DraftSlots(kept, generator._cold, decoder.after_head, np.array(cold_ids, np.int32))
        for _ in range(20):
            hidden = random.standard_normal(8).astype(np.float32)
            logits = random.standard_normal(len(vocab)).astype(np.float32)
            extended = slots.extend(logits, hidden)
            none = History(np.array([0], np.int32), np.array([], np.int32))
            assert slots.best(logits, hidden) == choose(extended, slots.columns, SamplingParams(), none)
            if cold_ids:  # a tie of a kept id and a slot
                logits[3] = extended.max()
                extended = slots.extend(logits, hidden)
                assert slots.best(logits, hidden) == choose(extended, slots.columns, SamplingParams(), none)
