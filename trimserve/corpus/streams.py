"""Files as streams of bytes: hashed, decompressed in bounded memory, and whole or refused."""

import hashlib
import io
import zlib
from collections.abc import Generator
from typing import IO, Any

from trimserve.errors import UsageError, require
from trimserve.foreign import foreign

_BLOCK_BYTES = 1 << 20
_INPUT_BYTES = 1 << 16
# What zstd itself decodes without being told otherwise: `zstd --long=27`.
MAX_WINDOW = 1 << 27
_ZSTD = 0xFD2FB528
_ZSTD_SKIPPABLE = 0x184D2A5  # and four bits
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
AGAIN = "fetch or make it again."


class Section(io.RawIOBase):
    """A stretch of a file that hashes what it gives.

    Attributes:
        digest: sha256 of the bytes read so far.
        count: their number.
    """

    def __init__(self, file: IO[bytes], end: int | None = None) -> None:
        """Read `file` from where it stands up to the offset `end`, or to its end."""
        self._file = file
        self._left = None if end is None else max(end - file.tell(), 0)
        self.digest = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        """Read up to the buffer's length."""
        wanted = len(buffer) if self._left is None else min(len(buffer), self._left)
        block = self._file.read(wanted)
        buffer[: len(block)] = block
        self.digest.update(block)
        self.count += len(block)
        if self._left is not None:
            self._left -= len(block)
        return len(block)


def open_section(section: Section, compression: str, name: str) -> IO[bytes]:
    """The content of a section, decompressed and buffered.

    Args:
        section: the file.
        compression: ".gz", ".zst" or "".
        name: of the file, for messages.

    Raises:
        MissingExtraError: zstandard is not installed.
        UsageError: it is compressed in another way than said.

    Reading the stream raises UsageError where the file ends early, is damaged, or has something else behind
    its last frame.
    """
    buffered = io.BufferedReader(section, _BLOCK_BYTES)
    if compression == ".gz":
        return io.BufferedReader(_Gzip(buffered, name), _BLOCK_BYTES)
    if compression == ".zst":
        return io.BufferedReader(_Zstd(buffered, name), _BLOCK_BYTES)
    # Neither is UTF-8, so no text begins with it.
    if hidden := next((kind for magic, kind in _MAGIC.items() if buffered.peek(4).startswith(magic)), None):
        raise UsageError(
            f"{name} is compressed with {hidden}, and its name does not say so: rename it with {hidden} at "
            "its end, or decompress it."
        )
    return buffered


