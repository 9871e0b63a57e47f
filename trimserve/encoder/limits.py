"""The longest text that an encoder takes."""

from typing import Any

from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.sentence import read_settings
from trimserve.model.structural import PAD_POSITION_MODELS

# What transformers writes for "no limit" is 1e30.
_NO_LIMIT = 1 << 24


def longest_input(folder: TrimmedFolder) -> int | None:
    """Most tokens of one text that an encoder takes; None if there is no limit.

    It is what sentence-transformers takes, or the tokenizer's limit, but never more than the model's
    positions.
    """
    config = folder.read_json("config.json")
    declared: Any = read_settings(folder).max_tokens
    if declared is None:
        declared = folder.tokenizer_settings["model_max_length"]
    lengths = folder.manifest.lengths
    positions = config.get("max_position_embeddings") if lengths is None else lengths.longest
    if positions and config.get("model_type") in PAD_POSITION_MODELS:
        # Positions of these models begin after the pad id.
        pad_id = config.get("pad_token_id")
        positions -= (1 if pad_id is None else pad_id) + 1
    limits = (limit for limit in (declared, positions) if isinstance(limit, int | float))
    return min((int(limit) for limit in limits if limit < _NO_LIMIT), default=None)
