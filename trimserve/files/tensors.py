"""Safetensors files as byte ranges: read a header, map a tensor, stream rows from file to file.

The safetensors package loads and saves whole tensors; trimming needs less: rows of a matrix that is
never in memory as a whole, in any dtype (numpy has no bfloat16), copied byte for byte. Format:
https://github.com/huggingface/safetensors#format
"""

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import IO, Annotated, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.checked_json import convert_json, parse_json
from trimserve.files.content import check_content
from trimserve.files.held import HeldFile

# The numpy dtype that holds the bytes of a safetensors dtype; bfloat16 and float8 as raw bits.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_BYTES = 1 << 62  # what offsets within a file can be, with room for sums
_LONGEST_SHOWN = 200
_AGAIN = "Fetch or make it again."
# numpy's arrays have at most 64 axes; a product of sizes is computed in Python's integers, which do not wrap.
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST_BYTES)]
_Shape = Annotated[list[_Count], msgspec.Meta(max_length=32)]


class _Entry(msgspec.Struct):
    """A tensor in a header."""

    dtype: str
    shape: _Shape
    data_offsets: tuple[_Count, _Count]


CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies: `nbytes` bytes at `offset` of `path`, row-major; `dtype` in safetensors' words.

    `file` is the opened file where there is one: what is mapped is then what was opened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    file: HeldFile | None = field(default=None, compare=False, repr=False)


class TensorSource(Protocol):
    """Something that `write_tensors` can stream into a file: its dtype, its shape, its bytes."""

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it will be stored."""
        ...

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the tensor's bytes to an unbuffered file, a bounded chunk at a time; yield their sizes."""
        ...


def read_header(path: Path | HeldFile) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Read the header of a safetensors file.

    Args:
        path: the file; of an opened one the tensors are mapped through what was opened.

    Returns:
        The tensors by name, in file order, and the file's metadata.

    Raises:
        MismatchError: the file is not safetensors, is shorter than its header says, or its tensors overlap
            or leave bytes between them.
        UnsupportedModelError: a tensor is of a dtype that is not known here, as only quantised ones are.
    """
    file = path if isinstance(path, HeldFile) else HeldFile(path)
    size, shown = file.size, file.path
    length = int.from_bytes(file.read(0, 8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        check_content(file)
        raise MismatchError(
            f"{shown} is not a safetensors file or was cut off: its header should take "
            f"{length:,} bytes, the file has {size:,}. {_AGAIN}"
        )
    origin = f"{shown}: the safetensors header"
    content = parse_json(file.read(8, length), origin)
    if not isinstance(content, dict):
        raise MismatchError(f"{origin} is not an object of tensors: {_AGAIN}")
    metadata = convert_json(content.pop("__metadata__", {}), dict[str, str], origin)
    entries = convert_json(content, dict[str, _Entry], origin)
    kept = file if isinstance(path, HeldFile) else None
    specs = {name: _spec(shown, name, entry, 8 + length, kept) for name, entry in entries.items()}
    end = _covered(specs.values(), shown, 8 + length)
    if end != size:
        raise MismatchError(
            f"{shown} should have {end:,} bytes by its header but has {size:,}: "
            f"it was cut off or changed. {_AGAIN}"
        )
    return specs, metadata


def _spec(path: Path, name: str, entry: _Entry, base: int, file: HeldFile | None) -> TensorSpec:
    begin, end = entry.data_offsets
    shown = _shown(name)
    if entry.dtype not in STORAGE_DTYPES:
        raise UnsupportedModelError(
            f"{path}: {shown} is stored as {_shown(entry.dtype)}, a number format of quantised weights, "
            "which trimserve does not read: pass the floating-point model that it was made from."
        )
    shape, itemsize = tuple(entry.shape), STORAGE_DTYPES[entry.dtype].itemsize
    # numpy takes no array whose other sizes overflow, even where one of them is 0.
    if math.prod(size or 1 for size in shape) * itemsize > _MOST_BYTES:
        raise MismatchError(f"{path}: {shown} of shape {shape} is larger than any file. {_AGAIN}")
    nbytes = math.prod(shape) * itemsize
    if end - begin != nbytes:
        raise MismatchError(
            f"{path}: {shown} of shape {shape} takes {nbytes:,} bytes, the header gives it {begin:,} to "
            f"{end:,}. {_AGAIN}"
        )
    return TensorSpec(name, entry.dtype, shape, path, base + begin, nbytes, file)


def _shown(name: str) -> str:
    """A name of a stranger's as a message can have it."""
    return name if name.isprintable() and len(name) <= _LONGEST_SHOWN else repr(name[:_LONGEST_SHOWN])


def _covered(specs: Iterable[TensorSpec], path: Path, base: int) -> int:
    """Where the last tensor ends; tensors follow each other, as the format wants it."""
    end = base
    for spec in sorted(specs, key=lambda spec: (spec.offset, spec.nbytes)):
        if spec.offset != end:
            what = "overlaps with another" if spec.offset < end else "leaves bytes before it"
            raise MismatchError(f"{path}: {_shown(spec.name)} {what} by the header. {_AGAIN}")
        end += spec.nbytes
    return end


