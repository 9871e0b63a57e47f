"""Compact checkpoints: a cut model's `save_pretrained` writes the vocab and `finetune.json` beside them."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.errors import require
from trimserve.finetune.provenance import Provenance, StoredCut, describe_base
from trimserve.folder.manifest import Source
from trimserve.folder.names import VOCAB_NAME
from trimserve.model.resolve import resolve_model
from trimserve.model.source import INDEX_NAME, WEIGHTS_NAME, ModelSource
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export.finetune.ids import MovedIds
from trimserve_export.finetune.live import LiveVocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompactSaver:
    """Stands in for a model's `save_pretrained`: Trainer and accelerate call that, and the user does.

    An object and not a closure, so that the model can still be copied and pickled.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        vocab: VocabMap,
        live: LiveVocab,
        ids: MovedIds,
        base: ModelSource | None,
    ) -> None:
        self._model = model
        self._vocab = vocab
        self._live = live
        self._ids = ids
        self._source = base

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """Save as the model's class does, then what makes the checkpoint restorable."""
        self._ids.refresh()
        type(self._model).save_pretrained(self._model, save_directory, *args, **options)
        self._ids.settle()
        if options.get("is_main_process", args[0] if args else True):
            save_vocab(self._vocab, Path(save_directory) / VOCAB_NAME)
            self._provenance().write(Path(save_directory))

    @cached_property
    def _base(self) -> Source | None:
        # Hashing reads every byte of the base, so once, and not before something is saved.
        return None if self._source is None else describe_base(self._source)

    def _provenance(self) -> Provenance:
        generation = getattr(self._model, "generation_config", None)
        return Provenance(
            base=self._base,
            vocab_size=self._vocab.vocab_size,
            kept=len(self._vocab),
            tensors=tuple(StoredCut(tensor.names, tensor.axis) for tensor in self._live.tensors),
            prefix=self._live.prefix,
            config=self._ids.full_entries(self._model.config),
            generation_config={} if generation is None else self._ids.full_entries(generation),
        )


def find_base(model: "PreTrainedModel", base: str | Path | ModelSource | None) -> ModelSource | None:
    """The files that a model was loaded from.

    Args:
        model: the model, which remembers the name it was loaded by.
        base: the folder or hub id if the caller knows better.

    Returns:
        The files; None if `base` was not given and the model was loaded from none that is at hand.

    Raises:
        UsageError: `base` was given and there is no such model.
    """
    if base is not None:
        return resolve_model(base)
    name = model.name_or_path
    if not name:
        return None
    path = Path(name) if Path(name).is_dir() else _cached(name, getattr(model.config, "_commit_hash", None))
    source = None if path is None else ModelSource(name, None, path)
    return source if source is not None and source.has_weights else None


def _cached(name: str, revision: str | None) -> Path | None:
    """The hub's local snapshot that a model was just loaded from; nothing is fetched."""
    hub = require("huggingface_hub", extra="finetune", purpose="trimserve.finetune")
    files = (hub.try_to_load_from_cache(name, file, revision=revision) for file in (WEIGHTS_NAME, INDEX_NAME))
    return next((Path(file).parent for file in files if isinstance(file, str)), None)
