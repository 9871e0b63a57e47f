"""Rewrite a model's configs for the compact vocab: vocab_size and every token id in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from transformers import PretrainedConfig

from trimserve.errors import UnsupportedModelError
from trimserve.files.model_json import read_model_json
from trimserve.vocab.map import VocabMap

# What a JSON entry holds.
Json: TypeAlias = Any

# The rows of per-layer embeddings (Gemma 3n, Gemma 4).
PER_LAYER_KEY: Final = "vocab_size_per_layer_input"
# Keys that hold token ids without saying so by their ending.
_FLAT_KEYS = frozenset({"suppress_tokens", "begin_suppress_tokens", "image_token_index"})
_PHRASE_KEYS = frozenset({"bad_words_ids", "force_words_ids"})  # lists of token sequences
_WEIGHT_KEYS = frozenset({"sequence_bias"})  # lists of [token sequence, weight]
_POSITION_KEYS = frozenset({"forced_decoder_ids"})  # lists of [position, token id]


def compact_config(config: dict[str, Any], vocab: VocabMap) -> dict[str, Any]:
    """Return a copy of a config with every token id in it moved to its compact id.

    Ids are ints, lists and nested lists, also in a nested config. One without a compact row becomes None,
    or leaves its list: the graph never sees it. A sequence with such an id leaves its list as a whole.

    Args:
        config: the content of config.json or generation_config.json.
        vocab: the kept ids.
    """
    return {key: _compact_entry(key, value, vocab) for key, value in config.items()}


def _compact_entry(key: str, value: Json, vocab: VocabMap) -> Json:
    if isinstance(value, dict) and key.endswith("_config"):
        return compact_config(value, vocab)
    if key in _PHRASE_KEYS and value:
        phrases = [(phrase, _compact_ids(phrase, vocab)) for phrase in value]
        return [compact for phrase, compact in phrases if len(compact) == len(phrase)] or None
    if key in _WEIGHT_KEYS and value:
        weighted = [(ids, _compact_ids(ids, vocab), weight) for ids, weight in value]
        return [[compact, weight] for ids, compact, weight in weighted if len(compact) == len(ids)] or None
    if key in _POSITION_KEYS and value:
        pairs = [[position, _compact_ids(token_id, vocab)] for position, token_id in value]
        return [pair for pair in pairs if pair[1] is not None] or None
    if is_id_key(key):
        return _compact_ids(value, vocab)
    return value


def is_id_key(key: str) -> bool:
    """Tell whether a config entry of this name holds a token id or a list of them."""
    return key.endswith(("_token_id", "_token_ids")) or key in _FLAT_KEYS


def holds_ids(key: str) -> bool:
    """Tell whether `compact_config` translates a config entry of this name, whatever its form."""
    return is_id_key(key) or key in _PHRASE_KEYS | _WEIGHT_KEYS | _POSITION_KEYS


def _compact_ids(value: Json, vocab: VocabMap) -> Json:
    if isinstance(value, list):
        mapped = [_compact_ids(entry, vocab) for entry in value]
        return [entry for entry in mapped if entry is not None]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value  # None, and the -1 that some configs use for "no such token"
    row = int(np.searchsorted(vocab.kept_ids, value))
    kept = row < len(vocab) and int(vocab.kept_ids[row]) == value
    return row if kept else None


def write_compact_configs(source: Path, target: Path, config: PretrainedConfig, vocab: VocabMap) -> None:
    """Write config.json and generation_config.json for the compact vocab.

    Args:
        source: the model folder.
        target: the folder to write into.
        config: the source's config as transformers fills it: a token id that config.json leaves to its
            class's default has to move too, and so has a vocab_size that a nested config leaves out.
        vocab: the kept ids.
    """
    stored = read_model_json(source / "config.json")
    compact = compact_config(dict(_default_ids(config)) | stored, vocab)
    section = _text_section(compact, config)
    section["vocab_size"] = len(vocab)
    if PER_LAYER_KEY in config.get_text_config().to_dict():
        section[PER_LAYER_KEY] = compact_rows(getattr(config.get_text_config(), PER_LAYER_KEY), vocab)
    _write_json(target / "config.json", compact)
    generation = source / "generation_config.json"
    if generation.is_file():
        _write_json(target / generation.name, compact_config(read_model_json(generation), vocab))


def compact_rows(rows: int, vocab: VocabMap) -> int:
    """How many of a table's first `rows` rows are kept.

    Raises:
        UnsupportedModelError: ids beyond the table read its first row, which is not kept.
    """
    if rows < vocab.vocab_size and vocab.kept_ids[0] != 0:
        raise UnsupportedModelError(
            f"ids beyond the {rows:,} rows of the per-layer embeddings read the first row, which "
            "this vocab does not keep: select with --keep-ids 0."
        )
    return int(np.searchsorted(vocab.kept_ids, rows))


def _default_ids(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in config.to_dict().items() if is_id_key(key) and value is not None)


def _text_section(stored: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The part of config.json that describes the language model, as `get_text_config` finds it."""
    if config.get_text_config() is config:
        return stored
    key = next(name for name in config.sub_configs if getattr(config, name) is config.get_text_config())
    section: dict[str, Any] = stored.setdefault(key, {})
    return section


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
