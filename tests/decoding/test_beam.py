"""Beam search against that of transformers, on the full model in torch."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.support.generators import make_pair
from tests.support.translators import make_translator
from trimserve.decoding.beam import BeamParams, BeamState, largest
from trimserve.decoding.columns import Columns
from trimserve.decoding.request import Request
from trimserve.decoding.sampling import SamplingParams
from trimserve.errors import NoTokenError, UsageError

pytestmark = [
    pytest.mark.export,
    pytest.mark.filterwarnings("ignore:Moving the following attributes"),
]

TEXTS = ["the cat sat on the mat", "dog", "a cat ? un latte on a dog .", "lo"]
OPTIONS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty, early in [
        (4, 1.0, False),
        (2, 1.0, True),
        (4, 2.0, "never"),
        (3, 0.0, "never"),
        (4, -0.5, False),
        (4, 0.7, True),
    ]
]


@pytest.fixture(params=["t5", "mt5", "bart", "marian", "m2m_100"])
def translator(request, translators):
    return translators(request.param)


@pytest.fixture(scope="module")
def decoder_only(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return make_pair(root, "llama", tokenizer="byte_level_bpe", kept=275, seed=1)


@pytest.fixture(scope="module")
def ends_often(tmp_path_factory):
    """A bias towards the end token: sequences finish at different lengths."""
    root = tmp_path_factory.mktemp("ends")
    return make_translator(root, "pegasus", seed=8, bias={3: 4.5}, forced_eos_token_id=None)


def assert_as_transformers(made, options, tokens=12):
    results = made.generator.generate(TEXTS, max_new_tokens=tokens, **options)
    assert [list(result.ids) for result in results] == [
        made.by_torch(text, tokens, **options) for text in TEXTS
    ]
    return results


def test_beams_are_those_of_transformers(translator):
    produced = []
    for options in OPTIONS[:2]:
        produced += [result.ids for result in assert_as_transformers(translator, options)]
    assert translator.is_cold(np.concatenate(produced)).any()


def test_finished_beams_are_those_of_transformers(ends_often):
    lengths = set()
    for options in OPTIONS:
        results = assert_as_transformers(ends_often, options, tokens=9)
        lengths |= {len(result.ids) for result in results}
        assert all((result.stopped == "eos") == (result.ids[-1] == 3) for result in results)
    assert len(lengths) > 4


def test_a_decoder_without_encoder_has_the_same_beams(decoder_only):
    model, generator = decoder_only.torch_model(), decoder_only.generator
    texts = ["the cat sat on the mat", "a", "Grüße"]
    for options in OPTIONS[:3]:
        results = generator.generate(texts, max_new_tokens=10, **options)
        for text, result in zip(texts, results, strict=True):
            ids = torch.tensor(generator.codec.encode([text])[0][None].astype(np.int64))
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **options
                )
            assert list(result.ids) == out[0, ids.shape[1] :].tolist()


def test_compact_beams_are_those_of_the_masked_model(translator):
    """Log-probabilities over the kept ids and the source's own cold ids alone."""
    for text in TEXTS:
        allowed = np.union1d(translator.generator.folder.vocab.kept_ids, translator.encode(text))
        (found,) = translator.generator.generate(text, max_new_tokens=8, num_beams=3, mode="compact")
        expected = translator.by_torch(
            text, 8, num_beams=3, renormalize_logits=False, logits_processor=[Renormalised(allowed)]
        )
        if not translator.generator.config.rules(8):  # a forced token has probability 1 in both
            assert list(found.ids) == expected
        assert not (translator.is_cold(found.ids) & ~np.isin(found.ids, allowed)).any()


class Renormalised:
    """Takes all but some ids out of the log-probabilities that transformers hands to its processors."""

    def __init__(self, allowed):
        self.allowed = torch.tensor(allowed)

    def __call__(self, _, scores):
        out = torch.full_like(scores, -torch.inf)
        out[:, self.allowed] = torch.log_softmax(scores[:, self.allowed], -1)
        return out


def test_one_beam_is_greedy_and_many_requests_share_a_product(translator):
    generator = translator.generator
    greedy = [result.ids for result in generator.generate(TEXTS, max_new_tokens=8)]
    assert [r.ids for r in generator.generate(TEXTS, max_new_tokens=8, num_beams=1)] == greedy
    many = TEXTS * 3  # 12 requests x 5 beams: more rows than one product takes
    together = [result.ids for result in generator.generate(many, max_new_tokens=8, num_beams=5)]
    assert together == together[:4] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["x"]}, "stop means nothing"),
        ({"stop_strings": ["x"]}, "stop_strings means nothing"),
        ({"report_mass": True, "mode": "compact"}, "report_mass means nothing"),
        ({"early_stopping": "maybe"}, "early_stopping should be True or False"),
        ({"num_beams": 0}, "num_beams should be from 1 to 1024, found 0"),
    ],
)
def test_what_does_not_go_with_beams_is_refused(decoder_only, options, message):
    with pytest.raises(UsageError, match=message):
        decoder_only.generator.generate("dog", **{"num_beams": 2, **options})


@pytest.mark.parametrize("size", [1, 7, 511, 512, 5_000, 20_480, 30_001])
@pytest.mark.parametrize("count", [1, 8, 37])
def test_the_largest_scores_are_found(size, count):
    random = np.random.default_rng(size + count)
    for scores in (random.normal(size=size), -np.arange(size), np.full(size, -np.inf), np.zeros(size)):
        found = largest(scores.astype(np.float32), count)
        assert len(set(found.tolist())) == min(size, count)
        np.testing.assert_array_equal(np.sort(scores[found])[::-1], np.sort(scores)[::-1][: min(size, count)])


def test_beams_without_any_token_are_an_error(decoder_only):
    with pytest.raises(NoTokenError, match="every beam's logits"):
        decoder_only.generator.generate(
            "dog", num_beams=2, logits_processor=lambda _, logits: np.full_like(logits, -np.inf)
        )


def test_beams_are_not_streamed(decoder_only):
    with pytest.raises(UsageError, match="known when the search is over"):
        next(decoder_only.generator.stream("dog", num_beams=2))


def test_scores_are_log_probabilities_again_where_that_is_asked():
    columns = Columns(np.arange(6, dtype=np.int32), 6)
    params = SamplingParams(repetition_penalty=2.0)
    logits = np.linspace(1, 3, 6, dtype=np.float32)
    sums = []
    for again in (False, True):
        request = Request(np.array([1, 4], np.int32), params, 9)
        state = BeamState(request, BeamParams(num_beams=2, renormalize_logits=again))
        sums.append(float(np.exp(state._log_probs(state.running[0], logits, columns)).sum()))
    assert sums[0] < 0.9
    assert sums[1] == pytest.approx(1)