def map_tensor(spec: TensorSpec) -> npt.NDArray[Any]:
    """Map a tensor read-only, without reading it; BF16 comes as its uint16 bits (see `to_float32`)."""
    storage = STORAGE_DTYPES[spec.dtype]
    if spec.nbytes == 0:
        return np.zeros(spec.shape, storage)
    if spec.file is not None:
        return np.ndarray(spec.shape, storage, spec.file.map(), spec.offset)
    return np.memmap(spec.path, storage, mode="r", offset=spec.offset, shape=spec.shape)


def to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Convert stored values to float32; exact for BF16, F16 and F32 (BF16 is a float32's upper half)."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, to nearest with ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    # Half a unit in the last kept place, minus one where that place is even: ties then round to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Adding would carry a NaN's payload into infinity or zero.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """All bytes of a stored tensor."""

    spec: TensorSpec

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.spec.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the tensor's bytes to an unbuffered file in chunks; yield their sizes."""
        left = self.spec.nbytes
        with self.spec.path.open("rb", buffering=0) as source:
            while left:
                offset = self.spec.offset + self.spec.nbytes - left
                count = _copy_chunk(source, offset, min(left, CHUNK_BYTES), file)
                _check_progress(self.spec, count)
                left -= count
                yield count


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Some entries of a stored tensor along `axis`, in the order of `ids`.

    Attributes:
        spec: the stored tensor.
        ids: int array (n,), strictly increasing, below ``spec.shape[axis]``.
        axis: the vocab axis; every axis before it must have length 1.
    """

    spec: TensorSpec
    ids: npt.NDArray[np.integer[Any]]
    axis: int = 0

    def __post_init__(self) -> None:
        if any(size != 1 for size in self.spec.shape[: self.axis]):
            raise ValueError(f"axis {self.axis} of {self.spec.shape} is not a row axis")

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape with `axis` cut to ``len(ids)``."""
        shape = self.spec.shape
        return (*shape[: self.axis], len(self.ids), *shape[self.axis + 1 :])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the chosen rows' bytes to an unbuffered file; yield their sizes.

        The source is read once, in order, in blocks; two buffers are all the memory it takes.
        """
        rows = self.spec.shape[self.axis]
        if self.spec.nbytes == 0 or len(self.ids) == 0:
            return
        row_bytes = self.spec.nbytes // rows
        block_rows = min(rows, max(1, CHUNK_BYTES // row_bytes))
        block = np.empty((block_rows, row_bytes), np.uint8)
        chosen = np.empty_like(block)
        with self.spec.path.open("rb", buffering=0) as source:
            for start in range(0, rows, block_rows):
                stop = min(start + block_rows, rows)
                first, last = np.searchsorted(self.ids, (start, stop))
                if first == last:
                    continue
                source.seek(self.spec.offset + start * row_bytes)
                self._fill(block[: stop - start], source)
                picked = chosen[: last - first]
                # The ids are in range; mode "raise" would copy once more.
                np.take(block, self.ids[first:last] - start, axis=0, out=picked, mode="clip")
                _write_all(file, picked.reshape(-1).data)
                yield picked.nbytes

    def _fill(self, block: npt.NDArray[np.uint8], source: FileIO) -> None:
        view = memoryview(block.reshape(-1).data)
        while view:
            count = source.readinto(view)
            _check_progress(self.spec, count)
            view = view[count:]


@dataclass(frozen=True, slots=True)
class ArrayTensor:
    """An array in memory, in one of the numpy dtypes of `STORAGE_DTYPES`."""

    values: npt.NDArray[Any]

    @property
    def dtype(self) -> str:
        """Safetensors dtype name.

        Raises:
            ValueError: safetensors has no such dtype.
        """
        for name in ("BOOL", "U8", "I8", "I16", "F16", "I32", "U32", "F32", "I64", "U64", "F64"):
            if STORAGE_DTYPES[name] == self.values.dtype:
                return name
        raise ValueError(f"safetensors has no dtype for {self.values.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.values.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the array's bytes to an unbuffered file at once; yield their size."""
        _write_all(file, self.values.tobytes())
        yield self.values.nbytes


def _check_progress(spec: TensorSpec, count: int) -> None:
    if count == 0:
        raise MismatchError(f"{spec.path} ended within {spec.name}: it changed while being read.")


# What copy_file_range answers between file systems, or where a file system has not got it.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def _copy_chunk(source: FileIO, offset: int, nbytes: int, target: IO[bytes]) -> int:
    """Append up to `nbytes` of a file to another, within the kernel where that is possible, as `cp` does."""
    if sys.platform == "linux":
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), nbytes, offset_src=offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    source.seek(offset)
    data = source.read(nbytes)
    _write_all(target, data)
    return len(data)


def write_tensors(
    path: Path,
    tensors: Mapping[str, TensorSource],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Stream tensors into a new safetensors file, yielding the bytes of each chunk as it is written.

    A generator, so that the caller can show progress; it must be run to its end.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, source in tensors.items():
        nbytes = math.prod(source.shape) * STORAGE_DTYPES[source.dtype].itemsize
        header[name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on an 8-byte boundary
    with path.open("wb", buffering=0) as file:
        _write_all(file, len(encoded).to_bytes(8, "little") + encoded)
        for source in tensors.values():
            yield from source.write_to(file)
    _check_size(path, 8 + len(encoded) + position)


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise MismatchError(f"{path} should have {expected:,} bytes but has {found:,}: a source changed.")


def exhaust(steps: Iterable[int]) -> int:
    """Run a stream of written byte counts to its end and return their sum."""
    return sum(steps)
