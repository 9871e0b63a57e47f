"""The sampler against naive references, its distribution, and the coupling of draft and replay."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rounding import assert_within, gamma
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.sampling import SamplingParams, choose, edit_logits, gumbel_noise
from trimserve.errors import UsageError

V = 37
ALL = Columns(np.arange(V, dtype=np.int32), V)
NOTHING = History(np.zeros(0, np.int32), np.zeros(0, np.int32))


def history(prompt=(), output=()):
    return History(np.array(prompt, np.int32), np.array(output, np.int32))


def at_step(step):
    return history(output=[0] * step)


def logits_of(seed, size=V, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def naive_allowed(scores, top_k, top_p, min_p):
    """Ids that top-k, then top-p, then min-p leave, one id at a time."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    allowed = set(order)
    if top_k:
        allowed = {i for i in order if scores[i] >= scores[order[min(top_k, len(order)) - 1]]}
    if top_p < 1:
        inside = [i for i in order if i in allowed]
        weights = [float(np.exp(np.float64(scores[i]) - np.float64(scores[order[0]]))) for i in inside]
        mass, last = 0.0, len(inside) - 1
        for place, weight in enumerate(weights):
            mass += weight
            if mass >= top_p * sum(weights):
                last = place
                break
        allowed = {i for i in inside if scores[i] >= scores[inside[last]]}
    if min_p:
        best = max(scores[i] for i in allowed)
        allowed = {i for i in allowed if scores[i] >= best + np.log(np.float32(min_p))}
    return allowed


def test_greedy_takes_the_largest_logit_and_the_lowest_id_on_a_tie():
    logits = np.zeros(V, np.float32)
    logits[[5, 30]] = 3
    assert choose(logits, ALL, SamplingParams(), NOTHING) == 5
    shuffled = Columns(ALL.ids[::-1].copy(), V)
    assert choose(logits[::-1].copy(), shuffled, SamplingParams(), NOTHING) == 5


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.8, 0.1)]
)
def test_draws_exactly_the_ids_that_the_filters_allow(top_k, top_p, min_p):
    logits = logits_of(1)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = {choose(logits, ALL, params, at_step(step)) for step in range(3000)}
    assert drawn == naive_allowed(logits, top_k, top_p, min_p)


def test_samples_are_distributed_as_the_softmax():
    logits, temperature, draws = logits_of(2), 1.3, 20_000
    params = SamplingParams(temperature=temperature, seed=11)
    counts = np.bincount([choose(logits, ALL, params, at_step(step)) for step in range(draws)], minlength=V)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * weights / weights.sum()
    rare = expected < 5  # too few for the chi-square approximation: one bin together
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    # The statistic has mean `degrees` and variance 2 * degrees; the draws are fixed by the seed.
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_noise_belongs_to_seed_step_and_id_and_not_to_the_column():
    ids = np.array([3, 36, 7, 151_935], np.int32)
    noise = gumbel_noise(5, 9, ids)
    assert np.array_equal(noise[[2, 0]], gumbel_noise(5, 9, ids[[2, 0]]))
    for other in (gumbel_noise(6, 9, ids), gumbel_noise(5, 10, ids)):
        assert not np.any(other == noise)


def test_noise_of_neighbouring_steps_seeds_and_ids_is_uncorrelated():
    ids = np.arange(2000, dtype=np.int32)
    grid = np.stack([gumbel_noise(seed, step, ids) for seed in (0, 1, 2**63, -1) for step in range(8)])
    correlation = np.corrcoef(grid)
    off_diagonal = correlation[~np.eye(len(grid), dtype=bool)]
    # Standard deviation of a correlation of 2,000 independent pairs: 0.022.
    assert np.abs(off_diagonal).max() < 0.12
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    # A Gumbel variable has the variance pi^2 / 6 and the kurtosis 27 / 5; six standard deviations of each.
    variance = np.pi**2 / 6
    assert grid.mean() == pytest.approx(np.euler_gamma, abs=6 * np.sqrt(variance / grid.size))
    assert grid.var() == pytest.approx(variance, abs=6 * variance * np.sqrt((27 / 5 - 1) / grid.size))


