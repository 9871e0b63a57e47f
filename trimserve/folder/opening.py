"""A trimmed folder: `trimserve.json`, the hashes of its files, and what does not fit together.

What is opened is one folder at one moment: its files are opened together, checked, and later read through
what was opened, so that a folder which is replaced meanwhile is never mixed with the one that replaces it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimserve.errors import MismatchError
from trimserve.files.checked_json import read_json
from trimserve.files.hashes import sha256_file
from trimserve.files.held import HeldFile, HeldFolder, HeldGraph
from trimserve.files.model_json import check_model_object
from trimserve.folder.checking import Verify, check_files, chosen_verify
from trimserve.folder.manifest import FileEntry, Manifest, is_trimmed, read_manifest
from trimserve.folder.names import COLD_NAME, MANIFEST_NAME, TOKENIZER_NAME, VOCAB_NAME, is_inner_folder
from trimserve.folder.tokenizer_settings import declared_settings
from trimserve.vocab.file import load_vocab
from trimserve.vocab.map import VocabMap

# A folder may be replaced just while it is opened; then the new one is.
_TRIES = 5
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class TrimmedFolder:
    """An opened and checked folder.

    Attributes:
        path: where it was when it was opened.
        manifest: what it was made from.
        vocab: its kept ids.
        held: its opened files; of a folder that is being written they are opened when asked for.
    """

    path: Path
    manifest: Manifest
    vocab: VocabMap
    held: HeldFolder = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.held is None:
            object.__setattr__(self, "held", HeldFolder(self.path))

    def __str__(self) -> str:
        """Where it is and what it does, for people: the models' `repr` shows it."""
        manifest = self.manifest
        dtype = manifest.dtype if manifest.quantization is None else "quantised"
        return (
            f"{self.path}, {manifest.task}, {manifest.kept:,} of {manifest.vocab_size:,} rows kept, {dtype}"
        )

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists; what it leads to may change, see `opened`.

        Raises:
            MismatchError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise MismatchError(f"{self.path} has no {name} in its manifest: export it again.")
        return self.path / name

    def opened(self, name: str) -> HeldFile:
        """A file that the manifest lists, as it was when the folder was opened.

        Raises:
            MismatchError: the manifest does not list it.
        """
        self.file(name)
        return self.held.file(name)

    def graph(self, name: str) -> HeldGraph:
        """A graph that the manifest lists, with its data, as they were when the folder was opened.

        Raises:
            MismatchError: the manifest does not list it.
        """
        self.file(name)
        return self.held.graph(name)

    def read_text(self, name: str) -> str | None:
        """A text file of the source model; None where the folder has none.

        Raises:
            MismatchError: it is not UTF-8.
        """
        return self.opened(name).read_text() if name in self.manifest.files else None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the source model, checked; empty where the folder has none.

        Raises:
            MismatchError: see `read_model_json`.
        """
        if name not in self.manifest.files:
            return {}
        origin, advice = str(self.path / name), "export the folder again."
        content = read_json(self.opened(name), advice=advice, finite=False)
        return check_model_object(content, name, origin, advice=advice)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer that counts: tokenizer.json, or the effective one beside it."""
        name: str = self.manifest.tokenizer.get("file") or TOKENIZER_NAME
        return name

    @property
    def tokenizer_path(self) -> Path:
        """Path of that tokenizer."""
        return self.file(self.tokenizer_name)

    @property
    def tokenizer_settings(self) -> dict[str, Any]:
        """What that file cannot hold, as the manifest or the source's configs say it: `declared_settings`."""
        names = ("tokenizer_config.json", "special_tokens_map.json")
        recorded: dict[str, Any] = self.manifest.tokenizer.get("settings") or {}
        return declared_settings(*map(self.read_json, names)) | recorded

    @property
    def has_cold(self) -> bool:
        """Whether the folder holds cold rows (`--no-cold` leaves them out)."""
        return COLD_NAME in self.manifest.files


def open_folder(path: Path, *, verify: str | None = None) -> TrimmedFolder:
    """Open a trimmed folder and check that its files are the ones it was written with.

    Args:
        path: the folder.
        verify: ``"full"`` hashes every file; ``"fast"`` all but large ones that were hashed before and not
            written to since, as the system says; ``"off"`` compares sizes. By default what
            `TRIMSERVE_VERIFY` says, else fast.

    Raises:
        UsageError: not a trimmed folder, or no such `verify`.
        MismatchError: a file is missing, was cut off or changed, or the vocab does not fit.
    """
    chosen = chosen_verify(verify)
    for tries_left in reversed(range(_TRIES)):
        if not is_trimmed(path):
            if not tries_left or tries_left == _TRIES - 1:
                read_manifest(path)  # which says so
            time.sleep(_PAUSE_SECONDS)  # it was there: its successor is about to be
            continue
        held = HeldFolder(path)
        try:
            return _open(path, held, chosen)
        except (MismatchError, FileNotFoundError):
            # A manifest is replaced with its folder, or after the files that it lists: were they of another?
            if not tries_left or _is_current(held):
                raise
        time.sleep(_PAUSE_SECONDS)
    raise AssertionError  # the last try returns or raises


def _open(path: Path, held: HeldFolder, verify: Verify) -> TrimmedFolder:
    manifest = Manifest.read(held.file(MANIFEST_NAME))
    check_files(held, manifest.files, verify)
    held.close()
    if VOCAB_NAME not in manifest.files:
        raise MismatchError(f"{path} has no {VOCAB_NAME} in its manifest: export it again.")
    vocab = load_vocab(held.file(VOCAB_NAME))
    if (len(vocab), vocab.vocab_size) != (manifest.kept, manifest.vocab_size):
        raise MismatchError(
            f"{path}: the vocab keeps {len(vocab):,} of {vocab.vocab_size:,} ids, the manifest says "
            f"{manifest.kept:,} of {manifest.vocab_size:,}: export the folder again."
        )
    if len(vocab.head) != (manifest.head_rows or manifest.kept):
        raise MismatchError(
            f"{path}: the vocab has {len(vocab.head):,} ids for the head, the manifest says "
            f"{manifest.head_rows or manifest.kept:,}: export the folder again."
        )
    return TrimmedFolder(path, manifest, vocab, held)


def _is_current(held: HeldFolder) -> bool:
    """Whether the manifest that was read is still the folder's."""
    try:
        return held.file(MANIFEST_NAME).is_in_place
    except (MismatchError, OSError):
        return False


def list_files(path: Path) -> dict[str, FileEntry]:
    """Size and hash of every file of a folder and of those in it, except the manifest, by name, sorted."""
    return {
        file.relative_to(path).as_posix(): FileEntry(file.stat().st_size, sha256_file(file))
        for file in sorted([*path.iterdir(), *path.glob("*/*")])
        if file.is_file()
        and file.name != MANIFEST_NAME
        and (file.parent == path or is_inner_folder(file.parent.name))
    }
