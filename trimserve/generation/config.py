"""What a folder's config.json and generation_config.json say about generating."""

from typing import Any

import numpy as np

from trimserve.arrays import Ids
from trimserve.decoding.token_rules import TokenRules, as_ids
from trimserve.errors import UsageError
from trimserve.folder.opening import TrimmedFolder


class GenerationConfig:
    """The entries that matter here; all ids are token ids.

    Attributes:
        stop_ids: ids that end a sequence.
        positions: rows of the model's table of positions, as far as its config says; None for no limit.
    """

    def __init__(self, folder: TrimmedFolder) -> None:
        self._path = folder.path
        config = folder.read_json("config.json")
        generation = folder.read_json("generation_config.json")
        parts = (config.get("text_config", {}), config, generation)
        self._merged = {name: value for part in parts for name, value in part.items() if value is not None}
        # As in transformers, which reads rules from the model's config only if it has no other.
        self._rules = generation or config
        self.positions: int | None = self._merged.get("max_position_embeddings")
        self.stop_ids = frozenset(as_ids(self._merged.get("eos_token_id")))

    @property
    def context(self) -> int | None:
        """Tokens that a decoder can be fed; None where positions are computed (rotary) and never end."""
        if any(name.startswith(("rope", "rotary")) for name in self._merged):
            return None
        limit: int | None = self._merged.get("max_position_embeddings", self._merged.get("n_positions"))
        return limit

    def rules(self, max_new_tokens: int, **changes: int) -> TokenRules | None:
        """What is forced and forbidden in an output of so many tokens; `changes` overrides entries."""
        config: dict[str, Any] = self._rules | {"eos_token_id": sorted(self.stop_ids)} | changes
        return TokenRules.from_config(config, max_new_tokens) or None

    def first_id(self) -> Ids:
        """What an empty prompt starts with: bos, or else eos, as transformers does.

        Raises:
            UsageError: the model has neither.
        """
        for name in ("bos_token_id", "eos_token_id"):
            if found := as_ids(self._merged.get(name)):
                return np.array(found[:1], np.int32)
        raise UsageError("the prompt is empty and the model has no bos token to start from: give a prompt.")

    def decoder_start(self, token_id: int | None = None) -> Ids:
        """What the decoder of an encoder-decoder starts with, int32 (1,).

        Args:
            token_id: instead of the model's own.

        Raises:
            UsageError: neither is given.
        """
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = as_ids(token_id) or as_ids(self._merged.get(name))
            if found:
                return np.array(found[:1], np.int32)
        raise UsageError(
            f"the configs in {self._path} name no decoder_start_token_id: pass decoder_start_token_id."
        )
