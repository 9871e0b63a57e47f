"""The sampler: logits of any set of token ids, a history, a seed and a step -> one token id.

A pure function, so that a draft over the kept ids and a replay over the full vocab can share it. The random
number of a token id depends on (seed, step, id) alone. A token is drawn by the Gumbel-max rule (Gumbel 1954;
Maddison, Tarlow & Minka 2014, https://arxiv.org/abs/1411.0030): the argmax of score + noise, with noise
independent standard Gumbel a token id, is distributed as softmax(score). It is exact over any subset of
the ids, and draft and replay draw the same token unless a cold id wins or the filters below differ, which
is why the noise belongs to the id and not to its place in the array.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.decoding.columns import Columns, History, LogitsProcessor
from trimserve.decoding.filters import drop_by_entropy, drop_improbable, keep_top_h, keep_typical
from trimserve.decoding.logit_edits import LogitEdits
from trimserve.decoding.token_rules import TokenRules, Verdict
from trimserve.errors import NoTokenError, UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. All ids are token ids; the defaults are greedy decoding.

    Applied in this order: sequence bias, the penalty on given ids, repetition, presence and frequency
    penalty, bias, the model's own rules, the penalty on length, processor, temperature, top-h, top-k,
    top-p, min-p, typical, epsilon, eta.

    Attributes:
        temperature: 0 takes the largest logit (lowest id on a tie); otherwise logits are divided by it.
        top_k: keep the k largest logits and all that equal the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable ids whose mass reaches it.
        min_p: keep ids with at least this share of the largest probability.
        top_h: keep the most probable ids up to this share of the entropy; None is off.
        typical_p: keep the ids of most typical surprise up to this mass.
        epsilon_cutoff: exclude ids less probable than this.
        eta_cutoff: the same, with a lower threshold where many ids are likely.
        repetition_penalty: of ids in prompt or output, divide positive logits and multiply negative ones.
        presence_penalty: subtracted from the logit of every id in the output.
        frequency_penalty: subtracted once for each time an id stands in the output.
        logit_bias: added to the logits of these ids.
        logits_processor: the caller's own change to the logits over the full vocab.
        seed: of the random numbers.
        rules: what the model's generation config forces and forbids.
        edits: what else it does to single logits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logits_processor: LogitsProcessor | None = None
    seed: int = 0
    rules: TokenRules | None = None
    edits: LogitEdits | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < np.inf, "a number, 0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("top_h", self.top_h is None or 0 < self.top_h <= 1, "above 0 and at most 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("epsilon_cutoff", 0 <= self.epsilon_cutoff < 1, "0 (off) or more, and below 1"),
            ("eta_cutoff", 0 <= self.eta_cutoff < 1, "0 (off) or more, and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "a number above 0"),
            ("presence_penalty", np.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", np.isfinite(self.frequency_penalty), "a number"),
        ):
            if not valid:
                raise UsageError(f"{name} should be {expected}, found {getattr(self, name)}.")

    @property
    def edits_logits(self) -> bool:
        """Whether anything changes the logits before the temperature."""
        return bool(self.rules) or self._edits_values

    @property
    def _edits_values(self) -> bool:
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.logits_processor
            or self.edits
        )

    @property
    def needs_all_logits(self) -> bool:
        """Whether bounds of the cold logits say nothing about the token: they themselves are needed."""
        shaped = self.typical_p < 1 or self.epsilon_cutoff or self.eta_cutoff or self.top_h is not None
        bends = self.edits is not None and self.edits.bends
        return bool(self.logits_processor is not None or bends or (self.temperature > 0 and shaped))

    @property
    def takes_maximum(self) -> bool:
        """Whether the token is the largest logit of the model and nothing else matters."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def takes_allowed_maximum(self) -> bool:
        """Whether the token is the largest logit among those that the rules allow."""
        return self.temperature == 0 and not self._edits_values


