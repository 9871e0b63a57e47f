"""What to say about a folder whose weights cannot be read: other formats, other names, other places."""

import re
from pathlib import Path
from typing import Final

from trimserve.errors import TrimserveError, UnsupportedModelError, UsageError

# Where to look below a folder for weights that are not at its root: `unet/`, `checkpoint-500/`, `onnx/fp16/`.
_DEPTH: Final = 2
_NAMED: Final = 3
_USUAL: Final = ("model.safetensors", "model.safetensors.index.json")
_CONVERT: Final = "load it in the library that wrote it and save it as model.safetensors"
# What a trainer keeps beside the weights.
_NO_WEIGHTS: Final = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states_\w+)\.\w+"
)
_THE_FILE: Final = "pass the file itself"
# Format, its name for the user, what to do; the first that is found is told.
_OTHER_FORMATS: Final = (
    (
        ("*.gguf",),
        "GGUF, a format of llama.cpp",
        _THE_FILE,
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "a pickle, which can run code when it is read",
        "convert the weights to model.safetensors with transformers' save_pretrained, or use a revision that "
        "has them",
    ),
    (("*.distcp",), "a part of a distributed checkpoint", "put it together with `accelerate merge-weights`"),
    (
        ("*.msgpack",),
        "a Flax checkpoint",
        "load it with from_flax=True in transformers 4 and save_pretrained",
    ),
    (("*.h5", "*.keras", "*.ckpt.index", "saved_model.pb", "*.tflite"), "a TensorFlow model", _CONVERT),
    (("*.npz", "*.nemo", "*.ot", "*.mlmodel", "openvino_model.xml"), "of another library", _CONVERT),
)


def no_weights(folder: Path) -> TrimserveError:
    """The error for a folder that has neither safetensors weights by their usual names nor a graph.

    It names what the folder has instead: weights in another format, by another name, or below it.
    """
    if others := sorted(folder.glob("*.safetensors")):
        return _other_names(folder, others)
    if (found := _other_format(folder)) is not None:
        path, kind, advice = found
        if advice == _THE_FILE:
            advice = f"pass -m {path}, the file itself"
        return UnsupportedModelError(f"{path} is {kind}: {advice}.")
    if below := _folders_with_weights(folder):
        return _below(folder, below)
    return UsageError(
        f"{folder} has no weights: expected {_USUAL[0]}, {_USUAL[1]} with its files, or an ONNX graph."
    )


def _other_names(folder: Path, files: list[Path]) -> TrimserveError:
    names = ", ".join(file.name for file in files[:_NAMED])
    advice = f"rename it to {_USUAL[0]}" if len(files) == 1 else f"fetch {_USUAL[1]} as well"
    return UsageError(
        f"{folder} has {names} but neither {_USUAL[0]} nor {_USUAL[1]}: if that is all of the model, "
        f"{advice}, or save it again with transformers' save_pretrained."
    )


def _other_format(folder: Path) -> tuple[Path, str, str] | None:
    for patterns, kind, advice in _OTHER_FORMATS:
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if weights := [path for path in found if not _NO_WEIGHTS.fullmatch(path.name)]:
            return weights[0], kind, advice
    return None


def _folders_with_weights(folder: Path) -> list[Path]:
    """Folders below with weights that are read, else with those that are not; the latest step first."""
    readable, other = [], []
    for path in _subfolders(folder, _DEPTH):
        if any((path / name).is_file() for name in _USUAL) or any(path.glob("*.onnx")):
            readable.append(path)
        elif _other_format(path) is not None or any(path.glob("*.safetensors")):
            other.append(path)
    return sorted(readable or other, key=_step, reverse=True)


def _subfolders(folder: Path, depth: int) -> list[Path]:
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if depth == 1:
        return found
    return found + [path for below in found for path in _subfolders(below, depth - 1)]


def _step(path: Path) -> int:
    """The step of a trainer's `checkpoint-500`; 0 of any other folder."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _below(folder: Path, found: list[Path]) -> TrimserveError:
    first = found[0]
    also = "" if len(found) == 1 else f" (also in {', '.join(path.name for path in found[1:_NAMED])})"
    lacks = [
        name
        for name in ("config.json", "tokenizer.json")
        if (folder / name).is_file() and not (first / name).is_file()
    ]
    copied = f", with {' and '.join(lacks)} of {folder} copied into it" if lacks else ""
    return UsageError(
        f"{folder} has no weights itself, they are in {first.relative_to(folder)}{also}: pass "
        f"{first}{copied}."
    )
