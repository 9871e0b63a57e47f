"""Signals that end a run: what a program makes of them, and blocks that they wait for."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Ctrl-C; `docker stop`, systemd and `kill`; a terminal that is closed (Windows has no such signal).
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_last: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: whatever cleans up after Ctrl-C cleans up after these too."""


def exit_code() -> int:
    """What a program that was interrupted ends with: 128 and the number of the signal, 130 for Ctrl-C."""
    return 128 + (_last[-1] if _last else signal.SIGINT)


def came() -> bool:
    """Whether a signal has asked this program to end, whatever a library made of the exception since."""
    return bool(_last)


@contextlib.contextmanager
def terminations() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM and SIGHUP: for a program, never for a library.

    A signal that the caller has asked to ignore (nohup) stays ignored. Child processes that are forked do not
    take part: they end as they always did.
    """
    _last.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) in _DEFAULTS:
            before[number] = signal.signal(number, _end)
    if before and hasattr(os, "register_at_fork"):
        _forget_in_children()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


def _end(number: int, _: FrameType | None) -> None:
    _last.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _default_again() -> None:
    _last.clear()
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            ours = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if ours else signal.SIG_DFL)


_registered: list[bool] = []


def _forget_in_children() -> None:
    if not _registered:  # it cannot be taken back
        _registered.append(True)
        os.register_at_fork(after_in_child=_default_again)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and its kin wait until the block is done; only the main thread sees them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    # None: installed by other than Python, which cannot be put back; left as it is.
    held = [number for number in SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda *what: came.append(what)) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            waiting: Any = before[came[0][0]]
            waiting(*came[0])