def choose(logits: Floats, columns: Columns, params: SamplingParams, history: History) -> int:
    """Choose the next token id.

    Args:
        logits: float32 (n,), of the ids in `columns`; not changed.
        columns: the ids' place.
        params: see `SamplingParams`.
        history: prompt and output so far; the step that the noise depends on is the output's length.

    Returns:
        The token id.

    Raises:
        NoTokenError: every logit is -inf (the processor or the biases forbade all ids).
    """
    edited = edit_logits(logits, columns, params, history) if params.edits_logits else logits
    if params.temperature == 0:
        return _first_maximum(edited, columns.ids)
    scores = filter_scores(edited / np.float32(params.temperature), params)
    candidates = np.flatnonzero(scores > -np.inf)
    if candidates.size == 0:
        return _first_maximum(scores, columns.ids)  # raises
    ids = columns.ids[candidates]
    perturbed = scores[candidates] + gumbel_noise(params.seed, history.output.size, ids)
    return _first_maximum(perturbed, ids)


def _first_maximum(scores: npt.NDArray[Any], ids: Ids) -> int:
    best = scores.max(initial=-np.inf)
    if best == -np.inf:
        raise NoTokenError("no token is allowed: every logit is -inf. Allow at least one id.")
    return int(ids[scores == best].min())


def edit_logits(logits: Floats, columns: Columns, params: SamplingParams, history: History) -> Floats:
    """Apply penalties, bias, rules and processor; returns a changed copy, float32 (n,)."""
    out = logits.copy()
    edits = params.edits
    if edits:
        _favour(out, columns, edits, history)
    if params.repetition_penalty != 1:
        seen = columns.find(np.unique(history.ids))
        penalty = np.float32(params.repetition_penalty)
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    if params.presence_penalty or params.frequency_penalty:
        distinct, counts = np.unique(history.output, return_counts=True)
        cost = params.presence_penalty + params.frequency_penalty * counts
        known = np.isin(distinct, columns.ids)
        out[columns.find(distinct)] -= cost[known].astype(np.float32)
    for token_id, bias in params.logit_bias.items():
        out[columns.find(np.array([token_id], np.int32))] += np.float32(bias)
    if params.rules:
        obey(out, columns, params.rules.at(history.prompt, history.output, history.source))
    if edits and edits.bends:
        if edits.remove_invalid_values:
            out = np.nan_to_num(out, nan=0.0, posinf=float(np.finfo(np.float32).max), neginf=-np.inf)
        ends = columns.find(np.array(edits.eos_token_id, np.int32))
        out[ends] = edits.hasten_ends(out[ends], history.output.size)
    if params.logits_processor is not None:
        out = columns.apply(params.logits_processor, history.ids, out)
    return out


def edited_ids(params: SamplingParams, history: History) -> Ids:
    """The ids whose logits `edit_logits` changes one by one at a step (bans apart), int32, increasing."""
    changed = [np.fromiter(params.logit_bias, np.int32, len(params.logit_bias))]
    if params.repetition_penalty != 1:
        changed.append(history.ids)
    elif params.presence_penalty or params.frequency_penalty:
        changed.append(history.output)
    if params.edits:
        changed.append(np.fromiter(params.edits.biases(history.ids), np.int32))
        if params.edits.encoder_repetition_penalty != 1:
            changed.append(history.given)
    return np.unique(np.concatenate(changed))


def _favour(logits: Floats, columns: Columns, edits: LogitEdits, history: History) -> None:
    """Apply sequence bias and the encoder's repetition penalty, in place."""
    for token_id, bias in edits.biases(history.ids).items():
        logits[columns.find(np.array([token_id], np.int32))] += bias
    if edits.encoder_repetition_penalty != 1:
        given = columns.find(np.unique(history.given))
        logits[given] = edits.favour_given(logits[given])


def obey(logits: Floats, columns: Columns, verdict: Verdict) -> None:
    """Set what the rules forbid at a step to -inf and a forced id to 0, in place: float32 (n,)."""
    if verdict.forced.size:
        logits[:] = -np.inf
        logits[columns.find(verdict.forced)] = 0
    else:
        logits[columns.find(verdict.banned)] = -np.inf


