"""Check of what comes out: greedy ids of the folder against the full model's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.decoding.token_rules import TokenRules, Verdict
from trimserve.folder.manifest import Lengths
from trimserve.generation.generator import Generator
from trimserve.generation.options import Mode
from trimserve.generation.plan import PLAIN
from trimserve.loading import load
from trimserve_export.verify.context import Context
from trimserve_export.verify.plain_run import GraphModel, Model
from trimserve_export.verify.result import Check

_PROMPTS = 12
_NEW_TOKENS = 24
# A request drafts so many of its prompt's cold ids for certain; the reference does not model eviction.
_MAX_COLD_IDS = 32


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """One step of the full model: the id it takes, its logits (V,), the head's input (1, 1, H)."""

    token: int
    logits: npt.NDArray[Any]
    hidden: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two sequences part.

    Attributes:
        step: the first differing step.
        gap: the full model's logit of its own id less that of the folder's id.
        allowed: the rounding bound; a gap within it is a tie.
    """

    step: int
    gap: float
    allowed: float


def check_generated_ids(context: Context) -> Check:
    """Generate greedily in each mode of the folder and compare with the full model, step by step.

    Compact mode is compared with the full model's logits masked to the kept ids and the prompt's cold ids,
    exact mode with all of them; what the generation config forces and forbids holds in both. Where the ids
    part, the full model's two logits must lie within the rounding bound: a tie, which is counted and ends
    the comparison of that text.
    """
    model = load(context.folder.path)
    if not isinstance(model, Generator):
        return Check("generated-ids", False, None, f"{context.folder.path} does not load as a generator")
    modes: tuple[Mode, ...] = ("compact", "exact") if model.can_be_exact else ("compact",)
    prompts, lengths = _prompts(context), context.folder.manifest.lengths or Lengths()
    largest, ties = 0.0, 0
    for mode in modes:
        for text, prompt in prompts:
            options: dict[str, Any] = {**PLAIN, "mode": mode, "max_new_tokens": _NEW_TOKENS}
            (generated,) = model.generate(text, **options)
            rules = model.config.rules(_NEW_TOKENS) or TokenRules()
            forbidden = _forbidden(context, prompt, rules, mode)
            expected = _greedy(context.full, prompt, forbidden, rules, model.stop_ids, lengths)
            parting = _parting(context, generated.ids, expected)
            if parting is None:
                continue
            if not parting.gap <= parting.allowed:
                detail = (
                    f"in {mode} mode the ids for {text[:40]!r} part from the full model's at step "
                    f"{parting.step}, where its logits differ by {parting.gap:.3g}"
                )
                return Check("generated-ids", False, parting.gap, detail)
            largest, ties = max(largest, parting.gap), ties + 1
    detail = f"{len(prompts)} prompts x {_NEW_TOKENS} tokens in {' and '.join(modes)} mode, {ties} ties"
    return Check("generated-ids", bool(prompts), largest, detail)


def _prompts(context: Context) -> list[tuple[str, Ids]]:
    """The first texts that are short enough to be fed whole and whose cold ids all fit in the draft."""
    limit = context.max_tokens - _NEW_TOKENS
    found = []
    for text in context.texts:
        ids = context.encode(text)
        if ids is None or not 0 < len(ids) <= limit or not context.trimmed.can_feed(ids):
            continue
        if len(np.unique(_cold(context, ids))) <= _MAX_COLD_IDS:
            found.append((text, ids))
    return found[:_PROMPTS]


def _cold(context: Context, ids: Ids) -> Ids:
    return ids[~context.folder.vocab.head.is_kept(ids)]


def _forbidden(context: Context, prompt: Ids, rules: TokenRules, mode: Mode) -> npt.NDArray[np.bool_]:
    """Ids (V,) that a mode cannot produce: in compact mode the cold ids that come with no request."""
    forbidden = np.zeros(context.folder.vocab.vocab_size, bool)
    if mode == "compact":
        forbidden[context.folder.vocab.head.cold_ids] = True
        forbidden[_cold(context, prompt)] = False
        forbidden[list(rules.forced_bos_token_id)] = False
    return forbidden


def _greedy(
    full: Model,
    prompt: Ids,
    forbidden: npt.NDArray[np.bool_],
    rules: TokenRules,
    stop_ids: frozenset[int],
    lengths: Lengths,
) -> list[CheckedStep]:
    """Decode with the full graph and its KV cache, one token a time; the lowest id wins a tie.

    Where a text is longer than the model's first set of frequencies, some models read it again.
    """
    if isinstance(full, GraphModel):
        decoder, past, start = full, {}, prompt
    else:  # the encoder reads the prompt
        decoder, past, start = full.decoder, full.encoder.run(prompt), np.array([full.start_id], np.int32)
    steps: list[CheckedStep] = []
    ids = start
    while len(steps) < _NEW_TOKENS and not (steps and steps[-1].token in stop_ids):
        outputs = decoder.run(ids, past, keep=1)
        verdict = rules.at(start, np.array([step.token for step in steps], np.int32), prompt)
        logits = _obey(verdict, np.where(forbidden, -np.inf, outputs["logits"][0, -1]))
        steps.append(CheckedStep(int(logits.argmax()), logits, outputs["hidden_states"]))
        ids, past = np.array([steps[-1].token], np.int32), past | outputs
        if lengths.restarts and len(start) + len(steps) - 1 == lengths.unchanged:
            ids, past = np.array([*start, *(step.token for step in steps)], np.int32), {}
    return steps


def _obey(verdict: Verdict, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Logits (V,) with -inf for what the model's rules forbid; a forced token needs none of its own."""
    ids = np.arange(len(logits))
    if verdict.forced.size:
        return np.where(np.isin(ids, verdict.forced), 0, -np.inf)
    return np.where(np.isin(ids, verdict.banned), -np.inf, logits)


def _parting(context: Context, ids: Sequence[int], expected: Sequence[CheckedStep]) -> Parting | None:
    for number, (token, step) in enumerate(zip(ids, expected, strict=False)):
        if token != step.token:
            gap = float(step.logits[step.token]) - float(step.logits[token])
            return Parting(number, gap, context.bound.of(step.hidden))
    if len(ids) != len(expected):
        return Parting(min(len(ids), len(expected)), float("inf"), 0.0)
    return None
