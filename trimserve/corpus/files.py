"""Which files a corpus names: paths, folders, globs and hub datasets, each with its format."""

import glob
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimserve.corpus.walking import files_below, glob_paths
from trimserve.errors import MismatchError, UsageError, require
from trimserve.files.hub import fetch_snapshot

STDIN = "-"
HUB = "hf://"
Format = Literal["text", "jsonl", "csv", "tsv", "parquet"]
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
_FORMATS: dict[str, Format] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys(JSONL_SUFFIXES, "jsonl"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
KNOWN = ", ".join(_FORMATS)
_HUB_NAME = re.compile(
    r"(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<files>.+))?"
)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of the corpus.

    Attributes:
        name: as the user knows it, for messages and the profile.
        path: where it lies.
        format: what its rows are.
        compression: ".gz", ".zst" or "".
        bytes: its length.
        modified: when it was last written, in ns; 0 if not known.
    """

    name: str
    path: str
    format: Format
    compression: str
    bytes: int
    modified: int = 0


def check_unchanged(file: CorpusFile) -> None:
    """Refuse a file that was written since it was found: what was read of it may be neither old nor new.

    Raises:
        MismatchError: its length or its time differs.
        OSError: it has gone.
    """
    status = Path(file.path).stat()
    if status.st_size != file.bytes or (file.modified and status.st_mtime_ns != file.modified):
        raise changed(file)


def changed(file: CorpusFile) -> MismatchError:
    """The error of a file that changes while it is read."""
    return MismatchError(
        f"{file.name} changed while it was read: run this again when nothing writes to it, or on a copy."
    )


def find_files(names: Sequence[str]) -> list[CorpusFile]:
    """Find the files that names of a corpus stand for, in order; of folders and globs sorted by path.

    Args:
        names: files, folders, globs, ``hf://[datasets/]OWNER/NAME[@REVISION][/GLOB]``. Not "-".

    Raises:
        UsageError: a name stands for no file, or for one of an unknown format.
        MissingExtraError: a hub dataset, and huggingface_hub is not installed.
    """
    return [file for name in names for file in _find(name)]


def _find(name: str) -> Iterator[CorpusFile]:
    if name.startswith(HUB):
        yield from _hub_files(name)
    elif Path(name).is_dir():
        yield from _folder_files(Path(name), name)
    elif Path(name).is_file():
        yield corpus_file(name, name)
    elif glob.has_magic(name):
        found = [path for path in glob_paths(name) if Path(path).is_file()]
        if not found:
            raise UsageError(f"no file matches {name}: check the pattern.")
        yield from (corpus_file(path, path) for path in found)
    elif Path(name).exists():
        raise UsageError(f"{name} is {_kind(Path(name))}, no file: pipe its content in and name it -.")
    else:
        raise UsageError(f"{name} does not exist: name a file ({KNOWN}), a folder, a glob, or - for stdin.")


def corpus_file(path: str, name: str) -> CorpusFile:
    """Describe a file by its suffixes.

    Raises:
        UsageError: the format is not known.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    format_ = _FORMATS.get(suffixes[-1] if suffixes else "")
    if format_ is None or (format_ == "parquet" and compression):
        raise UsageError(
            f"{name} has none of the formats {KNOWN} (all but parquet also {' or '.join(COMPRESSIONS)}): "
            "convert it or pipe it in as -."
        )
    status = Path(path).stat()
    return CorpusFile(name, path, format_, compression, status.st_size, status.st_mtime_ns)


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _folder_files(folder: Path, name: str) -> Iterator[CorpusFile]:
    """The files below a folder whose format is known."""
    empty = True
    for path in files_below(folder):
        if _is_known(path):
            empty = False
            yield corpus_file(str(path), f"{name.rstrip('/')}/{path.relative_to(folder).as_posix()}")
    if empty:
        raise UsageError(f"{name} holds no file of the formats {KNOWN}: name another folder.")


def _is_known(path: Path) -> bool:
    stem = path.name.lower()
    for compression in COMPRESSIONS:
        stem = stem.removesuffix(compression)
    return Path(stem).suffix in _FORMATS and not (stem != path.name.lower() and stem.endswith(".parquet"))


def _hub_files(name: str) -> Iterator[CorpusFile]:
    """Fetch a hub dataset into the hub's cache and list its files."""
    hub = require("huggingface_hub", extra="hub", purpose=f"reading {name}")
    match = _HUB_NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise UsageError(f"{name} should read {HUB}OWNER/NAME[@REVISION][/FILES]: check the name.")
    repo, files = match["repo"], match["files"]
    wanted = (
        [files, f"{files}/**"]
        if files
        else [f"*{suffix}{end}" for suffix in _FORMATS for end in ("", ".gz", ".zst")]
    )
    root = fetch_snapshot(
        hub, repo, refused=name, repo_type="dataset", revision=match["revision"], allow_patterns=wanted
    )
    matched = sorted(root.glob(files)) if files else [root]
    if not matched:
        raise UsageError(f"{name}: the dataset has no such file. Look at its list of files on the hub.")
    prefix = f"{HUB}{repo}" + (f"@{match['revision']}" if match["revision"] else "")
    for found in matched:
        below = found.relative_to(root).as_posix()
        label = prefix if below == "." else f"{prefix}/{below}"
        yield from _folder_files(found, label) if found.is_dir() else [corpus_file(str(found), label)]


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """A file that was read: its name as given, the sha256 and the number of its bytes."""

    name: str
    sha256: str
    bytes: int
