"""Two files or folders change places in one step, where the system has that."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD = -100
_LINUX_EXCHANGE = 2
_MACOS_SWAP = 2
# An old kernel or C library, a sandbox, a file system that cannot.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths of one folder change places: at no moment is either missing.

    Returns:
        Whether it was done; False where this system or file system has no such call.

    Raises:
        OSError: the system has it, and it failed: nothing was changed.
    """
    call = _system_call()
    if call is None:
        return False
    sys.audit("trimserve.exchange", str(one), str(other))
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


@cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform == "linux"
    function = getattr(library, "renameat2" if linux else "renamex_np", None)
    if function is None:  # a C library from before 2018
        return None
    function.restype = ctypes.c_int
    if not linux:
        function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return lambda one, other: int(function(one, other, _MACOS_SWAP))
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return lambda one, other: int(function(_AT_FDCWD, one, _AT_FDCWD, other, _LINUX_EXCHANGE))
