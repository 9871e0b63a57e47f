"""What merging has in common for every kind of adapter: the small files, and how many labels it brings."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trimserve.files.tensors import TensorSpec
from trimserve.finetune.provenance import PROVENANCE_NAME
from trimserve.folder.names import ADAPTER_CONFIG, COUPLED_CONFIG, SOURCE_TOKENIZER_FILES
from trimserve.model.effective_tokenizer import has_tokenizer
from trimserve.model.source import CONFIG_NAME, INDEX_NAME
from trimserve_export.checkpoint.source_tokenizer import TEMPLATE_FILES

_CLASSIFIER: Final = re.compile(r"(classifier|score|out_proj)\.weight$")
_SMALL: Final = (".json", ".jinja", ".txt", ".model")
_NOT_COPIED: Final = (
    CONFIG_NAME,
    INDEX_NAME,
    ADAPTER_CONFIG,
    COUPLED_CONFIG,
    PROVENANCE_NAME,
    "trainer_state.json",
)


def set_labels(config: Any, stored: Mapping[str, TensorSpec]) -> bool:  # noqa: ANN401
    """Give a config as many labels as the classifier that an adapter brings; whether it brings one."""
    labels = [spec.shape[0] for name, spec in stored.items() if _CLASSIFIER.search(name)]
    if labels and config.num_labels != labels[-1]:
        config.num_labels = labels[-1]
    return bool(labels)


def copy_small_files(base: Path, adapter: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config, and the modules of sentence-transformers.

    A tokenizer is one thing: no file of the base's is left beside the adapter's own.
    """
    replaced = (*SOURCE_TOKENIZER_FILES, *TEMPLATE_FILES) if has_tokenizer(adapter) else ()
    _copy(base, target, replaced)
    _copy(adapter, target, ())


def _copy(folder: Path, target: Path, left_out: tuple[str, ...]) -> None:
    for path in sorted([*folder.iterdir(), *folder.glob("*/config.json")]):
        if (
            path.is_file()
            and path.suffix in _SMALL
            and not (path.parent == folder and path.name in (*_NOT_COPIED, *left_out))
        ):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
