"""A trimmed folder: `trimserve.json`, the hashes of its files, and what does not fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimserve.errors import MismatchError
from trimserve.files.hashes import sha256_file
from trimserve.files.model_json import read_model_json
from trimserve.folder.manifest import FileEntry, Manifest, read_manifest
from trimserve.folder.names import COLD_NAME, MANIFEST_NAME, TOKENIZER_NAME, VOCAB_NAME, is_inner_folder
from trimserve.folder.tokenizer_settings import declared_settings
from trimserve.vocab.file import load_vocab
from trimserve.vocab.map import VocabMap

# Hashing a larger file would cost more than loading it; `verify` hashes everything.
HASH_ON_LOAD_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class TrimmedFolder:
    """An opened and checked folder."""

    path: Path
    manifest: Manifest
    vocab: VocabMap

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            MismatchError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise MismatchError(f"{self.path} has no {name} in its manifest: export it again.")
        return self.path / name

    def read_text(self, name: str) -> str | None:
        """A text file of the source model; None where the folder has none.

        Raises:
            MismatchError: it is not UTF-8.
        """
        if name not in self.manifest.files:
            return None
        try:
            return (self.path / name).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise MismatchError(
                f"{self.path / name} is not UTF-8 ({error}): export the folder again."
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the source model, checked; empty where the folder has none.

        Raises:
            MismatchError: see `read_model_json`.
        """
        if name not in self.manifest.files:
            return {}
        return read_model_json(self.path / name, advice="export the folder again.")

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer that counts: tokenizer.json, or the effective one beside it."""
        return self.file(self.manifest.tokenizer.get("file", TOKENIZER_NAME))

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


def open_folder(path: Path, *, hash_all: bool = False) -> TrimmedFolder:
    """Open a trimmed folder and check that its files are the ones it was written with.

    Args:
        path: the folder.
        hash_all: hash every file; otherwise those of at most `HASH_ON_LOAD_BYTES`, and sizes of all.

    Raises:
        UsageError: not a trimmed folder.
        MismatchError: a file is missing, was cut off or changed, or the vocab does not fit.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, hash_all)
    vocab = load_vocab(path / VOCAB_NAME)
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
    return TrimmedFolder(path, manifest, vocab)


def _check_file(path: Path, entry: FileEntry, hash_all: bool) -> None:
    advice = "restore the file or export the folder again."
    if not path.is_file():
        raise MismatchError(f"{path} is listed in {MANIFEST_NAME} but missing: {advice}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise MismatchError(f"{path} should have {entry.bytes:,} bytes but has {size:,}: {advice}")
    if (hash_all or size <= HASH_ON_LOAD_BYTES) and (found := sha256_file(path)) != entry.sha256:
        raise MismatchError(
            f"{path} has changed (expected sha256 {entry.sha256[:12]}…, found {found[:12]}…): {advice}"
        )


def list_files(path: Path) -> dict[str, FileEntry]:
    """Size and hash of every file of a folder and of those in it, except the manifest, by name, sorted."""
    return {
        file.relative_to(path).as_posix(): FileEntry(file.stat().st_size, sha256_file(file))
        for file in sorted([*path.iterdir(), *path.glob("*/*")])
        if file.is_file()
        and file.name != MANIFEST_NAME
        and (file.parent == path or is_inner_folder(file.parent.name))
    }
