"""Every field of transformers' GenerationConfig, and what this runtime makes of it.

One table for both major versions of transformers (4.57 and 5). A field is *honoured*, *irrelevant* to the ids
that come out, or *refused* if it is set to anything but its "off" values: a setting that would be ignored
silently does not exist. A test goes through the fields of the installed transformers, so that a new one
shows up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from trimserve.arguments import option_kinds, read_value
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.generation.options import GenerationOptions

Role = Literal["honoured", "irrelevant", "refused"]


@dataclass(frozen=True, slots=True)
class Field:
    """What is made of one field.

    Attributes:
        role: see `Role`.
        off: values that mean nothing, None apart: those of a refused field that are let through.
    """

    role: Role
    off: tuple[Any, ...] = ()


def _fields(role: Role, names: str) -> dict[str, Field]:
    return {name: Field(role) for name in names.split()}


FIELDS: Final[dict[str, Field]] = {
    # How long, and what ends it.
    **_fields("honoured", "max_length max_new_tokens min_length min_new_tokens eos_token_id stop_strings"),
    # What it starts from.
    **_fields("honoured", "bos_token_id decoder_start_token_id"),
    # What is forced, forbidden, favoured.
    **_fields("honoured", "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens"),
    **_fields("honoured", "bad_words_ids sequence_bias no_repeat_ngram_size encoder_no_repeat_ngram_size"),
    **_fields("honoured", "repetition_penalty encoder_repetition_penalty exponential_decay_length_penalty"),
    **_fields("honoured", "remove_invalid_values renormalize_logits"),
    # Sampling and beams.
    **_fields(
        "honoured", "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"
    ),
    **_fields("honoured", "num_beams length_penalty early_stopping"),
    # Of batches, outputs, caches and compilers: other bytes or times, the same ids.
    **_fields("irrelevant", "pad_token_id transformers_version output_attentions output_hidden_states"),
    **_fields(
        "irrelevant", "output_scores output_logits return_dict_in_generate use_cache return_legacy_cache"
    ),
    **_fields("irrelevant", "max_cache_len prefill_chunk_size compile_config disable_compile low_memory"),
    **_fields("irrelevant", "continuous_batching_config"),
    # Drafting: the ids of greedy decoding and the distribution of sampling stay as they are without it.
    **_fields("irrelevant", "use_mtp prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit"),
    **_fields("irrelevant", "num_assistant_tokens num_assistant_tokens_schedule assistant_lookbehind"),
    **_fields("irrelevant", "target_lookbehind assistant_confidence_threshold speculation_type"),
    # Another model, another search, another text.
    "guidance_scale": Field("refused", (1, 1.0)),
    "watermarking_config": Field("refused"),
    "token_healing": Field("refused", (False,)),
    "penalty_alpha": Field("refused", (0, 0.0)),
    "dola_layers": Field("refused"),
    "num_beam_groups": Field("refused", (1,)),
    "diversity_penalty": Field("refused", (0, 0.0)),
    "constraints": Field("refused", ([],)),
    "force_words_ids": Field("refused", ([],)),
    "num_return_sequences": Field("refused", (1,)),
    "max_time": Field("refused"),
    "is_assistant": Field("refused", (False,)),
    "assistant_ensemble_weight": Field("refused"),
    # Quantised keys and values give other numbers; every other cache is one of memory and time.
    "cache_implementation": Field(
        "refused",
        (
            *("dynamic", "dynamic_full", "hybrid", "hybrid_chunked", "static", "sliding_window", "paged"),
            *("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"),
        ),
    ),
    "cache_config": Field("refused", ({},)),
}
# What transformers takes where nothing names a value, as far as that is not "off".
LIBRARY_TOP_K: Final = 50


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what cannot be honoured.

    Args:
        settings: of a generation config; fields that transformers does not know are those that it ignores.
        where: the file or folder, for the message.

    Raises:
        UnsupportedModelError: a field is set to what this runtime does not do; the message names it.
    """
    for name, value in settings.items():
        field = FIELDS.get(name)
        if field is not None and field.role == "refused" and value is not None and value not in field.off:
            raise UnsupportedModelError(_refusal(where, f"{name} = {value!r}"))
    if (settings.get("num_beams") or 1) > 1 and settings.get("stop_strings"):
        raise UnsupportedModelError(_refusal(where, "stop_strings together with num_beams"))


def check_values(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a setting that is not what the option of its name should be.

    Args:
        settings: of a generation config.
        where: the file or folder, for the message.

    Raises:
        MismatchError: one is of another type, or out of range; the message names it.
    """
    for name, kind in option_kinds(GenerationOptions).items():
        if settings.get(name) is not None:
            try:
                read_value(name, settings[name], kind)
            except UsageError as error:
                raise MismatchError(
                    f"the generation settings of {where} are not sound, {str(error).rstrip('.')}: mend "
                    "generation_config.json (or config.json) and export again."
                ) from error


def _refusal(where: str, what: str) -> str:
    return (
        f"{where} sets {what}, which trimserve does not do, so its output would not be the model's: take "
        "that out of generation_config.json (or config.json) and export again."
    )
