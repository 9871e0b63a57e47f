"""GGUF files written: metadata, and tensors that are streamed into the file one after the other.

The format is that of `trimserve.files.gguf`, version 3, little-endian.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError
from trimserve.files.ggml_blocks import GGML_TYPES, GgmlType
from trimserve.files.gguf import ALIGNMENT, MAGIC, GgufTensor
from trimserve.files.tensors import CHUNK_BYTES

_VERSION: Final = 3
_CODES: Final = {kind.name: code for code, kind in GGML_TYPES.items()}
_TYPES: Final = {"U32": 4, "I32": 5, "F32": 6, "BOOL": 7, "STRING": 8, "ARRAY": 9}
_ARRAYS: Final = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}


class GgmlSource(Protocol):
    """A tensor that can be streamed into a file: its format, its shape, its blocks."""

    @property
    def kind(self) -> GgmlType:
        """The format of its numbers."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major, as in numpy."""
        ...

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append its bytes to a file, a bounded chunk at a time; yield their sizes."""
        ...


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a tensor of another file, their blocks as they are.

    Attributes:
        tensor: the stored tensor.
        rows: which ones, int (n,); None for all.
    """

    tensor: GgufTensor
    rows: npt.NDArray[np.integer[Any]] | None = None

    @property
    def kind(self) -> GgmlType:
        """The format of its numbers."""
        return self.tensor.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape with as many rows as are taken."""
        return self.tensor.shape if self.rows is None else (len(self.rows), *self.tensor.shape[1:])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """See `GgmlSource`."""
        stored = self.tensor.mapped()
        count = len(stored) if self.rows is None else len(self.rows)
        for part in row_slices(count, stored.shape[1]):
            yield file.write(np.ascontiguousarray(stored[part if self.rows is None else self.rows[part]]))


def row_slices(count: int, row_bytes: int) -> Iterator[slice]:
    """Cut `count` rows into slices of a bounded number of bytes."""
    step = max(1, CHUNK_BYTES // max(row_bytes, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def encode_value(value: object) -> bytes:
    """A metadata value with its type: bool, uint32, float32, str, a list of str, an int32 or float32 array.

    Raises:
        ValueError: of no such type, or a whole number that is no uint32.
    """
    if isinstance(value, bool):
        return _typed("BOOL", struct.pack("<B", value))
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return _typed("U32", struct.pack("<I", value))
    if isinstance(value, float):
        return _typed("F32", struct.pack("<f", value))
    if isinstance(value, str):
        return _typed("STRING", _string(value))
    if isinstance(value, np.ndarray) and value.dtype in _ARRAYS:
        return _array(_ARRAYS[value.dtype], len(value), value.tobytes())
    if isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value):
        return _array("STRING", len(value), b"".join(map(_string, value)))
    raise ValueError(f"GGUF metadata cannot be written of {str(value)[:60]!r}")


def _typed(name: str, data: bytes) -> bytes:
    return struct.pack("<I", _TYPES[name]) + data


def _array(name: str, count: int, data: bytes) -> bytes:
    return _typed("ARRAY", struct.pack("<IQ", _TYPES[name], count) + data)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def write_gguf(
    path: Path,
    metadata: Mapping[str, bytes],
    tensors: Mapping[str, GgmlSource],
    *,
    alignment: int = ALIGNMENT,
) -> Iterator[int]:
    """Stream a model into a new file; a generator to be run to its end.

    Args:
        path: the file.
        metadata: key -> type and value, see `encode_value` and `GgufFile.stored`.
        tensors: llama.cpp's name -> tensor.
        alignment: what `general.alignment` says, if that is among the metadata.

    Yields:
        The bytes of each chunk of a tensor as it is written.

    Raises:
        MismatchError: a tensor gave other bytes than its shape says: a source changed.
    """
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    header += b"".join(_string(key) + value for key, value in metadata.items())
    offset, sizes = 0, {}
    for name, tensor in tensors.items():
        sizes[name] = _bytes_of(tensor)
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        header += _string(name) + shape + struct.pack("<IQ", _CODES[tensor.kind.name], offset)
        offset += sizes[name] + -sizes[name] % alignment
    with path.open("wb") as file:
        file.write(header + bytes(-len(header) % alignment))
        for name, tensor in tensors.items():
            written = 0
            for count in tensor.write_to(file):
                written += count
                yield count
            if written != sizes[name]:
                raise MismatchError(
                    f"{name} should take {sizes[name]:,} bytes but {written:,} came: its source changed."
                )
            file.write(bytes(-written % alignment))


def _bytes_of(tensor: GgmlSource) -> int:
    *rows, width = tensor.shape
    return int(np.prod(rows, dtype=np.int64)) * (width // tensor.kind.numbers) * tensor.kind.nbytes
