"""The longest text that an encoder takes."""

from collections.abc import Mapping
from typing import Any

from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.positions import PAD_POSITION_MODELS
from trimserve.folder.sentence import read_settings
from trimserve.folder.tokenizer_settings import NO_LIMIT


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
    positions = usable_positions(config) if lengths is None else lengths.longest
    limits = (limit for limit in (declared, positions) if isinstance(limit, int | float))
    return min((int(limit) for limit in limits if limit < NO_LIMIT), default=None)


def usable_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model's table of positions is enough for; None where the config names no table."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    model_type = config.get("model_type")
    if model_type not in PAD_POSITION_MODELS:
        return positions
    # Positions of these models begin after the pad id, which MPNet takes for 1 whatever it is.
    pad_id = 1 if model_type == "mpnet" else config.get("pad_token_id")
    return positions - (1 if pad_id is None else int(pad_id)) - 1