class _Gzip(io.RawIOBase):
    """The members of a gzip file, one behind the other; zeros may pad its end."""

    def __init__(self, source: IO[bytes], name: str) -> None:
        self._source, self._name = source, name
        self._member: Any = None  # zlib has no name for its type
        self._input = b""
        self._taken = 0
        self._begun = False

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        """Decompress up to the buffer's length; 0 at the end of the last member."""
        while True:
            if not self._input:
                self._input = self._source.read(_INPUT_BYTES)
                self._taken += len(self._input)
                if not self._input:
                    return self._end()
            if self._member is None and not self._begin():
                continue
            place = f"behind byte {self._taken - len(self._input):,}"
            with foreign(f"{self._name} is no whole gzip file, {place}", advice=AGAIN, error=UsageError):
                content = self._member.decompress(self._input, len(buffer))
            if self._member.eof:
                self._input, self._member = self._member.unused_data, None
            else:
                self._input = self._member.unconsumed_tail
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _begin(self) -> bool:
        """Begin a member, unless nothing but padding is at hand."""
        if self._begun:
            self._input = self._input.lstrip(b"\0")
        if self._input:
            self._member, self._begun = zlib.decompressobj(16 + zlib.MAX_WBITS), True
        return bool(self._input)

    def _end(self) -> int:
        if self._member is not None or not self._begun:
            raise _cut_short(self._name, self._taken, "gzip")
        return 0


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, one behind the other."""

    def __init__(self, source: IO[bytes], name: str) -> None:
        zstandard = require("zstandard", extra="corpus", purpose=f"reading {name}")
        self._name = name
        self._frames = _Frames(source, name)
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._plain = decompressor.stream_reader(self._frames, read_across_frames=True)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        """Decompress up to the buffer's length; 0 at the end of the last frame."""
        place = f"near byte {self._frames.taken:,}"
        with foreign(f"{self._name} is no whole zstd file, {place}", advice=AGAIN, error=UsageError):
            content = self._plain.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Frames:
    """Passes a zstd file on, and follows its frames (RFC 8878): zstandard takes an early end for the end.

    Attributes:
        taken: bytes passed on.
    """

    def __init__(self, source: IO[bytes], name: str) -> None:
        self._source, self._name = source, name
        self.taken = 0
        self._skip = 0
        self._head = b""
        self._offset = 0  # of what the grammar has seen
        self._grammar = self._parts()
        self._wanted = next(self._grammar)
        self._whole = False  # between two frames, at least one of which has been seen

    def read(self, size: int) -> bytes:
        """Read for zstandard.

        Raises:
            UsageError: the file ends within a frame, or goes on with something else than a frame.
        """
        block = self._source.read(size)
        if not block and not (self._whole and not self._head and not self._skip):
            raise _cut_short(self._name, self.taken, "zstd")
        self._follow(block)
        self.taken += len(block)
        return block

    def _follow(self, block: bytes) -> None:
        at = 0
        while at < len(block):
            if self._skip:
                step = min(self._skip, len(block) - at)
                self._skip -= step
                at += step
                continue
            piece = block[at : at + self._wanted - len(self._head)]
            self._head += piece
            at += len(piece)
            self._offset = self.taken + at
            if len(self._head) < self._wanted:
                return
            head, self._head = self._head, b""
            self._wanted = self._grammar.send(head)
            while self._wanted <= 0:
                self._skip -= self._wanted
                self._wanted = self._grammar.send(b"")

    def _parts(self) -> Generator[int, bytes, None]:
        """Yields how many bytes it wants to see, or as a negative number, how many it does not."""
        while True:
            magic = int.from_bytes((yield 4), "little")
            self._whole = False
            if magic >> 4 == _ZSTD_SKIPPABLE:
                yield -int.from_bytes((yield 4), "little")
            elif magic == _ZSTD:
                yield from self._frame()
            else:
                raise UsageError(
                    f"{self._name} holds something else than zstd behind byte {self._offset - 4:,}: {AGAIN}"
                )
            self._whole = True

    def _frame(self) -> Generator[int, bytes, None]:
        descriptor = (yield 1)[0]
        single = bool(descriptor & 0x20)
        if not single:
            code = (yield 1)[0]
            window = (1 << (10 + (code >> 3))) // 8 * (8 + (code & 7))
            if window > MAX_WINDOW:
                raise UsageError(
                    f"{self._name} takes {window >> 20:,} MiB to decompress, the limit is "
                    f"{MAX_WINDOW >> 20} MiB: compress it with a smaller window (zstd --long=27)."
                )
        size_code = descriptor >> 6
        content_size = (1 if single else 0) if size_code == 0 else 1 << size_code
        yield -((0, 1, 2, 4)[descriptor & 3] + content_size)
        last = False
        while not last:
            block = int.from_bytes((yield 3), "little")
            last, kind = bool(block & 1), block >> 1 & 3
            yield -(1 if kind == 1 else block >> 3)  # a run is one byte, repeated
        if descriptor & 4:
            yield -4


def _cut_short(name: str, taken: int, kind: str) -> UsageError:
    if taken == 0:
        return UsageError(f"{name} is empty, which no {kind} file is: {AGAIN}")
    return UsageError(f"{name} ends early, at byte {taken:,}, within its {kind} data: {AGAIN}")


def drain(section: Section) -> None:
    """Read a section to its end: a decompressor may leave bytes behind the last frame."""
    while section.read(_BLOCK_BYTES):
        pass
