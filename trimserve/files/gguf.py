"""GGUF files as metadata and byte ranges: what llama.cpp stores a model in.

A file is a header, typed metadata by key, and tensors whose rows are blocks of a ggml format (see
`trimserve.files.ggml_blocks`). Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every
length, count and offset is checked against the bytes that the file has before anything of that size is made.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.content import check_content
from trimserve.files.ggml_blocks import (
    GGML_TYPES,
    PACKED,
    Bytes,
    Floats,
    GgmlType,
    dequantize_blocks,
    unpack_blocks,
)
from trimserve.files.packed_rows import PackedRows

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_ALIGNMENT_KEY: Final = "general.alignment"
ALIGNMENT: Final = 32
_MOST_ALIGNMENT: Final = 1 << 20
_MOST_KEYS: Final = 1 << 16
_MOST_TENSORS: Final = 1 << 20
_MOST_ITEMS: Final = 1 << 24  # of an array; vocabs have 262,144 tokens, their merges twice as many
_MOST_NAME: Final = 1 << 16
_MOST_DIMENSIONS: Final = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
# fmt: off
_SCALARS: Final = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8",
    12: "<f8",
}
# fmt: on
_AGAIN: Final = "Fetch or make it again."

Value = bool | int | float | str | list[str] | npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: in llama.cpp's words, e.g. ``blk.0.attn_q.weight``.
        kind: the format of its numbers.
        shape: row-major, as in numpy: a matrix is (outputs, inputs).
        path: the file.
        offset: of its first byte.
        nbytes: its bytes.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of `shape[-1]` numbers."""
        return math.prod(self.shape[:-1])

    def mapped(self) -> Bytes:
        """Its rows' bytes, uint8 (rows, bytes of a row), mapped read-only."""
        size = self.nbytes // self.rows
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.rows, size))

    def floats(self, rows: slice | npt.NDArray[Any] = slice(None)) -> Floats:
        """Dequantise rows.

        Args:
            rows: which ones; all by default.

        Returns:
            float32 (n, shape[-1]).

        Raises:
            UnsupportedModelError: a format that is not read.
        """
        packed = np.asarray(self.mapped()[rows])
        return dequantize_blocks(packed.reshape(-1, self.kind.nbytes), self.kind).reshape(len(packed), -1)

    @property
    def is_packed(self) -> bool:
        """Whether it is a matrix of integers in blocks, which `unpack` gives."""
        return len(self.shape) == 2 and self.kind.name in PACKED

    def unpack(self, rows: slice | npt.NDArray[Any]) -> PackedRows:
        """Rows (n, shape[-1]) as integers, scales and offsets; n is above 0, the tensor packed."""
        packed = np.asarray(self.mapped()[rows])
        found = unpack_blocks(packed.reshape(-1, self.kind.nbytes), self.kind)
        return found.in_rows(len(packed))


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says.

    Attributes:
        path: the file.
        version: of the format.
        metadata: key -> value: bool, int, float, str, a list of str, or an array of numbers.
        tensors: name -> where it lies, in file order.
        places: key -> where its type and value lie in the file: the first byte, and the one after the last.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, tuple[int, int]]

    def stored(self, key: str) -> bytes:
        """The bytes of a key's type and value as they are, for another file."""
        begin, end = self.places[key]
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    @property
    def alignment(self) -> int:
        """Tensors begin at multiples of so many bytes."""
        return _alignment(self.path, self.metadata)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            MismatchError: it is absent and has no default, or is of another type.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; errors as of `integer`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; errors as of `integer`."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; errors as of `integer`."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; errors as of `integer`."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings", value)
        return value

    def numbers(self, key: str, count: int) -> npt.NDArray[Any]:
        """An array of `count` numbers; errors as of `integer`."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self._wrong(key, f"{count:,} numbers", value)
        return value

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise MismatchError(f"{self.path} has no {key}, which its model needs. {_AGAIN}")
        return value

    def _wrong(self, key: str, expected: str, value: object) -> MismatchError:
        found = f"{len(value):,} values" if isinstance(value, list | np.ndarray) else repr(value)[:60]
        return MismatchError(f"{self.path}: {key} should be {expected} but is {found}. {_AGAIN}")


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and the places of all tensors.

    Raises:
        MismatchError: not a GGUF file, cut off, or one that contradicts itself.
        UnsupportedModelError: a version, byte order or number format that is not known, or nested arrays.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if (found := file.read(4)) != MAGIC:
            check_content(path)
            raise MismatchError(f"{path} is not a GGUF file: it begins with {found!r} and not {MAGIC!r}.")
        version = reader.integer(4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "in big-endian byte order" if swapped else f"of version {version:,}"
            raise UnsupportedModelError(
                f"{path} is a GGUF file {what}, and trimserve reads versions {_VERSIONS[0]} and "
                f"{_VERSIONS[1]} in little-endian order: convert the model again with a current llama.cpp."
            )
        tensor_count = reader.count("tensors", _MOST_TENSORS, least=24)
        key_count = reader.count("metadata keys", _MOST_KEYS, least=13)
        metadata, places = reader.metadata(key_count)
        infos = [reader.tensor_info() for _ in range(tensor_count)]
        start = file.tell()
    alignment = _alignment(path, metadata)
    tensors = _place(path, infos, start + -start % alignment, alignment, reader.size)
    return GgufFile(path, version, metadata, tensors, places)


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """Reads values in order, each checked against the bytes that are left."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self.size = path.stat().st_size

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.left else b""
        if len(data) < count:
            raise self.broken(f"it ends within its header: {count:,} bytes are missing")
        return data

    @property
    def left(self) -> int:
        return self.size - self._file.tell()

    def integer(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def count(self, what: str, most: int, least: int) -> int:
        """A count of things that take at least `least` bytes each."""
        found = self.integer(8)
        if found > most or found * least > self.left:
            raise self.broken(f"it cannot hold {found:,} {what} in {self.left:,} bytes")
        return found

    def string(self, most: int) -> str:
        return self._decode(self.take(self._length(self.take(8), most)))

    def _length(self, data: bytes, most: int) -> int:
        length = int.from_bytes(data, "little")
        if length > most:
            raise self.broken(f"it has a string of {length:,} bytes")
        return length

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"it has a string that is not UTF-8 ({error})") from error

    def metadata(self, count: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]]]:
        """The values by key, and where they lie."""
        found: dict[str, Value] = {}
        places = {}
        for _ in range(count):
            key = self.string(_MOST_NAME)
            if key in found:
                raise self.broken(f"it has the key {_named(key)} twice")
            begin = self._file.tell()
            found[key] = self._value(self.integer(4), key)
            places[key] = begin, self._file.tell()
        return found, places

    def _value(self, code: int, key: str) -> Value:
        if code == _STRING:
            return self.string(self.left)
        if code == _ARRAY:
            return self._array(self.integer(4), key)
        return self._scalars(code, 1, key)[0].item()  # type: ignore[no-any-return]

    def _array(self, code: int, key: str) -> Value:
        if code == _ARRAY:
            raise UnsupportedModelError(
                f"{self._path}: {_named(key)} is an array of arrays, which is not read: make the file again."
            )
        if code == _STRING:
            count = self.count(f"strings of {_named(key)}", _MOST_ITEMS, least=8)
            return self._strings(count)
        width = np.dtype(_SCALARS.get(code, "u1")).itemsize
        return self._scalars(code, self.count(f"numbers of {_named(key)}", _MOST_ITEMS, least=width), key)

    def _strings(self, count: int) -> list[str]:
        """Many strings: the hot path of a vocab, so without a call of `tell` for each."""
        read, size = self._file.read, struct.Struct("<Q")
        found, left = [], self.left
        for _ in range(count):
            header = read(8)
            if len(header) < 8:
                raise self.broken("it ends within its header")
            (length,) = size.unpack(header)
            left -= 8 + length
            if left < 0:
                raise self.broken(f"it has a string of {length:,} bytes")
            found.append(self._decode(read(length)))
        return found

    def _scalars(self, code: int, count: int, key: str) -> npt.NDArray[Any]:
        if code not in _SCALARS:
            raise self.broken(f"{_named(key)} is of the unknown type {code}")
        dtype = np.dtype(_SCALARS[code])
        found = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if code != _BOOL:
            return found
        if count and found.max() > 1:
            raise self.broken(f"{_named(key)} should be true or false but is {found.max()}")
        return found.astype(np.bool_)

    def tensor_info(self) -> _Info:
        name = self.string(_MOST_NAME)
        dimensions = self.integer(4)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.broken(f"the tensor {_named(name)} has {dimensions:,} dimensions")
        sizes = [self.integer(8) for _ in range(dimensions)]
        code, offset = self.integer(4), self.integer(8)
        kind = GGML_TYPES.get(code)
        if kind is None:
            raise UnsupportedModelError(
                f"{self._path}: {_named(name)} is stored in ggml's format number {code}, which is not "
                "known here: take another quantisation of this model."
            )
        if min(sizes) < 1 or sizes[0] % kind.numbers:
            raise self.broken(f"the tensor {_named(name)} of sizes {sizes} cannot be {kind.name}")
        return _Info(name, kind, tuple(reversed(sizes)), offset)

    def broken(self, what: str) -> MismatchError:
        return MismatchError(f"{self._path} is no GGUF file that can be read, {what}. {_AGAIN}")


