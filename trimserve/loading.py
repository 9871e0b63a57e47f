"""Open a trimmed folder as the object that runs it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trimserve.cold import ColdRows
from trimserve.encoder import Encoder
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder import GENERATION_TASK, TrimmedFolder, open_folder
from trimserve.session import open_session
from trimserve.text import Codec

if TYPE_CHECKING:
    import onnxruntime as ort

    from trimserve.generator import Generator

ENCODER_TASKS = ("feature-extraction", "fill-mask", "text-classification", "token-classification")


def load(
    path: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None
) -> "Encoder | Generator":
    """Load a trimmed folder.

    Args:
        path: a folder made by `trimserve export`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one operator; by default the CPUs this process may use.

    Returns:
        An Encoder or a Generator, by the folder's task.

    Raises:
        UsageError: not a trimmed folder, or one without a graph.
        MismatchError: a file of it is missing or changed, or its parts do not fit.
        UnsupportedModelError: a layout or a task that this runtime does not run.
        MissingExtraError: onnxruntime is not installed.
    """
    folder = open_folder(Path(path))
    _check(folder)
    codec = Codec(folder)
    session = open_session(folder.file(folder.manifest.graphs["model"]), device=device, threads=threads)
    cold = ColdRows(folder, width=_row_width(folder, session))
    if folder.manifest.task != GENERATION_TASK:
        return Encoder(folder, session, codec, cold)
    from trimserve.generator import Generator  # an encoder's process needs none of it

    return Generator(folder, session, codec, cold, device=device, threads=threads)


def _check(folder: TrimmedFolder) -> None:
    manifest = folder.manifest
    if "model" not in manifest.graphs:
        raise UsageError(
            f"{folder.path} holds a trimmed checkpoint and no ONNX graph (--to safetensors): load it with "
            "transformers or vLLM, or export the model with --to onnx."
        )
    if manifest.layout != "runtime":
        raise UnsupportedModelError(
            f"{folder.path} has the layout {manifest.layout!r}, which is for other runtimes: this one runs "
            "folders exported with --layout runtime."
        )
    if manifest.task not in (*ENCODER_TASKS, GENERATION_TASK):
        raise UnsupportedModelError(
            f"{folder.path} was exported for {manifest.task!r}, which this version does not run: it runs "
            f"{', '.join((*ENCODER_TASKS, GENERATION_TASK))}."
        )


def _row_width(folder: TrimmedFolder, session: "ort.InferenceSession") -> int:
    shapes = {value.name: value.shape for value in session.get_inputs()}
    if "cold_rows" not in shapes:
        raise UnsupportedModelError(
            f"the graph in {folder.path} has no input 'cold_rows', so it was not made for serving: export "
            "the model again."
        )
    return int(shapes["cold_rows"][1])
