"""What native libraries print to stderr, without the notes of Rust panics that become errors of trimserve.

The tokenizers library prints "thread … panicked at …" before its panic reaches Python, past `sys.stderr`:
users would read three lines of Rust before the one sentence that says what is wrong.
"""

import os
import re
import signal
import sys
from typing import NoReturn

_STDERR = 2
_HEADER = re.compile(rb"thread '.*' (\(\d+\) )?panicked at ")
_NOTE = b"note: run with `RUST_BACKTRACE="
# How a note's lines begin, and the empty line before it.
_STARTS = (b"thread '", _NOTE)


class PanicFilter:
    """Takes a stream of bytes and gives it back without the notes of panics.

    A note is an empty line, a line that says where, one with the message, and a hint at RUST_BACKTRACE.
    """

    def __init__(self) -> None:
        self._held = b""  # of the last line, while it may be a note's
        self._blank = b""  # an empty line that may belong to a note
        self._given = 0  # bytes of the last line that were given already
        self._skips_message = False
        self._hint_may_follow = False

    def feed(self, data: bytes) -> bytes:
        """The bytes that can be given by now."""
        *lines, rest = (self._held + data).split(b"\n")
        given = [self._whole(line) for line in lines]
        self._held = rest
        if rest and not self._may_be_a_notes(rest):
            given.append(self._take_blank() + rest[self._given :])
            self._given = len(rest)
        return b"".join(given)

    def flush(self) -> bytes:
        """What is left at the end of the stream."""
        rest, given = self._held, self._given
        self._held, self._given = b"", 0
        return self._take_blank() + rest[given:]

    def _whole(self, line: bytes) -> bytes:
        given, self._given = self._given, 0
        if given:
            return line[given:] + b"\n"
        if self._skips_message:
            self._skips_message = False
            return b""
        if _HEADER.match(line):
            # Before Rust 1.73 the message stood in the same line.
            self._skips_message, self._hint_may_follow, self._blank = line.endswith(b":"), True, b""
            return b""
        if self._hint_may_follow and line.startswith(_NOTE):
            return b""
        self._hint_may_follow = False
        before = self._take_blank()
        if not line:
            self._blank = b"\n"
            return before
        return before + line + b"\n"

    def _may_be_a_notes(self, start: bytes) -> bool:
        if self._given:
            return False
        return self._skips_message or any(start.startswith(one) or one.startswith(start) for one in _STARTS)

    def _take_blank(self) -> bytes:
        blank, self._blank = self._blank, b""
        return blank


def hide_panics() -> None:
    """Filter file descriptor 2 of this process and of those that it starts; `sys.stderr` is not filtered.

    A process of its own reads what is written there, so that the last words of a process that dies are not
    lost. It ends when nobody can write any more. Only for a program that has one thread so far; with
    TRIMSERVE_DEBUG=1, and on Windows, nothing is hidden.
    """
    if os.environ.get("TRIMSERVE_DEBUG") == "1" or sys.platform == "win32" or sys.stderr is None:
        return
    try:
        real = os.dup(_STDERR)
    except OSError:  # stderr is closed
        return
    sys.stderr.flush()
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        _start_reader(reads, writes, real)
    os.waitpid(child, 0)
    os.dup2(writes, _STDERR)
    os.close(reads)
    os.close(writes)
    os.environ["RUST_BACKTRACE"] = "0"  # a developer's shell may ask for fifty lines more
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    sys.stderr = os.fdopen(real, "w", buffering=1, encoding=encoding, errors=errors)


def _start_reader(reads: int, writes: int, real: int) -> NoReturn:
    """In a child: leave the reading to a child of its own, which nobody has to wait for."""
    try:
        if os.fork() == 0:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            for open_elsewhere in (0, 1, _STDERR, writes):
                os.close(open_elsewhere)
            _forward(reads, real)
    finally:
        os._exit(0)


def _forward(reads: int, real: int) -> None:
    panics = PanicFilter()
    while data := os.read(reads, 1 << 16):
        _write(real, panics.feed(data))
    _write(real, panics.flush())


def _write(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]
