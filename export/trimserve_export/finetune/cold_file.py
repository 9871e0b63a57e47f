"""Rows of live tensors on disk: written once when the model is cut, mapped until it is restored."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.files.tensors import CHUNK_BYTES, exhaust, map_tensor, read_header, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROWS = "rows"


@dataclass(frozen=True, slots=True)
class LiveRows:
    """Rows of a tensor in memory, on any device, streamed to a file without a second copy of them."""

    tensor: "Tensor"
    ids: Ids
    axis: int

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return _dtype_names()[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the vocab axis cut to the ids."""
        shape = tuple(self.tensor.shape)
        return (*shape[: self.axis], len(self.ids), *shape[self.axis + 1 :])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a chunk at a time; yield their sizes."""
        for start, stop in _chunks(self.tensor, self.axis, len(self.ids)):
            values = _bits(take_rows(self.tensor, self.ids[start:stop], self.axis).cpu())
            view = memoryview(values.numpy().reshape(-1).view(np.uint8).data)
            while view:
                view = view[os.write(file.fileno(), view) :]
            yield values.numel() * values.element_size()


class ColdFiles:
    """A temporary folder with one file of cold rows for each tensor; gone when it is closed."""

    def __init__(self, cold_ids: Ids, folder: Path | None = None) -> None:
        """Make the folder.

        Args:
            cold_ids: int32 (V - K,), whose rows will be kept here.
            folder: where; the system's temporary folder by default.
        """
        self.cold_ids = cold_ids
        self._folder = tempfile.TemporaryDirectory(prefix="trimserve-", dir=folder)

    def put(self, name: str, tensor: "Tensor", axis: int) -> None:
        """Write the cold rows of a full tensor."""
        exhaust(write_tensors(self._path(name), {_ROWS: LiveRows(tensor, self.cold_ids, axis)}))

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def fill(self, name: str, target: "Tensor", axis: int) -> None:
        """Copy the cold rows into a full tensor, converted to its dtype; the same bits if that is theirs."""
        import torch

        if not len(self.cold_ids):  # every id is kept
            return
        spec = read_header(self._path(name))[0][_ROWS]
        # The axes before the vocab axis have length 1, so rows lie one after the other.
        mapped = map_tensor(spec).reshape(len(self.cold_ids), -1)
        dtype = next(dtype for dtype, known in _dtype_names().items() if known == spec.dtype)
        for start, stop in _chunks(target, axis, len(self.cold_ids)):
            rows = torch.from_numpy(np.array(mapped[start:stop])).view(dtype)
            put_rows(target, self.cold_ids[start:stop], axis, rows)

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.safetensors"


def take_rows(tensor: "Tensor", ids: npt.NDArray[np.integer[Any]], axis: int) -> "Tensor":
    """Copy some rows of a tensor, on its device."""
    return tensor.detach().index_select(axis, _index(ids, tensor.device))


def put_rows(target: "Tensor", ids: npt.NDArray[np.integer[Any]], axis: int, rows: "Tensor") -> None:
    """Write rows into a tensor, in its dtype and on its device."""
    shape = (*target.shape[:axis], len(ids), *target.shape[axis + 1 :])
    moved = rows.detach().reshape(shape).to(target.device, target.dtype)
    target.detach().index_copy_(axis, _index(ids, target.device), moved)


def _index(ids: npt.NDArray[np.integer[Any]], device: "torch.device") -> "Tensor":
    import torch

    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _chunks(tensor: "Tensor", axis: int, rows: int) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, tensor.numel() // max(1, tensor.shape[axis])) * tensor.element_size()
    step = max(1, CHUNK_BYTES // row_bytes)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _bits(values: "Tensor") -> "Tensor":
    """The tensor in a dtype that numpy has: bfloat16 as its bits."""
    import torch

    return values.view(torch.int16) if values.dtype is torch.bfloat16 else values


def _dtype_names() -> "dict[torch.dtype, str]":
    import torch

    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
