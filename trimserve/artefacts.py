"""Files that trimserve writes: hashes, atomic replacement, and the vocab file.

An artefact is a safetensors file with a `kind` and a `schema_version` in its metadata.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from trimserve.errors import MismatchError, UsageError
from trimserve.tensorfile import ArrayTensor, exhaust, map_tensor, read_header, write_tensors
from trimserve.vocab import VocabMap

SCHEMA_VERSION = 1
Arrays = Mapping[str, npt.NDArray[Any]]


def sha256_file(path: Path) -> str:
    """Hash a file's bytes, without loading it; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, moved in place when the block ends without an error."""
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: create it first.")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        error.filename = str(path.parent)  # the temporary name says nothing to a user
        raise
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that files and folders are made without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(path: Path, kind: str) -> None:
    """Refuse an output that cannot be written, or that would replace something else.

    Raises:
        UsageError: no such parent folder, or `path` exists and is not an artefact of this kind.
    """
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: create it first.")
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


def load_artefact(path: Path, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read an artefact of the given kind: its arrays and its facts.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no artefact of this kind, or of a schema this version cannot read.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: expected a {kind} file.")
    specs, metadata = read_header(path)
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "no trimserve file")
        raise MismatchError(f"{path} should be a {kind} but is {found}: pass the right file.")
    if (version := metadata.get("schema_version")) != str(SCHEMA_VERSION):
        raise MismatchError(
            f"{path} has schema {version}, this trimserve reads "
            f"{SCHEMA_VERSION}: make the {kind} again or update trimserve."
        )
    try:
        arrays = {name: np.array(map_tensor(spec)) for name, spec in specs.items()}
        facts = {
            key: json.loads(value) for key, value in metadata.items() if key not in ("kind", "schema_version")
        }
    except (ValueError, SafetensorError) as error:
        raise MismatchError(f"{path} is damaged ({error}): make the {kind} again.") from error
    return arrays, facts


def save_vocab(vocab: VocabMap, path: Path) -> None:
    """Write `vocab_map.safetensors`: int32 `vocab_map` (K,), and in its metadata a digit of `Reason` an id.

    Where fewer ids have a row in the head, the metadata also has a 1 for each that has one, else a 0.
    `vocab_map` is the only tensor, as TensorRT-Edge-LLM's runtime demands of a file of this name.
    """
    facts = {
        "reason": "".join(map(str, vocab.reason.tolist())),
        "vocab_size": vocab.vocab_size,
        "tokenizer_sha256": vocab.tokenizer_sha256,
        "rule": vocab.rule,
    }
    if vocab.output_ids is not None:
        facts["output"] = "".join(map(str, vocab.head.is_kept(vocab.kept_ids).astype(int).tolist()))
    save_artefact(path, "vocab", {"vocab_map": vocab.kept_ids}, facts)


def load_vocab(path: Path) -> VocabMap:
    """Read a vocab file.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no vocab, or its ids are out of order or out of range.
    """
    arrays, facts = load_artefact(path, "vocab")
    try:
        return VocabMap(
            kept_ids=arrays["vocab_map"],
            reason=_reasons(arrays, facts),
            vocab_size=facts["vocab_size"],
            tokenizer_sha256=facts["tokenizer_sha256"],
            rule=facts["rule"],
            output_ids=arrays["vocab_map"][_digits(facts["output"]) > 0] if "output" in facts else None,
        )
    except KeyError as error:
        raise MismatchError(f"{path} lacks {error}: select the vocab again.") from error
    except IndexError as error:
        raise MismatchError(
            f"{path} does not say of each id whether it is an output id: select it again."
        ) from error


def _reasons(arrays: Arrays, facts: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    if "reason" in arrays:  # as written before they moved to the metadata
        return np.asarray(arrays["reason"])
    return _digits(facts["reason"])


def _digits(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8) - ord("0")
