"""Keep stdout for a command's data: what anything else prints, Python or native code, goes to stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_STDOUT, _STDERR = 1, 2
# Where data goes while `data_only` is in force.
_streams: list[TextIO] = []


def data_stream() -> TextIO | None:
    """The stream for data: the stdout that the caller had, whatever it points to now; None if closed."""
    return _streams[-1] if _streams else sys.stdout


@contextlib.contextmanager
def data_only(*, utf8: bool = False, restore: bool = True) -> Iterator[None]:
    """Send file descriptor 1 and `sys.stdout` to stderr; `data_stream()` alone writes to the real stdout.

    Native libraries print to the descriptor, past Python: `tokenizers` does for a vocab with holes.

    Args:
        utf8: write data in UTF-8, as JSON is, instead of the terminal's encoding. What the encoding has not
            (an undecodable file name, a letter on an ASCII terminal) becomes an escape, as JSON has it.
        restore: give both back at the end. A program leaves it out: what a C library holds in its own buffer
            is written when the process ends.
    """
    if sys.stdout is None:  # the caller closed it
        yield
        return
    sys.stdout.flush()
    data = _writer(sys.stdout, utf8=utf8)
    saved = _divert()
    _streams.append(data)
    outer = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
        data.flush()
    finally:
        _streams.pop()
        if data is not outer:
            with contextlib.suppress(OSError):  # a flush that failed has been raised already
                data.close()
        if restore or saved is None:
            sys.stdout = outer
        if restore and saved is not None:
            os.dup2(saved, _STDOUT)
        if saved is not None:
            os.close(saved)


def _writer(stream: TextIO, *, utf8: bool) -> TextIO:
    """A stream of its own on the real stdout; a caller's replacement (a string buffer) as it is."""
    try:
        number = stream.fileno()
    except (OSError, AttributeError, ValueError):
        return stream
    if number != _STDOUT:
        return stream
    encoding = "utf-8" if utf8 else stream.encoding
    return os.fdopen(os.dup(number), "w", encoding=encoding, errors="backslashreplace")


def _divert() -> int | None:
    """Let descriptor 1 go where 2 goes, or nowhere; returns a copy of the old one."""
    try:
        saved = os.dup(_STDOUT)
    except OSError:
        return None
    try:
        os.dup2(_STDERR, _STDOUT)
    except OSError:  # stderr is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
    return saved
