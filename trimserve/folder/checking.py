"""Whether a folder's files are the ones that its manifest lists: their sizes, and their hashes."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

from trimserve.errors import MismatchError, UsageError
from trimserve.files.held import HeldFile, HeldFolder
from trimserve.files.verified import REMEMBER_FROM_BYTES, is_remembered, remember
from trimserve.folder.manifest import FileEntry
from trimserve.folder.names import MANIFEST_NAME
from trimserve.process import available_cpus

# full: hash every file. fast: all but those that were hashed before and not written to since. off: sizes.
Verify = Literal["full", "fast", "off"]
VARIABLE = "TRIMSERVE_VERIFY"
_ADVICE = "restore the file or export the folder again."
_MOST_THREADS = 4


def chosen_verify(given: str | None) -> Verify:
    """How thorough to be: as given, else as the environment says, else fast.

    Raises:
        UsageError: a word that is not known.
    """
    word = given if given is not None else os.environ.get(VARIABLE) or "fast"
    for known in get_args(Verify):
        if word == known:
            return known  # type: ignore[no-any-return]
    source = "verify" if given is not None else VARIABLE
    raise UsageError(f"{source} is {word!r}: choose one of {', '.join(get_args(Verify))}.")


def check_files(folder: HeldFolder, entries: Mapping[str, FileEntry], verify: Verify) -> None:
    """Open every file of a folder, and compare it with its entry.

    Args:
        folder: the opened folder.
        entries: name -> what the manifest says.
        verify: see `Verify`.

    Raises:
        MismatchError: a file is missing, was cut off or changed.
    """
    files = [(_opened(folder, name), entry) for name, entry in entries.items()]
    for file, entry in files:
        if file.size != entry.bytes:
            raise MismatchError(
                f"{file.path} should have {entry.bytes:,} bytes but has {file.size:,}: {_ADVICE}"
            )
    if verify == "off":
        return
    large = [pair for pair in files if pair[0].size >= REMEMBER_FROM_BYTES]
    for file, entry in files:
        if file.size < REMEMBER_FROM_BYTES:
            _check_hash(file, entry)
    if verify == "fast":
        large = [(file, entry) for file, entry in large if not is_remembered(file, entry.sha256)]
    # Largest first, so that the last thread is not alone with it.
    large.sort(key=lambda pair: -pair[0].size)
    if len(large) > 1:
        with ThreadPoolExecutor(min(_MOST_THREADS, len(large), available_cpus()), "trimserve-hash") as pool:
            list(pool.map(lambda pair: _check_hash(*pair), large))
    elif large:
        _check_hash(*large[0])
    for file, entry in large:
        remember(file, entry.sha256)


def _opened(folder: HeldFolder, name: str) -> HeldFile:
    try:
        return folder.file(name)
    except (FileNotFoundError, NotADirectoryError):
        raise MismatchError(
            f"{folder.path / name} is listed in {MANIFEST_NAME} but missing: {_ADVICE}"
        ) from None


def _check_hash(file: HeldFile, entry: FileEntry) -> None:
    found = file.sha256()
    file.check_unchanged()
    if found != entry.sha256:
        raise MismatchError(
            f"{file.path} has changed (expected sha256 {entry.sha256[:12]}…, found {found[:12]}…): {_ADVICE}"
        )
