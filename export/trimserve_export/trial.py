"""Opening a folder before it is put in place: what cannot be loaded or run never becomes a folder."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from trimserve.errors import TrimserveError, UnsupportedModelError
from trimserve.folder.manifest import Manifest
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.foreign import foreign
from trimserve.loading import load
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.session import open_session

_ADVICE = "use another exporter, or the versions of constraints.txt."


def try_folder(folder: Path, manifest: Manifest, *, device: str) -> None:
    """Load a folder that was just made and, of a decoder, run two steps.

    Graphs for another device, bf16 (which CPUs have no kernels for), layouts for other runtimes and
    checkpoints are left out.

    Args:
        folder: with its manifest in it.
        manifest: what it says.
        device: what the graph was made for.

    Raises:
        UnsupportedModelError: it cannot be loaded or run; the message names the exporter.
    """
    runs_here = device == "cpu" and manifest.dtype != "bf16" and find_spec("onnxruntime") is not None
    if manifest.layout != "runtime" or not manifest.graphs or not runs_here:
        return
    subject = (
        f"the graph that {manifest.exporter.get('name', 'the exporter')} made of this model cannot be run"
    )
    with foreign(subject, advice=_ADVICE, error=UnsupportedModelError):
        try:
            _run(folder, manifest)
        except TrimserveError as error:  # it would speak of a folder that the user never sees
            raise RuntimeError(str(error).replace(f"{folder}: ", "").replace(f"{folder}/", "")) from error


def _run(folder: Path, manifest: Manifest) -> None:
    # The hashes were taken of these very files a moment ago; packed copies would be made for two steps alone.
    load(folder, threads=1, memory="low", verify="off")
    if manifest.task != GENERATION_TASK:
        return
    session = open_session(
        folder / manifest.graphs["model"], threads=1, prepack=manifest.quantization is not None
    )
    decoder = Decoder(session, lengths=manifest.lengths)
    cache = decoder.start([None])
    for ids in ([[0, 1]], [[0]]):
        decoder.step(cache, np.array(ids, np.int64), decoder.no_rows)
