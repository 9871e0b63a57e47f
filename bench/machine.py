"""The machine a row was measured on: its name and versions, its neighbours, its memory bandwidth, its GPU."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "trimserve",
    "numpy",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnx",
    "onnx-ir",
    "onnxsim",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
)
_COPY_BYTES = 512 << 20


class Neighbours:
    """Watches what share of the CPUs other processes use meanwhile: what a measurement must not be near to.

    Workers count as ours once they have ended, so end them first. None where the system does not tell.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), sum(os.times()[:4])

    def share(self) -> float | None:
        """Share of all CPU time since the beginning that went to processes that are not ours."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = (busy - self._busy) - (sum(os.times()[:4]) - self._own)
        return max(0.0, foreign) / ((time.perf_counter() - self._start) * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the system started, summed over CPUs."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq = map(int, path.read_text("utf-8").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def bandwidth(threads: int, *, copy_bytes: int = _COPY_BYTES) -> float:
    """Bytes a second that threads read and write together copying large arrays, the best of five.

    Reading weights alone can be somewhat faster than this, as nothing is written; as a ceiling it is the
    speed that any program on this machine can reach in both directions.
    """
    size = copy_bytes // threads // 8
    arrays = [(np.ones(size), np.zeros(size)) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.copyto, args=(target, source)) for source, target in arrays]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * 8 * size * threads / (time.perf_counter() - begin))
    return best


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """When, where and with which versions a row was measured."""
    found = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git": _git_revision(),
        "hardware": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} {_machine_kind()}",
        "cpu": _cpu_model(),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": device,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    return found | ({"gpu": gpu()} if device == "cuda" else {})


def gpu() -> dict[str, str] | None:
    """Name, driver and memory of the first NVIDIA GPU; None without one."""
    fields = ("name", "driver_version", "memory.total")
    lines = _nvidia_smi(f"--query-gpu={','.join(fields)}")
    return dict(zip(fields, lines[0], strict=True)) if lines else None


def device_memory(pid: int) -> int | None:
    """Bytes of GPU memory that a process holds, by NVML (through nvidia-smi); None if it holds none."""
    lines = _nvidia_smi("--query-compute-apps=pid,used_memory", units=False)
    return next((int(used) << 20 for number, used in lines if int(number) == pid), None)


def _nvidia_smi(query: str, *, units: bool = True) -> list[list[str]]:
    """Rows of a query; none where there is no NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, f"--format=csv,noheader{'' if units else ',nounits'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[value.strip() for value in line.split(",")] for line in lines]


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def _machine_kind() -> str:
    info = Path("/proc/cpuinfo")
    virtual = info.exists() and " hypervisor" in info.read_text("utf-8")
    return "VM" if virtual else "machine"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
