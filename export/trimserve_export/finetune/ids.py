"""Token ids in a live model's configs: compact while the model is cut, the original ones afterwards.

What users and transformers write into a config inside the block are token ids (Trainer copies the
tokenizer's special ids there when training begins), so every change is read as one and translated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimserve.errors import UnknownIdError
from trimserve.vocab.map import VocabMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Marian's decoder names the size of the vocab that it shares with the encoder once more.
_SIZES = ("vocab_size", "decoder_vocab_size")


@dataclass(slots=True)
class _Entry:
    """An entry of a config: what it should be in the full model, and what it is in the compact one."""

    config: Any
    key: str
    full: Any
    compact: Any


class MovedIds:
    """The vocab size and the token ids in all configs that a model and its parts hold."""

    def __init__(self, model: "PreTrainedModel", vocab: VocabMap) -> None:
        """Note the entries; nothing is changed before `apply`."""
        self._vocab = vocab
        self._sizes = [
            _Entry(config, key, vocab.vocab_size, len(vocab))
            for config in _configs(model)
            for key in _SIZES
            if getattr(config, key, None) == vocab.vocab_size
        ]
        self._ids = [
            _Entry(config, key, value, _compact(key, value, vocab))
            for config in _configs(model)
            for key, value in vars(config).items()
            if _holds_ids(key)
        ]

    def apply(self) -> None:
        """Write the compact values."""
        for entry in (*self._sizes, *self._ids):
            setattr(entry.config, entry.key, entry.compact)

    def refresh(self) -> None:
        """Translate what was assigned since; a list may mix token ids with the compact ids of before.

        Raises:
            UnknownIdError: a token id was assigned that is not kept.
        """
        for entry in self._ids:
            if self._note_change(entry):
                if _count(entry.compact) != _count(entry.full):
                    raise UnknownIdError(
                        f"{entry.key} was set to token id {entry.full}, which the vocab does not keep: "
                        "select a vocab that keeps it."
                    )
                setattr(entry.config, entry.key, entry.compact)

    def settle(self) -> None:
        """Follow transformers' saving, which moves generation settings from the config to the other one.

        What it moved are compact ids, not token ids that somebody assigned.
        """
        before = {entry.key: (entry.full, entry.compact) for entry in self._ids if entry.compact is not None}
        for entry in self._ids:
            found = getattr(entry.config, entry.key, None)
            full, compact = before.get(entry.key, (None, None))
            if found != entry.compact and found in (compact, None):
                entry.full, entry.compact = (None if found is None else full), found

    def revert(self) -> None:
        """Write the original values back, with what was assigned since."""
        for entry in self._ids:
            self._note_change(entry)
        for entry in (*self._sizes, *self._ids):
            setattr(entry.config, entry.key, entry.full)

    def _note_change(self, entry: _Entry) -> bool:
        found = getattr(entry.config, entry.key, None)
        if found == entry.compact:
            return False
        entry.full = self._token_ids(found, entry.compact)
        entry.compact = _compact(entry.key, entry.full, self._vocab)
        return True

    def full_entries(self, config: Any) -> dict[str, Any]:  # noqa: ANN401 - any class of config
        """What differs in the full model's config.json, with nested configs, as JSON values."""
        own = {
            entry.key: entry.full
            for entry in (*self._sizes, *self._ids)
            if entry.config is config and entry.full != entry.compact
        }
        nested = {key: self.full_entries(part) for key, part in _sub_configs(config)}
        return own | {key: entries for key, entries in nested.items() if entries}

    def _token_ids(self, found: Any, before: Any) -> Any:  # noqa: ANN401 - JSON values
        if not isinstance(found, list):
            return found
        known = before if isinstance(before, list) else [before]
        return [
            int(self._vocab.to_original(entry)) if isinstance(entry, int) and entry in known else entry
            for entry in found
        ]


def _configs(model: "PreTrainedModel") -> Iterator[Any]:
    """Every config object once: parts of a model may hold copies (T5's encoder and decoder do)."""
    import transformers

    held = [module.__dict__.get("config") for module in model.modules()]
    found: list[Any] = [config for config in held if isinstance(config, transformers.PretrainedConfig)]
    found += [part for config in found for _, part in _sub_configs(config)]
    generation = [module.__dict__.get("generation_config") for module in model.modules()]
    found += [config for config in generation if isinstance(config, transformers.GenerationConfig)]
    yield from {id(config): config for config in found}.values()


def _sub_configs(config: Any) -> list[tuple[str, Any]]:  # noqa: ANN401
    names = getattr(config, "sub_configs", {})
    parts = ((name, getattr(config, name, None)) for name in names)
    return [(name, part) for name, part in parts if part is not None]


def _holds_ids(key: str) -> bool:
    from trimserve_export.checkpoint.configs import holds_ids

    return holds_ids(key)


def _compact(key: str, value: Any, vocab: VocabMap) -> Any:  # noqa: ANN401
    from trimserve_export.checkpoint.configs import compact_config

    return compact_config({key: value}, vocab)[key]


def _count(value: Any) -> int:  # noqa: ANN401
    return len(value) if isinstance(value, list) else int(value is not None)
