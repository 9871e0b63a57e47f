"""The config.json and generation_config.json that a GGUF file's metadata stands for."""

from typing import Any, Final

import numpy as np

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.gguf import GgufFile
from trimserve.model.gguf.architectures import EMBEDDING, HEAD, Architecture
from trimserve.model.gguf.rope import rope_scaling
from trimserve.model.gguf.tokenizer import GgufTokenizer

Json = dict[str, Any]
# Sizes whose queries are scaled by the width over the heads, as llama.cpp tells them: by their layers.
_BY_WIDTH: Final = {"gemma2": 46, "gemma3": 62}
_LOCAL_THETA: Final = 10_000.0
_PATTERN: Final = 6


def config_of(file: GgufFile, name: str, architecture: Architecture, tokenizer: GgufTokenizer) -> Json:
    """A config.json.

    Args:
        file: the file.
        name: of its architecture.
        architecture: what that is.
        tokenizer: the file's.

    Raises:
        MismatchError: a size is missing or makes no sense.
        UnsupportedModelError: a variant of the architecture that is not read.
    """
    hidden = _size(file, f"{name}.embedding_length")
    heads = _size(file, f"{name}.attention.head_count")
    head_dim = _size(file, f"{name}.attention.key_length", hidden // heads)
    if _size(file, f"{name}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{file.path} has keys and values of different widths, which {architecture.model_class} has not: "
            "pass the model that the file was made from."
        )
    if head_dim % 2:
        raise MismatchError(
            f"{file.path} has heads of {head_dim:,} numbers, an odd count: make the file again."
        )
    rotated = _size(file, f"{name}.rope.dimension_count", head_dim)
    theta = _short(file.number(f"{name}.rope.freq_base", 10_000.0))
    if theta <= 0:
        raise MismatchError(f"{file.path}: {name}.rope.freq_base is {theta}: make the file again.")
    ends = tokenizer.end_ids
    config: Json = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": _size(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _size(file, f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _size(file, f"{name}.context_length"),
        "rms_norm_eps": _short(file.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "vocab_size": _rows(file, hidden, tokenizer),
        "tie_word_embeddings": HEAD not in file.tensors,
        "bos_token_id": tokenizer.special_id("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.special_id("padding"),
        "torch_dtype": "float32",
        **dict(architecture.settings),
    }
    if (scaling := rope_scaling(file, name, theta, rotated)) is not None:
        config["rope_scaling"] = scaling
    if architecture.may_have_biases:
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if rotated != head_dim and name != "phi3":
        raise UnsupportedModelError(
            f"{file.path} rotates {rotated} of {head_dim} numbers of a head, which "
            f"{architecture.model_class} does not: pass the model that the file was made from."
        )
    return config | _OWN.get(name, _nothing)(file, config, rotated)


def generation_of(tokenizer: GgufTokenizer) -> Json:
    """A generation_config.json: where answers end."""
    ends, pad = tokenizer.end_ids, tokenizer.special_id("padding")
    ids = {"bos_token_id": tokenizer.special_id("bos"), "eos_token_id": ends or None, "pad_token_id": pad}
    return {name: id_ for name, id_ in ids.items() if id_ is not None}


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    values = file.metadata.get(key)
    if isinstance(values, np.ndarray) and len(values) and values.dtype.kind in "iu":  # one for each layer
        if len(np.unique(values)) > 1:
            raise UnsupportedModelError(
                f"{file.path}: {key} differs from layer to layer, which trimserve does not read from GGUF: "
                "pass the model that the file was made from."
            )
        found = int(values[0])
    else:
        found = file.integer(key, default)
    if not 0 < found < 1 << 31:
        raise MismatchError(f"{file.path}: {key} is {found:,}, which no model has: make the file again.")
    return found


def _short(value: float) -> float:
    """A float32 as the shortest number that it is the nearest one of: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rows(file: GgufFile, hidden: int, tokenizer: GgufTokenizer) -> int:
    tensor = file.tensors.get(EMBEDDING)
    if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != hidden:
        found = "none" if tensor is None else " x ".join(map(str, tensor.shape))
        raise MismatchError(f"{file.path} should have {EMBEDDING} of width {hidden:,}, found {found}.")
    if len(tokenizer.tokens) > tensor.shape[0]:
        raise MismatchError(
            f"{file.path} has {len(tokenizer.tokens):,} tokens and {tensor.shape[0]:,} rows for them: make "
            "the file again."
        )
    return tensor.shape[0]


def _nothing(file: GgufFile, config: Json, rotated: int) -> Json:
    del file, config, rotated
    return {}


def _gemma2(file: GgufFile, config: Json, rotated: int) -> Json:
    del rotated
    return {
        "query_pre_attn_scalar": _query_scale(config, "gemma2"),
        "attn_logit_softcapping": file.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("gemma2.final_logit_softcapping", 30.0),
        "sliding_window": file.integer("gemma2.attention.sliding_window", 4096),
    }


def _gemma3(file: GgufFile, config: Json, rotated: int) -> Json:
    del rotated
    capped = "gemma3.final_logit_softcapping"
    pattern = _PATTERN
    if isinstance(file.metadata.get("gemma3.attention.sliding_window_pattern"), int):
        pattern = _size(file, "gemma3.attention.sliding_window_pattern")
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "query_pre_attn_scalar": _query_scale(config, "gemma3"),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.number(capped) if capped in file.metadata else None,
        "sliding_window": file.integer("gemma3.attention.sliding_window", 1024),
        "layer_types": ["sliding_attention" if layer % pattern else "full_attention" for layer in layers],
        "rope_local_base_freq": _short(file.number("gemma3.rope.freq_base_swa", _LOCAL_THETA)),
    }


def _query_scale(config: Json, name: str) -> int:
    by_width: bool = config["num_hidden_layers"] == _BY_WIDTH[name]
    width: int = config["hidden_size"] // config["num_attention_heads"]
    return width if by_width else int(config["head_dim"])


def _phi3(file: GgufFile, config: Json, rotated: int) -> Json:
    original = "phi3.rope.scaling.original_context_length"
    return {
        "partial_rotary_factor": rotated / config["head_dim"],
        "sliding_window": file.integer("phi3.attention.sliding_window", 0) or None,
        "original_max_position_embeddings": file.integer(original, config["max_position_embeddings"]),
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


_OWN: Final = {"gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3}
