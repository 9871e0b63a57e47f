"""ONNX Runtime sessions: providers, threads, and the options that keep one copy of each weight.

ONNX Runtime maps external data and uses it in place on the CPU, unless it folds a constant (a copy) or
packs a matrix (another). The options below were chosen by measuring anonymous memory and step time;
docs/runtime.md has the table.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trimserve.errors import MismatchError, UsageError, require
from trimserve.files.held import HeldGraph
from trimserve.foreign import foreign

if TYPE_CHECKING:
    import onnxruntime as ort

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
# A folded constant above this size would be a second, anonymous copy of a mapped weight.
_MAX_FOLDED_BYTES = 1 << 20


def open_session(
    graph: Path | HeldGraph, *, device: str = "cpu", threads: int | None = None, prepack: bool = True
) -> "ort.InferenceSession":
    """Open an ONNX file.

    Args:
        graph: the graph, whose external data lies beside it; or one of an opened folder: what is run is then
            what was opened, whatever is at its path now.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one operator; by default the CPUs this process may use.
        prepack: let the CPU kernels keep their own copy of each matrix in their preferred layout:
            faster for many rows at once, at the price of that copy.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: unknown device, one that this onnxruntime was not built for, or no thread.
        MismatchError: the file is not a graph that ONNX Runtime can load, or was written to since it was
            opened.
        TrimserveError: it was replaced since it was opened, and there is no room for a copy.
    """
    runtime = require("onnxruntime", extra="cpu", purpose="running a trimmed model")
    chosen = providers(runtime, device)
    if threads is not None and threads < 1:
        raise UsageError(f"threads should be 1 or more, found {threads}.")

    def create(path: Path) -> "ort.InferenceSession":
        options = _options(runtime, threads or available_cpus(), prepack=prepack)
        # Not resolved: behind a link of the hub's cache, the data does not lie beside the graph by its name.
        with foreign(
            f"{graph if isinstance(graph, Path) else graph.path} cannot be loaded by ONNX Runtime",
            advice="export the folder again.",
        ):
            session: ort.InferenceSession = runtime.InferenceSession(
                os.fspath(path.absolute()), options, providers=chosen
            )
        return session

    session = create(graph) if isinstance(graph, Path) else _open_held(graph, create)
    name = graph.name if isinstance(graph, Path) else graph.path.name
    logger.info("session %s: %s, prepack %s", name, chosen[0], "on" if prepack else "off")
    return session


def _open_held(graph: HeldGraph, create: "Callable[[Path], ort.InferenceSession]") -> "ort.InferenceSession":
    """Open a graph by its path where that leads to what is held, before and after; else a copy of that.

    ONNX Runtime maps external data that it opens by path; what it is given as bytes it copies into memory.
    """
    if graph.is_in_place:
        try:
            session = create(graph.file.place)
        except MismatchError as error:
            if graph.is_in_place:
                raise (_scattered(graph) or error) from error
        else:
            if graph.is_in_place:
                return session
    logger.info("%s was replaced after it was opened: a copy of what it was is run", graph.path)
    with graph.copied() as copy:
        return create(copy)


def _scattered(graph: HeldGraph) -> MismatchError | None:
    """The reason why a graph was refused, if it is that links lead to weights in another folder."""
    if graph.is_together:
        return None
    return MismatchError(
        f"{graph.path} and its weights are links to files in different folders, which ONNX Runtime does not "
        "follow: make a copy without links (cp -rL) and load that."
    )


def _options(runtime: ModuleType, threads: int, *, prepack: bool) -> "ort.SessionOptions":
    options: ort.SessionOptions = runtime.SessionOptions()
    options.log_severity_level = 3  # a fold that was skipped on purpose is no warning for the user
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(_MAX_FOLDED_BYTES)
    )
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    # Each session has its own threads: a pool shared by the process (set_global_thread_pool_sizes) makes
    # ONNX Runtime refuse every other session of the process, also those of other libraries. Idle threads
    # must not wait busily then, or two sessions that take turns keep each other off the cores.
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def providers(runtime: ModuleType, device: str) -> list[Any]:
    """Execution providers of a device, with their options.

    Args:
        runtime: the onnxruntime module.
        device: one of `DEVICES`.

    Raises:
        UsageError: unknown device, or one that this onnxruntime was not built for.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise UsageError(
            "this onnxruntime has no CUDA provider. Replace it with: "
            "pip uninstall onnxruntime && pip install 'trimserve[gpu]'"
        )
    # The arena doubles itself by default and never shrinks: ask for what is needed.
    cuda = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    return [cuda, "CPUExecutionProvider"]


def prepacks(*, quantized: bool, low_memory: bool) -> bool:
    """Choose whether the CPU kernels keep packed copies of a graph's matrices.

    Packed copies take as much anonymous memory as the matrices; without them the mapped files are used in
    place, and steps take longer (docs/runtime.md has both). A kernel for quantised blocks without its
    packed copy is a hundred times slower, so it always has one.
    """
    chosen = quantized or not low_memory
    logger.info(
        "memory: %s weights, packed copies %s",
        "quantised" if quantized else "float",
        "on" if chosen else "off",
    )
    return chosen


def available_cpus() -> int:
    """CPUs this process may run on (cgroup affinity counts where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
