"""ONNX Runtime sessions: providers, threads, and the options that keep one copy of each weight.

ONNX Runtime maps external data and uses it in place on the CPU, unless it folds a constant (a copy) or
prepacks a matrix (another). The options below were chosen by measuring anonymous memory and step time;
docs/runtime.md has the table.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.errors import MismatchError, UsageError, require

if TYPE_CHECKING:
    import onnxruntime as ort

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
# A folded constant above this size would be a second, anonymous copy of a mapped weight.
_MAX_FOLDED_BYTES = 1 << 20


def open_session(
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    prepack: bool = True,
    spin: bool = True,
) -> "ort.InferenceSession":
    """Open an ONNX file.

    Args:
        path: the graph; its external data lies beside it.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one operator; by default the CPUs this process may use.
        prepack: let the CPU kernels keep their own copy of each matrix in their preferred layout:
            faster for many rows at once, at the price of that copy.
        spin: let idle threads wait busily: faster steps, but it takes the cores from other sessions.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: unknown device, or one that this onnxruntime was not built for.
        MismatchError: the file is not a graph that ONNX Runtime can load.
    """
    ort = require("onnxruntime", extra="cpu", purpose="running a trimmed model")
    options = _options(ort, threads=threads, prepack=prepack, spin=spin)
    try:
        # Weights of at most _MAX_FOLDED_BYTES may still be folded.
        session: ort.InferenceSession = ort.InferenceSession(
            os.fspath(path.resolve()), options, providers=_providers(ort, device)
        )
    except Exception as error:
        # onnxruntime's exception classes share no base but Exception.
        if type(error).__module__.partition(".")[0] != "onnxruntime":
            raise
        raise MismatchError(f"{path} cannot be loaded by ONNX Runtime: {_first_line(error)}") from error
    logger.info(
        "session %s: device=%s threads=%s prepack=%s spin=%s",
        path.name,
        device,
        options.intra_op_num_threads,
        prepack,
        spin,
    )
    return session


def _options(ort: Any, *, threads: int | None, prepack: bool, spin: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a fold that was skipped on purpose is no warning for the user
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(_MAX_FOLDED_BYTES)
    )
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _providers(ort: Any, device: str) -> list[Any]:
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise UsageError(
            "this onnxruntime has no CUDA provider. Replace it with: "
            "pip uninstall onnxruntime && pip install 'trimserve[gpu]'"
        )
    # The arena doubles itself by default and never shrinks: ask for what is needed.
    cuda = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    return [cuda, "CPUExecutionProvider"]


def available_cpus() -> int:
    """CPUs this process may run on (cgroup affinity counts where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
