"""Checkpoints of random bytes for the scripts whose results do not depend on the numbers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from trimserve.files.tensors import CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A float32 tensor of repeated random bytes, streamed so that making it needs no memory either."""

    shape: tuple[int, ...]
    block: bytes
    dtype: str = "F32"

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the bytes, one block at a time."""
        left = 4 * int(np.prod(self.shape))
        while left:
            count = os.write(file.fileno(), self.block[:left])
            left -= count
            yield count


def random_block() -> bytes:
    """The bytes that the tensors repeat: standard normal float32 numbers."""
    return np.random.default_rng(0).standard_normal(CHUNK_BYTES // 4, np.float32).tobytes()
