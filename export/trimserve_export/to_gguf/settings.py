"""A config of transformers as a GGUF file's metadata, and what of it llama.cpp has no place for."""

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimserve.errors import UnsupportedModelError
from trimserve.model.gguf.architectures import ARCHITECTURES, Architecture

Json = dict[str, Any]
# What says nothing about the numbers that a model computes, or is compared elsewhere.
# fmt: off
_IGNORED: Final = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "hidden_act",
    "id2label",
    "initializer_range", "is_decoder", "label2id", "layer_types", "max_window_layers", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "resid_pdrop", "return_dict", "rope_parameters", "rope_scaling", "rope_theta",
    "sep_token_id", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})
# fmt: on
_PLAIN: Final = {"llama": ("mistral",)}
_INSTEAD: Final = "use --to safetensors, or another layout."


def architecture_for(config: PretrainedConfig, origin: str) -> tuple[str, Architecture]:
    """llama.cpp's architecture of a model, by its name.

    Raises:
        UnsupportedModelError: none that is written here.
    """
    for name, architecture in ARCHITECTURES.items():
        if config.model_type in (architecture.model_type, *_PLAIN.get(name, ())):
            return name, architecture
    known = ", ".join(architecture.model_type for architecture in ARCHITECTURES.values())
    raise UnsupportedModelError(
        f"{origin} is of the model type {config.model_type!r}, and --to gguf writes {known}, mistral: "
        f"{_INSTEAD}"
    )


def settings_of(config: PretrainedConfig, name: str) -> Json:
    """The sizes and settings of a model, by llama.cpp's keys.

    Args:
        config: of the language model, for the compact vocab.
        name: of its architecture.
    """
    head_dim = head_width(config)
    rope, local = _ropes(config)
    found: Json = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling(rope, config),
    }
    if name in ("gemma2", "gemma3"):
        found["attention.sliding_window"] = config.sliding_window
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key, None) is not None:
                found[key] = float(getattr(config, key))
    if name == "gemma3":
        found["attention.sliding_window_pattern"] = _pattern(config)
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if name == "phi3":
        found["attention.sliding_window"] = config.sliding_window or 0
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return {f"{name}.{key}": value for key, value in found.items()}


def head_width(config: PretrainedConfig) -> int:
    """Numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_tensors(config: PretrainedConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors in which llama.cpp has factors of rotary frequencies."""
    rope, _ = _ropes(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        width = head_width(config)
        plain = rope["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
        return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def _ropes(config: PretrainedConfig) -> tuple[Json, Json]:
    """The rotary settings of the model and those of its sliding windows, as transformers 5 names them."""
    found = getattr(config, "rope_parameters", None)
    if found is None:  # transformers 4
        scaling = getattr(config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        own = {"rope_theta": config.rope_theta, **scaling, "rope_type": kind}
        if (rotated := getattr(config, "partial_rotary_factor", None)) is not None:
            own["partial_rotary_factor"] = rotated
        return own, own | {"rope_theta": getattr(config, "rope_local_base_freq", config.rope_theta)}
    return found.get("full_attention", found), found.get("sliding_attention", found)


def _scaling(rope: Json, config: PretrainedConfig) -> Json:
    kind = rope.get("rope_type", "default")
    original: Any = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if kind in ("default", "llama3"):
        return {}
    if kind == "longrope":
        factor = config.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return found | ({"rope.scaling.original_context_length": original} if kind == "yarn" else {})


def _pattern(config: PretrainedConfig) -> int:
    """Every how many layers one sees the whole text."""
    kinds: list[str] = list(config.layer_types)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def check_settings(config: PretrainedConfig, written: PretrainedConfig, origin: str) -> None:
    """Compare a config with the one that was read of the file again.

    Raises:
        UnsupportedModelError: llama.cpp would compute another model; the message names the setting.
    """
    for key, wanted, found in _differences(config, written):
        raise UnsupportedModelError(
            f"{origin} has {key} = {str(wanted)[:80]}, which llama.cpp would take for {str(found)[:80]}: "
            f"{_INSTEAD}"
        )


def _differences(config: PretrainedConfig, written: PretrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    mine, theirs = config.to_dict(), written.to_dict()
    for key, wanted in mine.items():
        if key in _IGNORED or (key not in theirs and not wanted):
            continue
        if key == "sliding_window" and (wanted or math.inf) >= config.max_position_embeddings:
            continue  # as wide as any text
        found: Any
        if key == "head_dim":
            wanted, found = head_width(config), head_width(written)
        else:
            found = theirs.get(key)
        if not _is_same(wanted, found):
            yield key, wanted, found
    yield from _rope_differences(config, written)
    for key in ("layer_types", "hidden_act", "hidden_activation"):
        wanted = getattr(config, key, None)
        if wanted is not None and hasattr(written, key) and getattr(written, key) != wanted:
            yield key, wanted, getattr(written, key)


def _rope_differences(config: PretrainedConfig, written: PretrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    for mine, theirs in zip(_ropes(config), _ropes(written), strict=True):
        for key, wanted in mine.items():
            found = theirs.get(key, {"factor": None}.get(key))
            longrope = mine.get("rope_type") == "longrope" and key in ("factor", "type", "attention_factor")
            if wanted is not None and not longrope and not _is_same(wanted, found):
                yield f"{key} of its rotary embeddings", wanted, found


def _is_same(wanted: object, found: object) -> bool:
    """Whether two settings are the same as far as a float32 tells."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_is_same, wanted, found))
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=1e-6)
    return wanted == found
