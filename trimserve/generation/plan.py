"""What a call of `generate` does: the folder's generation settings, overridden by the call's arguments."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from trimserve.arguments import read_options
from trimserve.decoding.beam import BeamParams
from trimserve.decoding.logit_edits import read_sequence_bias
from trimserve.decoding.sampling import SamplingParams
from trimserve.decoding.token_rules import as_ids
from trimserve.errors import UsageError
from trimserve.exact.draft_length import LONGEST_DRAFT
from trimserve.generation.config import GenerationConfig
from trimserve.generation.fields import LIBRARY_TOP_K
from trimserve.generation.options import GenerationOptions, Mode

# Tokens where neither the folder nor the caller names a length (transformers would stop after 20).
DEFAULT_NEW_TOKENS = 128
# Below it, float32 logits of usual size differ by less than their noise, or overflow.
LEAST_TEMPERATURE = 1e-6
# transformers 4 cannot tell its default of max_length from this very number in a file: new tokens, then.
_OLD_DEFAULT_LENGTH = 20
# Overrides that leave nothing of the folder's settings but its bans, its forced ids and its ends: the largest
# logit that is allowed.
PLAIN: Final[Mapping[str, Any]] = {
    "temperature": 0.0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": False,
    "stop_strings": (),
}
_FILTERS = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Of the call alone: no generation config has them.
_OURS = ("presence_penalty", "frequency_penalty", "logit_bias", "logits_processor", "seed")
# What only a search with beams reads, and what only exact mode's drafts do.
_OF_BEAMS = ("length_penalty", "early_stopping")
_OF_EXACT = ("max_block", "certify")
# Of two that say one thing, the second would be ignored.
_RIVALS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
_ID_OPTIONS = (
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("eos_token_id", "bos_token_id", "decoder_start_token_id"),
)


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """How one call generates.

    Attributes:
        config: the folder's.
        settings: its fields, with the call's in their place.
        params: how a token is chosen, without rules: these know the length of the prompt.
        beams: how beams are kept; None without them.
        max_new_tokens: most tokens of the output; None where `max_length` says it.
        max_length: most tokens of prompt and output.
        stop_ids: ids that end a sequence.
        stop: strings of the text that end it.
        stop_strings: strings of the tokens that end it, special tokens and the prompt's end included.
        mode: exact or compact.
        certify: let exact mode prove what it can without the cold rows.
        text_drafts: feed what followed in the text before, where that pays.
        max_block: most tokens drafted before a check.
        report_mass: measure what compact mode cannot produce.
    """

    config: GenerationConfig
    settings: Mapping[str, Any]
    params: SamplingParams
    beams: BeamParams | None
    max_new_tokens: int | None
    max_length: int | None
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    stop_strings: tuple[str, ...]
    mode: Mode
    certify: bool
    text_drafts: bool
    max_block: int
    report_mass: bool

    def limit(self, prompt_tokens: int) -> int:
        """Most tokens after a prompt of so many.

        Raises:
            UsageError: `max_length` leaves none.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        length = self.max_length or 0
        if length <= prompt_tokens:
            raise UsageError(
                f"the prompt has {prompt_tokens:,} tokens and max_length is {length:,}, prompt included: "
                "raise it, or pass max_new_tokens."
            )
        return length - prompt_tokens

    def params_for(self, limit: int) -> SamplingParams:
        """How tokens are chosen in an output of at most so many."""
        rules = self.config.rules(limit, self.settings)
        return replace(self.params, rules=rules, edits=self.config.edits(self.settings))


def make_plan(
    config: GenerationConfig, options: Mapping[str, Any], vocab_size: int, *, can_be_exact: bool
) -> GenerationPlan:
    """Settle what a call does.

    Args:
        config: the folder's.
        options: the call's arguments; None stands for the folder's own value.
        vocab_size: V.
        can_be_exact: whether exact mode is the default.

    Raises:
        UsageError: an unknown option, one out of range, or options that do not go together.
    """
    options = read_options(options, GenerationOptions, "generate")
    given = {name: value for name, value in options.items() if value is not None}
    settings = {**config.settings, **given}
    _check_together(given)
    _check_temperature(settings)
    _check_own_ids(given, vocab_size)
    _check_ids(settings, vocab_size)
    params = _params(config.settings, given)
    beams = _beams(settings, params)
    stop, stop_strings = (_strings(settings.get(name)) for name in ("stop", "stop_strings"))
    if beams is not None:
        for name, value in (("stop", stop), ("stop_strings", stop_strings)):
            if value:
                raise UsageError(f"{name} means nothing to a beam search: leave it out, or use num_beams=1.")
    elif (ignored := _first(_OF_BEAMS, given)) and "num_beams" not in given:
        raise UsageError(
            f"{ignored} is about beams, and this call has none: pass num_beams, or leave it out."
        )
    tokens, length = _lengths(config, given)
    stop_ids = frozenset(as_ids(settings.get("eos_token_id")))
    mode: Mode = given.get("mode") or ("exact" if can_be_exact else "compact")
    report_mass = bool(given.get("report_mass"))
    max_block = given.get("max_block", LONGEST_DRAFT)
    _check_mode(mode, report_mass=report_mass, with_beams=beams is not None)
    ignored = _first(_OF_EXACT, given)
    if beams is not None and given.get("text_drafts"):
        raise UsageError("text_drafts means nothing to a beam search: leave it out, or use num_beams=1.")
    if ignored and (mode == "compact" or beams is not None):
        raise UsageError(
            f"{ignored} is about the drafts of exact mode, and this call makes none: leave it out."
        )
    return GenerationPlan(
        config=config,
        settings=settings,
        params=params,
        beams=beams,
        max_new_tokens=tokens,
        max_length=length,
        stop_ids=stop_ids,
        stop=stop,
        stop_strings=stop_strings,
        mode=mode,
        certify=given.get("certify", True),
        text_drafts=given.get("text_drafts", False),
        max_block=max_block,
        report_mass=report_mass,
    )


