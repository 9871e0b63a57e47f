"""Which number format each tensor of a GGUF file gets, and numbers rounded to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from trimserve.errors import UnsupportedModelError, require
from trimserve.files.ggml_blocks import GGML_TYPES, Floats, GgmlType
from trimserve.files.gguf import GgufTensor
from trimserve.files.gguf_writing import row_slices
from trimserve.files.tensors import TensorSpec, map_tensor, to_float32
from trimserve.model.gguf.architectures import EMBEDDING, HEAD

_KINDS: Final = {kind.name: kind for kind in GGML_TYPES.values()}
_BY_DTYPE: Final = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_BY_BITS: Final = {4: "Q4_0", 8: "Q8_0"}
_VOCAB_BITS: Final = 8
# llama.cpp's own number of a file's format (`general.file_type`).
FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a file's matrices; all else is F32.

    Attributes:
        body: of all but the vocab's rows.
        rows: of the embedding and the head.
    """

    body: GgmlType
    rows: GgmlType

    @classmethod
    def of(cls, dtype: str, quantize: str | None, vocab_bits: int | None) -> "Formats":
        """By the options of an export: F32, F16, BF16, Q8_0, or Q4_0 with the vocab's rows in Q8_0."""
        if quantize is None:
            kind = _KINDS[_BY_DTYPE[dtype]]
            return cls(kind, kind)
        body = {"int4": 4, "int8": 8}[quantize]
        return cls(_KINDS[_BY_BITS[body]], _KINDS[_BY_BITS[vocab_bits or _VOCAB_BITS]])

    def of_tensor(self, name: str, shape: tuple[int, ...]) -> GgmlType:
        """The format of a tensor by llama.cpp's name; F16 where its rows are no whole number of blocks."""
        if len(shape) < 2:
            return _KINDS["F32"]
        kind = self.rows if name in (EMBEDDING, HEAD) else self.body
        return kind if shape[-1] % kind.numbers == 0 else _KINDS["F16"]


class Numbers(Protocol):
    """A tensor's numbers, wherever they come from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major; a vector counts as one row."""
        ...

    def read(self, rows: slice) -> Floats:
        """Some rows, float32 (n, width)."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointNumbers:
    """A tensor of safetensors, as llama.cpp has it.

    Attributes:
        spec: the stored tensor.
        order: which stored row stands at each place; None where all do as they are.
        shift: added to every number.
    """

    spec: TensorSpec
    order: npt.NDArray[np.int64] | None = None
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Numbers`."""
        return self.spec.shape

    def read(self, rows: slice) -> Floats:
        """See `Numbers`."""
        stored = map_tensor(self.spec)
        if len(self.shape) == 1:  # a bias, whose rows are single numbers
            found = (stored if self.order is None else stored[self.order])[None][rows]
        else:
            found = stored[rows if self.order is None else self.order[rows]]
        numbers = to_float32(np.asarray(found), self.spec.dtype)
        return numbers + np.float32(self.shift) if self.shift else numbers


@dataclass(frozen=True, slots=True)
class ArrayNumbers:
    """A short vector in memory, float32 (n,)."""

    values: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Numbers`."""
        return self.values.shape

    def read(self, rows: slice) -> Floats:
        """See `Numbers`."""
        return self.values[None][rows]


@dataclass(frozen=True, slots=True)
class DequantizedNumbers:
    """Rows of a tensor of another GGUF file, made floats.

    Attributes:
        stored: the tensor.
        rows: which ones, int (n,); None for all.
    """

    stored: GgufTensor
    rows: npt.NDArray[np.integer[Any]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Numbers`."""
        return self.stored.shape if self.rows is None else (len(self.rows), *self.stored.shape[1:])

    def read(self, rows: slice) -> Floats:
        """See `Numbers`."""
        return self.stored.floats(rows if self.rows is None else self.rows[rows])


@dataclass(frozen=True, slots=True)
class RoundedTensor:
    """A tensor rounded to a number format while it is streamed into a file; see `GgmlSource`.

    Attributes:
        name: llama.cpp's.
        numbers: what is rounded.
        kind: the format.
    """

    name: str
    numbers: Numbers
    kind: GgmlType

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major."""
        return self.numbers.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """See `GgmlSource`.

        Raises:
            UnsupportedModelError: a number is too large for the format.
        """
        *rows, width = self.shape
        for part in row_slices(rows[0] if rows else 1, 4 * width):
            yield file.write(round_blocks(self.numbers.read(part), self.kind, self.name))


def round_blocks(numbers: Floats, kind: GgmlType, name: str = "a tensor") -> npt.NDArray[np.uint8]:
    """Round rows to a number format as llama.cpp's own reference does.

    Args:
        numbers: float32 (n, width).
        kind: one of `FILE_TYPES`.
        name: of the tensor, for messages.

    Returns:
        uint8 (n, bytes of a row).

    Raises:
        UnsupportedModelError: a number is too large for the format.
        MissingExtraError: the gguf package is not installed.
    """
    numbers = np.ascontiguousarray(numbers, np.float32)
    if kind.name == "F32":
        return numbers.view(np.uint8)
    with np.errstate(over="ignore"):
        if np.isinf(np.abs(numbers).max(initial=0).astype(np.float16)) and kind.name != "BF16":
            raise UnsupportedModelError(
                f"{name} has numbers that {kind.name} cannot hold: take --dtype bf16 or fp32."
            )
    if kind.name == "F16":
        return numbers.astype(np.float16).view(np.uint8)
    return np.ascontiguousarray(_quantizer(kind.name)(numbers)).view(np.uint8)


@cache
def _quantizer(name: str) -> Callable[[Floats], npt.NDArray[Any]]:
    package = require("gguf", extra="export", purpose="--to gguf")
    kind = package.GGMLQuantizationType[name]
    return lambda numbers: package.quantize(numbers, kind)  # type: ignore[no-any-return]
