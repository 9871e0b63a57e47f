"""Copy what sentence-transformers reads of a folder beside its model."""

import json
import shutil
from pathlib import Path

from trimserve.files.checked_json import read_json
from trimserve.folder.sentence import write_settings
from trimserve.model.sentence import MODULES_NAME, PROMPTS_NAME, TRANSFORMER_CONFIGS
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.sentence_config import Declared
from trimserve_export.checkpoint.sentence_modules import is_sentence_transformers, list_modules

_PART_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def write_declared(source: ModelSource, declared: Declared | None, folder: Path, layout: str) -> None:
    """Write what a folder declares around its model, for the runtime that a layout is for.

    The runtime reads its own two files, and the originals that are plain files lie beside them. In every
    other layout sentence-transformers itself may load the folder, with all parts where it looks for them.

    Args:
        source: the model.
        declared: what it declares; None where nothing is done around the graph.
        folder: an existing folder.
        layout: where ids are remapped, as in `pipeline.export`.
    """
    if layout == "runtime" and declared is not None:
        write_settings(folder, declared.settings, declared.tensors)
    if not is_sentence_transformers(source):
        return
    places = {PROMPTS_NAME: source.root} | dict.fromkeys(TRANSFORMER_CONFIGS, source.path)
    for name, place in places.items():
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
    if layout == "runtime":
        shutil.copyfile(source.root / MODULES_NAME, folder / MODULES_NAME)
    else:
        _copy_parts(source, folder)


def _copy_parts(source: ModelSource, folder: Path) -> None:
    """Copy modules.json and the folders that it names; the model itself lies in the root."""
    listed = list_modules(source)
    if source.modules_folder is None:
        shutil.copyfile(source.root / MODULES_NAME, folder / MODULES_NAME)
    else:
        modules = read_json(source.root / MODULES_NAME, finite=False)
        modules[0]["path"] = ""
        (folder / MODULES_NAME).write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    for one in listed[1:]:
        (folder / one.folder.name).mkdir(exist_ok=True)
        for name in _PART_FILES:
            if (one.folder / name).is_file():
                shutil.copyfile(one.folder / name, folder / one.folder.name / name)
