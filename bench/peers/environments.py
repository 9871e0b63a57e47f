"""Environments of other tools: each has a venv of its own in build/peers, made on the first run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench import harness

FOLDER = harness.ROOT / "build" / "peers"
_READY = ".ready"  # holds the requirements that were installed
_TORCH = ("torch==2.13.0", "numpy")  # a CPU build where this project is developed
_ANY = (3, 11), (4, 0)


class CannotRunError(Exception):
    """A tool cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment of a tool.

    Attributes:
        name: of its folder.
        requirements: what pip installs.
        pythons: the lowest version that it runs on, and the first that it does not.
    """

    name: str
    requirements: tuple[str, ...]
    pythons: tuple[tuple[int, int], tuple[int, int]] = _ANY


# The genai builder needs transformers 5, optimum-onnx needs 4.57: neither can live with the other.
GENAI = Environment("genai", (*_TORCH, "transformers>=5", "onnxruntime-genai==0.18.0", "onnx", "onnx-ir"))
OPTIMUM = Environment(
    "optimum",
    (
        *_TORCH,
        "transformers==4.57.6",
        "optimum-onnx==0.1.0",
        "onnxruntime",
        "accelerate",
        # ONNX Runtime's quantiser imports both and requires neither.
        "onnx",
        "onnx-ir",
    ),
)
ONNXSIM = Environment("onnxsim", ("onnxsim==0.8.1", "onnx", "onnxruntime", "numpy"))
TRIMBED = Environment("trimbed", ("trimbed[model]==0.0.4", "torch==2.13.0"), pythons=((3, 12), (3, 14)))
# It declares neither pandas nor datasets, and imports what huggingface_hub 1 no longer has.
VOCABTRIMMER = Environment(
    "vocabtrimmer",
    (
        *_TORCH,
        "vocabtrimmer==0.0.2",
        "transformers==4.57.6",
        "huggingface_hub<1",
        "pandas",
        "datasets",
        "sentencepiece",
        "protobuf",
    ),
)


def interpreter(environment: Environment) -> Path:
    """The interpreter of an environment, which is made if there is none with these requirements.

    Raises:
        CannotRunError: no Python of its versions is installed, or its packages cannot be.
    """
    folder = FOLDER / environment.name
    python = folder / "bin" / "python"
    ready, wanted = folder / _READY, "\n".join(environment.requirements)
    if ready.exists() and ready.read_text("utf-8") == wanted:
        return python
    base = _base(environment)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment {environment.name} (minutes, once)", file=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([base, "-m", "venv", str(folder)], [*install, *environment.requirements]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotRunError(f"cannot be installed: {_last_line(done.stderr)}")
    ready.write_text(wanted, "utf-8")
    return python


def run(environment: Environment, *words: str) -> str:
    """Run python with these words in an environment; returns stdout.

    Raises:
        CannotRunError: it failed; the message is the last line it wrote.
    """
    command = [str(interpreter(environment)), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=harness.ROOT)
    if done.returncode != 0:
        raise CannotRunError(_last_line(done.stderr))
    return done.stdout


def _base(environment: Environment) -> str:
    low, end = environment.pythons
    for candidate in _candidates(low):
        version = _version(candidate)
        if version is not None and low <= version < end:
            return candidate
    raise CannotRunError(
        f"needs Python {low[0]}.{low[1]} or later, before {end[0]}.{end[1]}, and none is installed"
    )


def _candidates(low: tuple[int, int]) -> Iterator[str]:
    """Interpreters that may be there: this one, those on the path, those of pyenv."""
    yield sys.executable
    names = [f"python{low[0]}.{minor}" for minor in range(low[1], low[1] + 4)]
    yield from (found for name in names if (found := shutil.which(name)))
    # Its names on the path fail unless the version was chosen for the shell.
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from (str(path) for name in names for path in sorted(pyenv.glob(f"*/bin/{name}")))


@cache
def _version(python: str) -> tuple[int, int] | None:
    """Major and minor version of an interpreter; None if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
