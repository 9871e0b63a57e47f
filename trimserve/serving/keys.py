"""API keys: where they come from, and whether a request has one."""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.files.checked_json import read_bounded

VARIABLE = "TRIMSERVE_API_KEY"
_LARGEST_FILE = 1 << 20


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of a file, one a line (# begins a comment), or those of the environment, with spaces between.

    Raises:
        UsageError: the file has no key, or is no text.
        OSError: it cannot be read.
    """
    if file is None:
        return tuple(environment.get(VARIABLE, "").split())
    try:
        lines = read_bounded(file, most_bytes=_LARGEST_FILE).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: write one key a line.") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{file} holds no key: write one a line, or leave out --api-key-file.")
    return keys


class Keys:
    """The keys that a server takes; only their hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def open(self, authorization: str | None) -> bool:
        """Whether a header ``Authorization: Bearer KEY`` has one of them; no keys let everybody in.

        Takes as long for a wrong key as for a right one, whichever that is.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