def filter_scores(scores: Floats, params: SamplingParams, keep: int = 1) -> Floats:
    """Set to -inf what the filters exclude; each works on what the one before left.

    `keep` of the likeliest ids are never excluded.
    """
    if params.top_h is not None:
        scores = keep_top_h(scores, params.top_h)
    filtered = _by_size(scores, params)
    if 1 < keep <= scores.size:
        kth = np.partition(scores, scores.size - keep)[scores.size - keep]
        filtered = np.where(scores >= kth, scores, filtered)
    if params.typical_p < 1:
        filtered = keep_typical(filtered, params.typical_p, keep)
    if params.epsilon_cutoff:
        filtered = drop_improbable(filtered, params.epsilon_cutoff, keep)
    return drop_by_entropy(filtered, params.eta_cutoff, keep) if params.eta_cutoff else filtered


def _by_size(scores: Floats, params: SamplingParams) -> Floats:
    """Top-k, top-p and min-p."""
    if 0 < params.top_k < scores.size:
        kth = np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k]
        scores = np.where(scores >= kth, scores, np.float32(-np.inf))
    if params.top_p < 1:
        scores = _keep_nucleus(scores, params.top_p)
    if params.min_p > 0:
        floor = scores.max() + np.log(np.float32(params.min_p))
        scores = np.where(scores >= floor, scores, np.float32(-np.inf))
    return scores


def _keep_nucleus(scores: Floats, top_p: float) -> Floats:
    """Top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); ids tied with the last one stay."""
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    # Most ids weigh nothing: sort those that could matter, and all of them only if they do not suffice.
    likely = np.flatnonzero(weights > 1e-6)
    target = top_p * weights.sum()
    if weights[likely].sum() < target:
        likely = np.arange(weights.size)
    ordered = _largest_falling(weights[likely], target)
    last = min(int(np.searchsorted(np.cumsum(ordered), target)), ordered.size - 1)
    return np.where(weights >= ordered[last], scores, np.float32(-np.inf))


def _largest_falling(weights: npt.NDArray[np.float64], target: float) -> npt.NDArray[np.float64]:
    """The largest weights in falling order, as many as reach a sum, or more."""
    # Sorting is most of the sampler's time, and a nucleus mostly small.
    for count in (256, 4096):
        if count < weights.size:
            found: npt.NDArray[np.float64] = np.sort(np.partition(weights, -count)[-count:])[::-1]
            if found.sum() > target * (1 + 1e-9):
                return found
    return np.sort(weights)[::-1]


def gumbel_noise(seed: int, step: int, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Independent standard Gumbel noise for each token id, float64 (n,), from (seed, step, id) alone.

    The uniform numbers come from SplitMix64's finaliser (Steele, Lea & Flood 2014,
    https://doi.org/10.1145/2660193.2660195) on a counter that no two (step, id) of a seed share.
    """
    uniform = (_random_bits(seed, step, ids).astype(np.float64) + 0.5) * 2.0**-53
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def noise_may_reach(seed: int, step: int, ids: Ids, threshold: float) -> npt.NDArray[np.bool_]:
    """Which ids' noise may be at least a threshold, bool (n,); far fewer operations than the noise takes.

    No id is missed; ids whose noise is just below it may be among them.
    """
    least = 2.0**53 * np.exp(-np.exp(min(-threshold, 700.0))) * (1 - 1e-12) - 2
    reaches: npt.NDArray[np.bool_] = _random_bits(seed, step, ids) >= np.uint64(max(least, 0.0))
    return reaches


def _random_bits(seed: int, step: int, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """53 bits for each token id."""
    counter = (np.uint64(step) << np.uint64(32)) | ids.astype(np.uint64)
    key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    return _mix(_mix(counter * _GOLDEN + key) + key) >> np.uint64(11)


# The noise is below this whatever the random number: that of the largest, 1 - 2^-54, is 37.43.
LARGEST_NOISE = 38.0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
