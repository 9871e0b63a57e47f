"""What a tokenizer.json cannot hold: truncation side, longest text, spaces in decoded text, named tokens."""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
# What transformers writes for "no limit" is 1e30.
NO_LIMIT = 1 << 24


def declared_settings(config: Json, special_tokens: Json) -> dict[str, Any]:
    """What a tokenizer.json cannot hold, as tokenizer_config.json and special_tokens_map.json say it.

    Returns:
        truncation_side, model_max_length (None for no limit), clean_up (of decoded text),
        split_special_tokens, special_tokens (role -> token).
    """
    limit = config.get("model_max_length", config.get("max_len"))
    tokens = {role: content_of(config.get(role) or special_tokens.get(role)) for role in ROLES}
    return {
        "truncation_side": config.get("truncation_side", "right"),
        "model_max_length": int(limit) if isinstance(limit, int | float) and limit < NO_LIMIT else None,
        "clean_up": bool(config.get("clean_up_tokenization_spaces", False)),
        "split_special_tokens": bool(config.get("split_special_tokens", False)),
        "special_tokens": {role: token for role, token in tokens.items() if token},
    }


def content_of(token: str | Json | None) -> str | None:
    """The text of a token that a config names, as a string or with its flags."""
    return token if isinstance(token, str) else token.get("content") if token else None
