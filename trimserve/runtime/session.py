"""ONNX Runtime sessions: providers, threads, and the options that keep one copy of each weight.

ONNX Runtime maps external data and uses it in place on the CPU, unless it folds a constant (a copy) or
packs a matrix (another). The options below were chosen by measuring anonymous memory and step time;
docs/runtime.md has the table.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from trimserve.concurrency import Lock, renew_in_child
from trimserve.errors import MismatchError, UsageError, require
from trimserve.files.held import HeldGraph
from trimserve.foreign import foreign
from trimserve.process import available_cpus

if TYPE_CHECKING:
    import onnxruntime as ort

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
# What a loaded model spends: time (packed copies of the weights, an arena), or as little memory as it can.
MemoryUse = Literal["fast", "low"]
# A folded constant above this size would be a second, anonymous copy of a mapped weight.
MAX_FOLDED_BYTES = 1 << 20
_DAMAGED = "the file is damaged or was made by another version: export the model again."


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a session keeps in private memory; `plan_memory` chooses.

    Attributes:
        prepack: the CPU kernels keep their own copy of each matrix in their preferred layout: faster for many
            rows at once. ONNX Runtime unmaps what it has copied.
        arena: keep the memory of a run for the next one, instead of giving it back to the C library.
    """

    prepack: bool = True
    arena: bool = True


class Session:
    """An `InferenceSession` for any number of threads, in this process and in those forked from it.

    All runs go through here: whatever ONNX Runtime raises becomes one sentence, and a forked child, which has
    none of the session's threads, opens the graph again before its first run.

    Attributes:
        path: the graph.
        opened: how often it was opened again in a child; what is bound to the session (`io_binding`) belongs
            to one opening.
        plan: what it keeps in memory.
    """

    def __init__(
        self,
        path: Path,
        make: Callable[[], "ort.InferenceSession"],
        *,
        device: str,
        threads: int,
        plan: MemoryPlan | None = None,
    ) -> None:
        """Open a graph.

        Args:
            path: the graph, for messages.
            make: opens it; is called again in a forked child.
            device: where it runs.
            threads: of one operator; with 1 the session has no threads of its own.
            plan: what `make` was told of memory.
        """
        self.path = path
        self.plan = plan or MemoryPlan()
        self.opened = 0
        self._make = make
        self._device = device
        self._has_threads = threads > 1
        self._session: ort.InferenceSession | None = make()
        self._lock = Lock()
        self._in_use = _InUse(path)
        renew_in_child(self)

    def run(
        self,
        names: Sequence[str] | None,
        feeds: Mapping[str, npt.NDArray[Any]],
        *,
        trims: bool = False,
    ) -> list[npt.NDArray[Any]]:
        """Run on arrays; gives the named outputs, all by default.

        Args:
            names: of the outputs; None for all.
            feeds: an array an input.
            trims: give the arena's free memory back to the system at the end. It never shrinks by itself,
                and one long text makes it large.

        Raises:
            TrimserveError: there is not enough memory.
            MismatchError: ONNX Runtime says anything else.
        """
        with self._in_use:
            session = self._session or self._again()
            extra = (_shrinking(),) if trims and self.plan.arena and self._device == "cpu" else ()
            made: list[npt.NDArray[Any]] = session.run(names, feeds, *extra)
            return made

    def run_with_ort_values(
        self, names: Sequence[str], feeds: "Mapping[str, ort.OrtValue]"
    ) -> "Sequence[ort.OrtValue]":
        """Run on values; errors as of `run`."""
        with self._in_use:
            made: Sequence[ort.OrtValue] = (self._session or self._again()).run_with_ort_values(names, feeds)
            return made

    def run_with_iobinding(self, binding: "ort.IOBinding") -> None:
        """Run on what is bound; errors as of `run`."""
        with self._in_use:
            (self._session or self._again()).run_with_iobinding(binding)

    def io_binding(self) -> "ort.IOBinding":
        """A binding for one caller at a time, of this opening."""
        return self.raw.io_binding()

    def get_inputs(self) -> "list[ort.NodeArg]":
        """The graph's inputs."""
        return list(self.raw.get_inputs())

    def get_outputs(self) -> "list[ort.NodeArg]":
        """The graph's outputs."""
        return list(self.raw.get_outputs())

    def get_modelmeta(self) -> "ort.ModelMetadata":
        """What is written in the graph about itself."""
        return self.raw.get_modelmeta()

    def get_providers(self) -> list[str]:
        """The execution providers, the first that is asked first."""
        return list(self.raw.get_providers())

    @property
    def raw(self) -> "ort.InferenceSession":
        """ONNX Runtime's own object."""
        return self._session or self._again()

    def renew(self) -> None:
        """Leave a session behind whose threads are gone in this child, or that one of them was using.

        Anything else is kept, with the memory that it shares with the parent.
        """
        if self._session is None or (
            not self._has_threads and not self._in_use.count and self._device == "cpu"
        ):
            return
        # Its end would wait for its threads, at the latest when the interpreter ends: so it has none.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        self._session = None
        self._in_use = _InUse(self.path)
        self.opened += 1

    def _again(self) -> "ort.InferenceSession":
        with self._lock:
            if self._session is None:
                if self._device != "cpu":
                    raise UsageError(
                        f"{self.path} was loaded on {self._device} before this process was forked, where no "
                        "device can be used: load the model in the child, or start processes by 'spawn'."
                    )
                self._session = self._make()
            return self._session


