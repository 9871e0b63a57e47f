"""From what `-m/--model` names, a folder, a graph, a GGUF file or a hub id, to the model's files."""

import re
import stat
from pathlib import Path

from trimserve.errors import MismatchError, UsageError, require
from trimserve.files.hub import fetch_snapshot
from trimserve.files.inner import inner_path
from trimserve.files.model_json import read_modules
from trimserve.folder.manifest import Source
from trimserve.folder.names import check_plain_name
from trimserve.model.effective_tokenizer import has_tokenizer
from trimserve.model.gguf.model import open_gguf
from trimserve.model.sentence import MODULES_NAME
from trimserve.model.source import ModelSource

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Everything but weights in pickle (*.bin, *.pt) and code (*.py).
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")
_WEIGHT_FILES = ("*.safetensors", "*.onnx", "*.onnx_data", "*.onnx.data")


def resolve_model(
    name: str | Path | ModelSource, *, revision: str | None = None, weights: bool = True
) -> ModelSource:
    """Find a model's files.

    Args:
        name: a local folder or file, else a hub id; a `ModelSource` is returned as it is.
        revision: hub branch, tag or commit.
        weights: fetch the weights as well; tokenizer and configs always come. Never pickle or code.

    Raises:
        UsageError: no such folder, and no such model on the hub or no way to reach it; or a revision of a
            local folder.
        UnsupportedModelError, MismatchError: a GGUF file that is not read; see `open_gguf`.
        MismatchError: a pipe or a device is in the folder.
        MissingExtraError: a hub id, and huggingface_hub is not installed.
    """
    if isinstance(name, ModelSource):
        return name
    path = Path(name)
    if path.exists() and revision is not None:
        raise UsageError(f"{name} is a local path, which has no revisions: leave --revision out.")
    if path.is_dir():
        _check_entries(path)
        return _in_folder(str(name), None, path)
    if path.suffix == ".gguf" and path.is_file():
        gguf = open_gguf(path)
        return ModelSource(str(name), None, gguf.folder, made_of=(path,), gguf=gguf)
    if path.suffix == ".onnx" and path.is_file():
        return ModelSource(str(name), None, _folder_of(path), path)
    if path.exists():
        raise UsageError(
            f"{name} is a file: pass a .gguf or .onnx file, or the folder that holds the model's files."
        )
    if not _HUB_ID.fullmatch(str(name)):
        raise UsageError(f"{name} is neither a folder nor a hub id (owner/model): check the path.")
    return _in_folder(str(name), revision, _fetch(str(name), revision, weights))


def resolve_source(
    made_from: Source, model: str | Path | ModelSource | None = None, revision: str | None = None
) -> ModelSource:
    """Find the files of the model that a trimmed folder was made from.

    Args:
        made_from: what the folder's manifest says.
        model: where that model is found, if elsewhere.
        revision: of a hub id; by default the one that the folder was made from.

    Raises:
        TrimserveError: see `resolve_model`.
    """
    name = model or made_from.name
    if revision is None and not (isinstance(name, str | Path) and Path(name).exists()):
        revision = made_from.revision
    return resolve_model(name, revision=revision)


def _check_entries(folder: Path) -> None:
    """Refuse pipes and devices in a model's folder: whoever opens one by a file's name waits, or never ends.

    They are opened from many places, other libraries' too, so they are looked for once, here.
    """
    for entry in (*folder.iterdir(), *folder.glob("*/*")):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nowhere: whoever needs the file says so
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise MismatchError(f"{entry} is a pipe or a device and no file: put the file itself there.")


def _in_folder(name: str, revision: str | None, path: Path) -> ModelSource:
    """The model of a folder; sentence-transformers may keep it in one of its own, such as `0_Transformer`."""
    modules = path / MODULES_NAME
    if not modules.is_file():
        return ModelSource(name, revision, path)
    listed = read_modules(modules)
    first = listed[0].path.rstrip("/") if listed else ""
    if first in ("", "."):
        return ModelSource(name, revision, path)
    check_plain_name(first, str(modules))
    folder = inner_path(path, first, str(modules))
    if not folder.is_dir():
        return ModelSource(name, revision, path)
    return ModelSource(name, revision, folder, modules_folder=path)


def _folder_of(graph: Path) -> Path:
    """The folder that belongs to a graph: transformers.js keeps graphs in `onnx/`, below the tokenizer."""
    above = graph.parent.parent
    belongs_above = not has_tokenizer(graph.parent) and has_tokenizer(above)
    return above if belongs_above else graph.parent


def _fetch(name: str, revision: str | None, weights: bool) -> Path:
    hub = require("huggingface_hub", extra="export", purpose=f"fetching {name}")
    patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())]
    return fetch_snapshot(
        hub,
        name,
        refused=f"{name} is no local folder and",
        otherwise=", or pass a folder",
        revision=revision,
        allow_patterns=patterns,
    )