@given(
    seed=st.integers(0, 2**32),
    kept=st.sets(st.integers(0, V - 1), min_size=1, max_size=V),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 4, 100]),
    step=st.integers(0, 50),
)
def test_a_draft_over_some_ids_is_the_replay_over_all_with_the_others_forbidden(
    seed, kept, temperature, top_k, step
):
    ids = np.array(sorted(kept), np.int32)
    logits = logits_of(seed)
    masked = np.full(V, -np.inf, np.float32)
    masked[ids] = logits[ids]
    params = SamplingParams(temperature=temperature, top_k=min(top_k, len(ids)), seed=seed)
    past = at_step(step)
    assert choose(logits[ids], Columns(ids, V), params, past) == choose(masked, ALL, params, past)


@given(seed=st.integers(0, 2**32), kept=st.sets(st.integers(0, V - 1), min_size=5, max_size=30))
def test_draft_and_replay_agree_whenever_the_full_winner_is_kept(seed, kept):
    ids = np.array(sorted(kept), np.int32)
    logits = logits_of(seed)
    params = SamplingParams(temperature=1.0, seed=seed)
    full = choose(logits, ALL, params, NOTHING)
    if full in kept:
        assert choose(logits[ids], Columns(ids, V), params, NOTHING) == full


@pytest.mark.parametrize("kept", [list(range(V)), [0, 2, 3, 9, 20, 36]])
def test_penalties_and_bias_equal_a_loop_over_ids(kept):
    params = SamplingParams(
        repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0, 11: -4.0}
    )
    past = history(prompt=[3, 4, 4, 36], output=[9, 9, 20, 1, 9])
    logits = logits_of(4)
    expected = logits.copy()
    for id_ in {3, 4, 36, 9, 20, 1}:
        expected[id_] = expected[id_] / 1.7 if expected[id_] > 0 else expected[id_] * 1.7
    for id_, count in {9: 3, 20: 1, 1: 1}.items():
        expected[id_] -= 0.5 + 0.25 * count
    expected[3] += 2
    expected[11] -= 4
    before = logits.copy()
    changed = edit_logits(logits[kept], Columns(np.array(kept, np.int32), V), params, past)
    # A penalty, a product and three additions, of which none is larger than these together.
    bound = 2 * gamma(5) * (1.7 * np.abs(logits) + 3 * 0.25 + 0.5 + 4)
    assert_within(changed, expected[kept], bound[kept], rows=0)
    assert np.array_equal(logits, before)


def test_a_processor_sees_token_ids_and_the_full_width_even_in_a_draft():
    seen = []

    def ban_even(ids, logits):
        seen.append((ids.tolist(), logits.shape, np.isneginf(logits).sum()))
        out = logits.copy()
        out[::2] = -np.inf
        return out

    kept = np.array([2, 5, 9, 30], np.int32)
    logits = np.array([9.0, 1.0, 2.0, 8.0], np.float32)
    params = SamplingParams(logits_processor=ban_even)
    assert choose(logits, Columns(kept, V), params, history([30], [5])) == 9
    assert seen == [([30, 5], (V,), V - 4)]


def test_a_processor_of_another_width_is_refused():
    params = SamplingParams(logits_processor=lambda _, logits: logits[:-1])
    with pytest.raises(UsageError, match=r"shape \(37,\)"):
        choose(logits_of(0), ALL, params, NOTHING)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidding_every_id_is_an_error_and_no_token(temperature):
    params = SamplingParams(temperature=temperature, logits_processor=lambda _, x: np.full_like(x, -np.inf))
    with pytest.raises(UsageError, match="no token is allowed"):
        choose(logits_of(0), ALL, params, NOTHING)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", np.inf),
        ("presence_penalty", np.nan),
        ("frequency_penalty", -np.inf),
    ],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(UsageError, match=name):
        replace(SamplingParams(), **{name: value})


def test_one_allowed_id_is_always_drawn():
    logits = np.full(V, -np.inf, np.float32)
    logits[13] = -1e30
    assert choose(logits, ALL, SamplingParams(temperature=0.1, top_p=0.5, min_p=0.5), NOTHING) == 13