class _InUse:
    """The border around each run (see `foreign`), which also knows how many runs there are."""

    __slots__ = ("_border", "_runs")

    def __init__(self, path: Path) -> None:
        self._border = foreign(
            f"ONNX Runtime cannot run {path}",
            advice=_DAMAGED,
            memory="give it a shorter text or fewer at a time, or free some memory.",
        )
        # Appending and popping need no lock.
        self._runs: list[None] = []

    @property
    def count(self) -> int:
        return len(self._runs)

    def __enter__(self) -> None:
        self._runs.append(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runs.pop()
        if error is not None:
            self._border.__exit__(kind, error, trace)


def open_session(
    graph: Path | HeldGraph,
    *,
    device: str = "cpu",
    threads: int | None = None,
    prepack: bool = True,
    arena: bool = True,
) -> Session:
    """Open an ONNX file.

    Args:
        graph: the graph, whose external data lies beside it; or one of an opened folder: what is run is then
            what was opened, whatever is at its path now.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one operator; by default the CPUs this process may use.
        prepack: see `MemoryPlan`.
        arena: see `MemoryPlan`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: unknown device, one that this onnxruntime was not built for, or no thread.
        MismatchError: the file is not a graph that ONNX Runtime can load, or was written to since it was
            opened.
        TrimserveError: there is not enough memory for it; or it was replaced since it was opened, and there
            is no room for a copy.
    """
    runtime = _onnxruntime()
    chosen = providers(runtime, device)
    if threads is not None and threads < 1:
        raise UsageError(f"threads should be 1 or more, found {threads}.")
    count = threads or available_cpus()
    plan = MemoryPlan(prepack=prepack, arena=arena)
    path = graph if isinstance(graph, Path) else graph.path
    # The process may change its folder before it forks. Links are not resolved: behind one of the hub's
    # cache, the data does not lie beside the graph by its name.
    place = path.absolute()

    def create(at: Path) -> "ort.InferenceSession":
        options = _options(runtime, count, plan)
        with foreign(
            f"{path} cannot be loaded by ONNX Runtime",
            advice=_DAMAGED,
            memory="free some, or load it with memory='low'.",
        ):
            return runtime.InferenceSession(os.fspath(at), options, providers=chosen)

    def make() -> "ort.InferenceSession":
        return create(place) if isinstance(graph, Path) else _open_held(graph, create)

    session = Session(path, make, device=device, threads=count, plan=plan)
    logger.info("session %s: %s, prepack %s", path.name, chosen[0], "on" if prepack else "off")
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


def _onnxruntime() -> ModuleType:
    # From version 1.31 on it starts threads that report its use to its makers, when it is imported. A forked
    # child, which has none of them, waits for them for ever when its interpreter ends.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return require("onnxruntime", extra="cpu", purpose="running a trimmed model")


def _scattered(graph: HeldGraph) -> MismatchError | None:
    """The reason why a graph was refused, if it is that links lead to weights in another folder."""
    if graph.is_together:
        return None
    return MismatchError(
        f"{graph.path} and its weights are links to files in different folders, which ONNX Runtime does not "
        "follow: make a copy without links (cp -rL) and load that."
    )


def _shrinking() -> "ort.RunOptions":
    options: ort.RunOptions = _onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _options(runtime: ModuleType, threads: int, plan: MemoryPlan) -> "ort.SessionOptions":
    options: ort.SessionOptions = runtime.SessionOptions()
    # Nothing but what ends the process: a fold that was skipped on purpose is no warning for the user, and
    # errors come as exceptions, too.
    options.log_severity_level = 4
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(MAX_FOLDED_BYTES)
    )
    options.add_session_config_entry("session.disable_prepacking", "0" if plan.prepack else "1")
    if not plan.arena:
        # A pattern is one block for all of a run's tensors: what the C library has not together.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
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


def plan_memory(memory: MemoryUse, *, quantized: bool) -> MemoryPlan:
    """Choose what the sessions of a model keep in private memory.

    Packed copies take as much anonymous memory as the matrices, and ONNX Runtime unmaps the file's pages that
    it has copied: one of the two is there, never both. Without copies the mapped files are used in place, and
    steps take longer (docs/runtime.md has both). A kernel for quantised blocks without its packed copy is a
    hundred times slower, so it always has one.

    Args:
        memory: ``"fast"`` or ``"low"``.
        quantized: the weights are.
    """
    low = memory == "low"
    plan = MemoryPlan(prepack=quantized or not low, arena=not low)
    logger.info(
        "memory %s: %s weights, packed copies %s, arena %s",
        memory,
        "quantised" if quantized else "float",
        "on" if plan.prepack else "off",
        "on" if plan.arena else "off",
    )
    return plan
