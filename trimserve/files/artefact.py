"""Files that trimserve writes: hashes, atomic replacement, and the vocab file.

An artefact is a safetensors file with a `kind` and a `schema_version` in its metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError, UsageError
from trimserve.files.atomic import atomic_path, check_place
from trimserve.files.checked_json import convert_json, parse_json
from trimserve.files.held import HeldFile
from trimserve.files.tensors import ArrayTensor, exhaust, map_tensor, read_header, write_tensors

SCHEMA_VERSION = 1
_LONGEST = 40  # of a stranger's word in a message
Arrays = Mapping[str, npt.NDArray[Any]]


def check_output(path: Path, kind: str) -> None:
    """Refuse an output that cannot be written, or that would replace something else.

    Raises:
        UsageError: no such parent folder, or `path` exists and is not an artefact of this kind.
    """
    check_place(path)
    if path.exists() and not (path.is_file() and _is_kind(path, kind)):
        raise UsageError(f"{path} exists and is not a {kind} file: choose another name or remove it.")


def _is_kind(path: Path, kind: str) -> bool:
    try:
        return read_header(path)[1].get("kind") == kind
    except MismatchError:
        return False


def save_artefact(path: Path, kind: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write arrays and facts as one safetensors artefact, atomically.

    Args:
        path: the file; an existing one of the same kind is replaced.
        kind: what it is, e.g. ``"vocab"``.
        arrays: name -> array, in the dtypes to be stored.
        facts: JSON values; each becomes one metadata entry.

    Raises:
        UsageError: see `check_output`.
    """
    check_output(path, kind)
    metadata = {"kind": kind, "schema_version": str(SCHEMA_VERSION)}
    metadata |= {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
    aligned = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    tensors = {name: ArrayTensor(arrays[name]) for name in aligned}
    # Not safetensors' own writer: its metadata come in another order in every process.
    with atomic_path(path) as temporary:
        exhaust(write_tensors(temporary, tensors, metadata))


def load_artefact(path: Path | HeldFile, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read an artefact of the given kind: its arrays and its facts.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no artefact of this kind, or of a schema this version cannot read.
    """
    arrays, facts = map_artefact(path, kind)
    return {name: np.array(values) for name, values in arrays.items()}, facts


def map_artefact(path: Path | HeldFile, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Map the arrays of an artefact read-only, without reading them; as `load_artefact` else."""
    if isinstance(path, HeldFile):
        file, path = path, path.path
    elif path.is_file():
        file = HeldFile(path)
    else:
        raise UsageError(f"{path} does not exist: expected a {kind} file.")
    specs, stored = read_header(file)
    advice = f"make the {kind} again."
    metadata = convert_json(stored, dict[str, str], f"the metadata of {path}", advice=advice)
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "no trimserve file")[:_LONGEST]
        raise MismatchError(f"{path} should be a {kind} but is {found}: pass the right file.")
    if (version := metadata.get("schema_version")) != str(SCHEMA_VERSION):
        raise MismatchError(
            f"{path} has schema {str(version)[:_LONGEST]}, this trimserve reads "
            f"{SCHEMA_VERSION}: make the {kind} again or update trimserve."
        )
    facts = {
        key: parse_json(value, f"the entry {key!r} of {path}", advice=advice)
        for key, value in metadata.items()
        if key not in ("kind", "schema_version")
    }
    return {name: map_tensor(spec) for name, spec in specs.items()}, facts
