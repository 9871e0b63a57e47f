"""What every kind of adapter has in common: how its base is loaded, the labels it brings, the small files."""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel

from trimserve.errors import MismatchError
from trimserve.files.tensors import TensorSpec
from trimserve.finetune.provenance import PROVENANCE_NAME
from trimserve.folder.names import ADAPTER_CONFIG, COUPLED_CONFIG, SOURCE_TOKENIZER_FILES
from trimserve.model.effective_tokenizer import has_tokenizer
from trimserve.model.source import CONFIG_NAME, INDEX_NAME, ModelSource
from trimserve_export.checkpoint.library import transformers_border
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


def load_base(
    model_class: Any,  # noqa: ANN401
    base: ModelSource,
    config: Any,  # noqa: ANN401
    brought: Collection[str],
    *,
    purpose: str,
    labelled: bool,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, str | None]:
    """Load a base, and tell the first weight that neither it nor its adapter has.

    Args:
        model_class: of transformers.
        base: the checkpoint.
        config: of the model.
        brought: names of the weights that the adapter has.
        purpose: what it is loaded as or for, for messages.
        labelled: the adapter brings the classifier, so that the base's may have another shape.
        trust_remote_code: allow code that the base's folder brings.

    Raises:
        MismatchError: transformers cannot load it.
    """
    with transformers_border(f"cannot load {base.name} {purpose}", error=MismatchError):
        loaded: Any = model_class.from_pretrained(
            base.path,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=labelled,
        )
    model, report = loaded
    made_anew = [name for name in report["missing_keys"] if "pooler" not in name and name not in brought]
    return model, min(made_anew, default=None)


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
