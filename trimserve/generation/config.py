"""What a folder's config.json and generation_config.json say about generating."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimserve.arrays import Ids
from trimserve.decoding.logit_edits import LogitEdits
from trimserve.decoding.token_rules import TokenRules, as_ids
from trimserve.errors import MismatchError, UsageError
from trimserve.folder.opening import TrimmedFolder
from trimserve.generation.fields import FIELDS, check_settings, check_values

CONFIG_NAME = "generation_config.json"
# Entries of the model's config that are used as they are; those of `FIELDS` are checked with them.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


class GenerationConfig:
    """The entries that matter here; all ids are token ids.

    Attributes:
        settings: fields of transformers' GenerationConfig that the folder sets, by name.
        stop_ids: ids that end a sequence.
        positions: rows of the model's table of positions, as far as its config says; None for no limit.
        library: major version of the transformers that the folder was exported with.
    """

    def __init__(self, folder: TrimmedFolder) -> None:
        """Read a folder's settings.

        Raises:
            UnsupportedModelError: one of them cannot be honoured; the message names it.
            MismatchError: an id or a length is no number that one can be.
        """
        self._path = folder.path
        self._lengths = folder.manifest.lengths
        config = folder.read_json("config.json")
        generation = folder.read_json(CONFIG_NAME)
        parts = (config.get("text_config") or {}, config, generation)
        self._merged = {name: value for part in parts for name, value in part.items() if value is not None}
        check_numbers(self._merged, str(folder.path))
        exported = folder.manifest.generation or {}
        # As in transformers: config.json is asked only where there is no generation_config.json.
        own = generation if CONFIG_NAME in folder.manifest.files else exported or self._merged
        self.settings: Mapping[str, Any] = {
            name: value for name, value in own.items() if name in FIELDS and value is not None
        }
        check_settings(self.settings, str(folder.path))
        check_values(self.settings, str(folder.path))
        major = str(exported.get("transformers_version", "4")).partition(".")[0]
        if not (major.isascii() and major.isdigit() and len(major) < 4):
            raise MismatchError(
                f"{folder.path}: its manifest names transformers {major!r}, which is no version: export the "
                "folder again."
            )
        self.library = int(major)
        self.positions: int | None = self._merged.get("max_position_embeddings")
        self.stop_ids = frozenset(as_ids(self.settings.get("eos_token_id")))

    @property
    def context(self) -> int | None:
        """Tokens that a decoder can be fed: as many as the model was made for; None for no limit."""
        if self._lengths is not None:
            return self._lengths.longest
        if self._merged.get("alibi"):
            return None
        limits: list[int] = [self._merged[name] for name in _LENGTHS if name in self._merged]
        return limits[0] if limits else None

    def rules(self, max_new_tokens: int, changes: Mapping[str, Any] | None = None) -> TokenRules | None:
        """What is forced and forbidden in an output of so many tokens; `changes` overrides entries."""
        config = {**self.settings, **(changes or {})}
        rules = TokenRules.from_config(config, max_new_tokens, words_from_start=self.words_from_start)
        return rules or None

    def edits(self, changes: Mapping[str, Any] | None = None) -> LogitEdits | None:
        """What else is done to single logits; `changes` overrides entries."""
        config = {**self.settings, **(changes or {})}
        return LogitEdits.from_config(config, words_from_start=self.words_from_start) or None

    @property
    def words_from_start(self) -> bool:
        """See `TokenRules`."""
        return self.library >= 5

    def first_id(self, settings: Mapping[str, Any]) -> Ids:
        """What an empty prompt starts with: bos, or else eos, as transformers does.

        Args:
            settings: the call's own before the folder's.

        Raises:
            UsageError: the model has neither.
        """
        for name in ("bos_token_id", "eos_token_id"):
            for source in (settings, self._merged):
                if found := as_ids(source.get(name)):
                    return np.array(found[:1], np.int32)
        raise UsageError("the prompt is empty and the model has no bos token to start from: give a prompt.")

    def decoder_start(self, token_id: int | None = None) -> Ids:
        """What the decoder of an encoder-decoder starts with, int32 (1,).

        Args:
            token_id: instead of the model's own.

        Raises:
            UsageError: neither is given.
        """
        for source in ({"decoder_start_token_id": token_id}, self.settings, self._merged):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if found := as_ids(source.get(name)):
                    return np.array(found[:1], np.int32)
        raise UsageError(
            f"the configs in {self._path} name no decoder_start_token_id: pass decoder_start_token_id."
        )


def check_numbers(config: Mapping[str, Any], origin: str) -> None:
    """Refuse ids and lengths that are no integers of 32 bits.

    Raises:
        MismatchError: see above.
    """
    for name in (*_IDS, *_LENGTHS):
        value = config.get(name)
        listed = value if isinstance(value, list) and name in _IDS else [value]
        if value is not None and not all(type(one) is int and abs(one) < 1 << 31 for one in listed):
            raise MismatchError(
                f"{origin}: {name} is {str(value)[:40]!r}, which is no token id or number of tokens: export "
                "the folder again."
            )
