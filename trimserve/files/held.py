"""Files that stay what they were: opened once, checked and read through that, whatever their paths become.

A model reads some of its files long after it was loaded. Were they opened by their paths then, a folder that
was replaced meanwhile would give a mixture of two models. So a folder's files are opened together, small ones
read, and all else comes through the open descriptors, which outlive renaming and removal.
"""

import contextlib
import hashlib
import mmap
import os
import stat
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from trimserve.errors import MismatchError, TrimserveError
from trimserve.files.scratch import scratch_folder

# Up to this size a file is read at once, and needs no descriptor.
SMALL_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
_HASHED_BYTES = 256 << 10
# A pipe that has a file's name must not block; Windows changes line ends without O_BINARY.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_BY_FOLDER = os.open in os.supports_dir_fd
# Of a process that has no other way to read at an offset: seeking and reading are two steps.
_seeking = threading.Lock()


class HeldFile:
    """A file by its descriptor, or by its bytes where it is small.

    Attributes:
        path: where it was when it was opened, as it was given, for messages.
        place: the same, wherever the process goes later.
        status: what the system said of it then.
    """

    def __init__(self, path: Path, *, folder: int | None = None, name: str | None = None) -> None:
        """Open a file.

        Args:
            path: the file.
            folder: a descriptor of a folder, in which `name` is looked up instead of `path`.
            name: see `folder`.

        Raises:
            OSError: there is no such file, or it cannot be read.
            MismatchError: it is a folder or a device.
        """
        self.path = path
        self.place = path.absolute()
        descriptor = os.open(name or path, _FLAGS, dir_fd=folder) if folder is not None else _open(path)
        self._close = weakref.finalize(self, os.close, descriptor)
        self._close.atexit = False
        self._descriptor = descriptor
        self._content: bytes | None = None
        self._map: mmap.mmap | None = None
        self.status = os.fstat(descriptor)
        if not stat.S_ISREG(self.status.st_mode):
            raise MismatchError(f"{path} is not a regular file: put the file itself there.")
        if self.size <= SMALL_BYTES:
            self._content = self._pread(0, self.size)
            self._close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.status.st_size

    def read(self, offset: int = 0, count: int | None = None) -> bytes:
        """Bytes from an offset; fewer than asked for at the end of the file."""
        count = self.size - offset if count is None else min(count, self.size - offset)
        if self._content is not None:
            return self._content[offset : offset + count]
        return self._pread(offset, count)

    def read_text(self) -> str:
        """The file as UTF-8 text.

        Raises:
            MismatchError: it is not UTF-8.
        """
        try:
            return self.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise MismatchError(
                f"{self.path} is not UTF-8 text ({error}): export the folder again."
            ) from error

    def map(self) -> mmap.mmap | bytes:
        """The whole file, mapped read-only without reading it; the bytes of a small one."""
        if self._content is not None:
            return self._content
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
        return self._map

    def drop_pages(self) -> None:
        """Give back the pages of the map that were read: they come again from the system's cache, or disk.

        Does nothing where the system has no such call.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sha256(self) -> str:
        """Hash the bytes, hexadecimal; without loading them."""
        if self._content is not None:
            return hashlib.sha256(self._content).hexdigest()
        digest, offset = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_HASHED_BYTES))  # one: threads that allocate keep what they free
        while count := self._read_into(buffer, offset):
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            MismatchError: its size or its time of change is another.
        """
        if self._content is None and not _same(os.fstat(self._descriptor), self.status):
            raise MismatchError(
                f"{self.path} was changed after it was opened: load the folder again, and replace files "
                "instead of writing into them."
            )

    @property
    def is_in_place(self) -> bool:
        """Whether its path still leads to this file, and to what was in it."""
        try:
            return _same(self.place.stat(), self.status)
        except OSError:
            return False

    def copy_to(self, path: Path) -> None:
        """Copy the bytes into a new file."""
        with path.open("xb") as target:
            for offset in range(0, self.size, _CHUNK_BYTES):
                target.write(self.read(offset, _CHUNK_BYTES))

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        chunk = _read_at(self._descriptor, len(buffer), offset)
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def _pread(self, offset: int, count: int) -> bytes:
        parts = []
        while count and (part := _read_at(self._descriptor, count, offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _open(path: Path) -> int:
    return os.open(path, _FLAGS)


def _read_at(descriptor: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


def _same(found: os.stat_result, known: os.stat_result) -> bool:
    return os.path.samestat(found, known) and (found.st_size, found.st_mtime_ns) == (
        known.st_size,
        known.st_mtime_ns,
    )


class HeldFolder:
    """Files of one folder, opened through one descriptor of it: all of them are of the same folder.

    Attributes:
        path: where it was when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            OSError: there is none.
        """
        self.path = path
        self._files: dict[str, HeldFile] = {}
        self._closed = False
        self._descriptor: int | None = None
        if _BY_FOLDER:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            self._close.atexit = False

    def file(self, name: str) -> HeldFile:
        """A file of the folder, opened when it is first asked for.

        Args:
            name: a plain name, or one in a folder within.

        Raises:
            OSError: there is none, or it cannot be read.
            MismatchError: it is not a regular file.
        """
        if name not in self._files:
            if self._closed:
                raise MismatchError(
                    f"{self.path} was opened without {name}, which its manifest does not list: export it "
                    "again."
                )
            self._files[name] = HeldFile(self.path / name, folder=self._descriptor, name=name)
        return self._files[name]

    def graph(self, name: str) -> "HeldGraph":
        """A graph of the folder with the files that it may read its weights from."""
        inner = name.rpartition("/")[0]
        beside = {
            file.path.name: file for other, file in self._files.items() if other.rpartition("/")[0] == inner
        }
        return HeldGraph(self.file(name), beside)

    def close(self) -> None:
        """Open nothing more; what is open stays so."""
        self._closed = True
        if self._descriptor is not None:
            self._close()
            self._descriptor = None


class HeldGraph:
    """An ONNX graph and its external data, which ONNX Runtime opens by their paths alone.

    Attributes:
        file: the graph.
    """

    def __init__(self, file: HeldFile, beside: dict[str, HeldFile]) -> None:
        self.file = file
        self._beside = beside

    @property
    def path(self) -> Path:
        """Where the graph was when it was opened."""
        return self.file.path

    @property
    def is_in_place(self) -> bool:
        """Whether the paths of the graph and of its data still lead to these files.

        Where that holds before and after somebody opened the paths, these files were opened.

        Raises:
            MismatchError: one of them was written to since it was opened.
        """
        files = (self.file, *self._beside.values())
        for file in files:
            file.check_unchanged()
        return all(file.is_in_place for file in files)

    @property
    def is_together(self) -> bool:
        """Whether graph and data lie in one folder, behind the links that may lead to them.

        So it is in the hub's cache, where each file of a snapshot is a link to one in `blobs`.
        """
        files = (self.file, *self._used())
        return len({file.place.resolve().parent for file in files}) == 1

    def _used(self) -> list[HeldFile]:
        """Those of the files beside it whose names stand in the graph."""
        content = self.file.map()
        return [
            file
            for name, file in self._beside.items()
            if file is not self.file and content.find(name.encode()) >= 0
        ]

    @contextlib.contextmanager
    def copied(self) -> Iterator[Path]:
        """Give the path of a copy of the graph, its data beside it, for as long as the block takes.

        The copy is on disk and not in memory: what maps it can drop its pages.

        Raises:
            TrimserveError: there is no room for it.
        """
        with contextlib.ExitStack() as stack:
            try:
                target = stack.enter_context(scratch_folder("held"))
                for file in (self.file, *self._used()):
                    file.copy_to(target / file.path.name)
            except OSError as error:
                raise TrimserveError(
                    f"{self.path} was replaced after it was loaded, and {tempfile.gettempdir()} has no room "
                    f"for a copy of it ({error.strerror}): load the folder again, or set TMPDIR."
                ) from error
            yield target / self.path.name