def _first(names: Iterable[str], given: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in given), None)


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse options of a call of which one would be ignored."""
    for first, second in _RIVALS:
        if first in given and second in given:
            raise UsageError(f"{first} and {second} limit the same: give one of them.")


def _check_temperature(settings: Mapping[str, Any]) -> None:
    if 0 < settings.get("temperature", 1.0) < LEAST_TEMPERATURE:
        raise UsageError(
            f"temperature should be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, found "
            f"{settings['temperature']:g}: logits divided by it have no digits left."
        )


def _check_own_ids(given: Mapping[str, Any], vocab_size: int) -> None:
    """Refuse ids of the call's own that the model does not have."""
    named: dict[str, Iterable[int]] = {name: as_ids(given.get(name)) for name in _ID_OPTIONS}
    named["logit_bias"] = given.get("logit_bias", ())
    _check_range(named, vocab_size)


def _check_mode(mode: Mode, *, report_mass: bool, with_beams: bool) -> None:
    if report_mass and with_beams:
        raise UsageError("report_mass means nothing to a beam search: leave it out, or use num_beams=1.")
    if report_mass and mode == "exact":
        raise UsageError(
            "report_mass tells what compact mode gives up, and exact mode gives up nothing: leave it "
            "out, or choose compact mode."
        )


def _params(folder: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Greedy or sampled, and how; rules apart."""
    settings = {**folder, **given}
    # transformers' own default, where it is told to sample. A temperature alone, which would leave it greedy,
    # samples from the whole distribution as far as nobody names a filter.
    top_k = {"top_k": LIBRARY_TOP_K} if settings.get("do_sample") else {}
    samples = given.get("do_sample")
    if samples is None:
        samples = given["temperature"] > 0 if "temperature" in given else folder.get("do_sample", False)
    temperature = settings.get("temperature", 1.0)
    chosen = {name: settings[name] for name in ("repetition_penalty", *_OURS) if name in settings}
    filters = {name: settings[name] for name in _FILTERS if name in settings}
    if samples and temperature > 0:
        return SamplingParams(temperature=temperature, **{**top_k, **filters}, **chosen)
    ignored = [name for name in _FILTERS if name in given]
    if ignored and not {"temperature", "do_sample"} & given.keys():
        raise UsageError(
            f"{ignored[0]} is about sampling, and this folder is greedy: pass temperature or do_sample."
        )
    # Checked all the same.
    return replace(SamplingParams(**{"temperature": temperature, **filters}, **chosen), temperature=0.0)


def _beams(settings: Mapping[str, Any], params: SamplingParams) -> BeamParams | None:
    names = ("num_beams", "length_penalty", "early_stopping", "renormalize_logits")
    named = {name: settings[name] for name in names if name in settings}
    beams = BeamParams(**named, do_sample=params.temperature > 0)
    return None if beams.num_beams == 1 else beams


def _lengths(config: GenerationConfig, given: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The most new tokens, or the most tokens in all."""
    for source in (given, config.settings):
        if "max_new_tokens" in source:
            return int(source["max_new_tokens"]), None
        if "max_length" in source:
            length = int(source["max_length"])
            if source is not given and length == _OLD_DEFAULT_LENGTH and config.library < 5:
                return length, None
            return None, length
    return DEFAULT_NEW_TOKENS, None


def _check_ids(settings: Mapping[str, Any], vocab_size: int) -> None:
    """Refuse ids that the model does not have, where transformers does, too."""
    named: dict[str, Iterable[int]] = {
        "bad_words_ids": [i for word in settings.get("bad_words_ids") or () for i in as_ids(word)],
        "sequence_bias": [i for ids, _ in read_sequence_bias(settings.get("sequence_bias")) for i in ids],
        "forced_bos_token_id": as_ids(settings.get("forced_bos_token_id")),
        "forced_eos_token_id": as_ids(settings.get("forced_eos_token_id")),
    }
    _check_range(named, vocab_size)


def _check_range(named: Mapping[str, Iterable[int]], vocab_size: int) -> None:
    for name, ids in named.items():
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise UsageError(
                    f"{name} holds the id {token_id:,}, but ids go from 0 to {vocab_size - 1:,}."
                )


def _strings(value: object) -> tuple[str, ...]:
    """One string, several or none."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else ()
