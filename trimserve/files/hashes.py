"""Hashes of files."""

import hashlib
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hash a file's bytes, without loading it; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