def _named(name: str) -> str:
    """A name of the file's as a message can hold it: in one line, of bounded length."""
    return repr(name[:60])


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    found = metadata.get(_ALIGNMENT_KEY, ALIGNMENT)
    usual = isinstance(found, int) and not isinstance(found, bool) and 0 < found <= _MOST_ALIGNMENT
    if not usual or found & (found - 1):  # type: ignore[operator]
        raise MismatchError(f"{path}: {_ALIGNMENT_KEY} should be a power of two but is {found!r}. {_AGAIN}")
    return int(found)  # type: ignore[arg-type]


def _place(path: Path, infos: list[_Info], start: int, alignment: int, size: int) -> dict[str, GgufTensor]:
    """The tensors with their places in the file: inside it, aligned, apart from each other."""
    found: dict[str, GgufTensor] = {}
    for info in infos:
        nbytes = math.prod(info.shape) // info.kind.numbers * info.kind.nbytes
        tensor = GgufTensor(info.name, info.kind, info.shape, path, start + info.offset, nbytes)
        if info.name in found:
            raise MismatchError(f"{path} has the tensor {_named(info.name)} twice. {_AGAIN}")
        if info.offset % alignment:
            raise MismatchError(f"{path}: {_named(info.name)} begins at {info.offset:,}, unaligned. {_AGAIN}")
        if tensor.offset + nbytes > size:
            raise MismatchError(
                f"{path} was cut off: {_named(info.name)} should end at byte {tensor.offset + nbytes:,}, the "
                f"file has {size:,}. {_AGAIN}"
            )
        found[info.name] = tensor
    ordered = sorted(found.values(), key=lambda tensor: tensor.offset)
    for one, other in pairwise(ordered):
        if one.offset + one.nbytes > other.offset:
            raise MismatchError(f"{path}: {_named(one.name)} and {_named(other.name)} overlap. {_AGAIN}")
    return found
