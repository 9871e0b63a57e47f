"""ColdRows: the embedding and head rows of the ids that were not kept, read from a memory map.

The file holds as much as was cut off, so it is never loaded: a request touches the pages of its own cold
rows, and the system may drop them again. Only the asked rows are converted to the graph's dtype.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids, Rows
from trimserve.errors import MismatchError, UnknownIdError
from trimserve.files.quantized import Quantization, block_specs, dequantize, round_activations
from trimserve.files.tensors import TensorSpec, map_tensor, read_header, to_bfloat16, to_float32
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.runtime.session import Session

# `Dtype` of a graph (`Manifest.dtype`) -> numpy dtype of its inputs; numpy has no bfloat16, so its bits.
GRAPH_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}
_FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
# The graph's input that takes rows of cold ids, of its first table (see `table_name`).
COLD_INPUT = "cold_rows"


def table_name(name: str, table: int) -> str:
    """Name of what each table has that token ids are looked up in: ``name``, ``name.1``, ``name.2``, ...

    Graph inputs (`cold_rows`) and stored tensors (`embedding`) of table 0 have the bare name.
    """
    return f"{name}.{table}" if table else name


def cold_widths(session: Session) -> dict[str, int]:
    """Inputs of a servable graph that take rows of cold ids, and their widths, table by table."""
    widths = {}
    for value in session.get_inputs():
        if value.name.partition(".")[0] == COLD_INPUT:
            if len(value.shape) != 2 or not isinstance(value.shape[1], int):
                raise MismatchError(
                    f"the graph's input {value.name} should have two axes, the second of a known size, and "
                    f"has {value.shape}: export the folder again."
                )
            widths[value.name] = value.shape[1]
    return widths


class ColdRows:
    """Rows of the cold ids of a folder, in the float dtype of its graph.

    Row i of the embedding belongs to ``vocab.cold_ids[i]``, of the head to ``vocab.head.cold_ids[i]``. A tied
    model stores its rows once: the head's rows are the embedding's.

    Attributes:
        cold_ids: int32 (V - K,), the ids that have a cold row of the embedding, increasing.
        head_cold_ids: int32, those that have one of the head: more, where the head keeps fewer ids.
        width: H, entries of an embedding row.
        widths: entries of a row of each table that token ids are looked up in, the embedding first; models
            with per-layer embeddings have two tables.
        dtype: numpy dtype of the rows given out; uint16 bits for bf16.
    """

    def __init__(
        self, folder: TrimmedFolder, dtype: str | None = None, *, widths: Sequence[int] = ()
    ) -> None:
        """Map the cold rows of a folder.

        Args:
            folder: an opened folder.
            dtype: fp32, fp16 or bf16; the dtype in the folder's manifest by default.
            widths: as the graph's inputs have them; needed for a folder without cold rows (`--no-cold`).

        Raises:
            MismatchError: the file does not hold a float row for each cold id.
        """
        self._origin = folder.path / COLD_NAME
        self._graph_dtype = folder.manifest.dtype if dtype is None else dtype
        self.dtype = GRAPH_DTYPES[self._graph_dtype]
        self.cold_ids, self.head_cold_ids = folder.vocab.cold_ids, folder.vocab.head.cold_ids
        self._specs, metadata = read_header(folder.opened(COLD_NAME)) if folder.has_cold else ({}, {})
        self._tied = metadata.get("tied") == "true"
        for spec in self._specs.values():
            self._check(spec)
        if folder.has_cold and "embedding" not in self._specs:
            raise MismatchError(f"{self._origin} has no tensor 'embedding': export the folder again.")
        self._maps = {name: map_tensor(spec) for name, spec in self._specs.items()}
        self.widths = self._stored_widths() if folder.has_cold else tuple(widths)
        self.width = next(iter(self.widths), 0)
        self._blocks = (
            _QuantizedRows(folder, self.width) if COLD_BLOCKS_NAME in folder.manifest.files else None
        )
        if widths and tuple(widths) != self.widths:
            stored, taken = (" and ".join(f"{size:,}" for size in sizes) for sizes in (self.widths, widths))
            raise MismatchError(
                f"{self._origin} has rows of {stored} entries but the graph takes {taken}: "
                "export the folder again."
            )

    def __len__(self) -> int:
        """V - K where the folder has cold rows, else 0."""
        return len(self.cold_ids) if self._maps else 0

    @property
    def has_head(self) -> bool:
        """Whether there are rows for a vocab head, its own or the embedding's."""
        return self._tied or "head" in self._maps or self._blocks is not None

    @property
    def has_head_bias(self) -> bool:
        """Whether the vocab head has a bias."""
        return "head_bias" in self._maps

    @property
    def head_nbytes(self) -> int:
        """Bytes of the head's cold rows as they are stored; 0 where there are none."""
        if self._blocks is not None:
            return self._blocks.nbytes
        return self.spec("head").nbytes if self.has_head else 0

    def embeddings(self, cold_ids: npt.ArrayLike) -> tuple[Rows, ...]:
        """Read rows of every table: for the inputs `cold_rows`, `cold_rows.1`, ...; see `embedding`."""
        return tuple(self.embedding(cold_ids, table) for table in range(len(self.widths)))

    def embedding(self, cold_ids: npt.ArrayLike, table: int = 0) -> Rows:
        """Read embedding rows for the graph's input `cold_rows`.

        Args:
            cold_ids: cold token ids (S,), in slot order.
            table: which of the tables that ids are looked up in; 0 is the embedding.

        Returns:
            Rows (S, H) in `dtype`; one zero row if S is 0, because the input must not be empty.

        Raises:
            UnknownIdError: an id is kept, or outside 0..V-1, or the folder has no cold rows.
        """
        ids = np.asarray(cold_ids)
        if ids.size == 0:
            return np.zeros((1, self.widths[table]), self.dtype)
        return self._read(table_name("embedding", table), ids)

    def head(self, cold_ids: npt.ArrayLike) -> Rows:
        """Read head rows (S, H), of the embedding if the model is tied; S may be 0.

        The rows of a quantised head are those that its integers stand for, float32.

        Raises:
            UnknownIdError: as for `embedding`.
            MismatchError: the folder's model has no vocab head.
        """
        if self._blocks is not None:
            return self._blocks.read(_places(self.head_cold_ids, np.asarray(cold_ids)))
        return self._read(self._stored("head"), np.asarray(cold_ids))

    def head_input(self, hidden: Rows) -> npt.NDArray[np.float32]:
        """What `head` rows are to be multiplied with for logits as the graph's head gives them.

        Args:
            hidden: the head's input (..., H).

        Returns:
            float32 (..., H): the same, rounded in blocks where the head is quantised.
        """
        if self._blocks is not None:
            return round_activations(hidden, self._blocks.scheme)
        if self._maps and hidden.shape[-1] == self.width + 2:
            # Integers, with each position's scale and zero point behind them: see `head_input` of the graph.
            return (hidden[..., :-2] - hidden[..., -1:]) * hidden[..., -2:-1]
        return hidden.astype(np.float32, copy=False)

    def head_bias(self, cold_ids: npt.ArrayLike) -> Rows:
        """Read entries (S,) of the head's bias.

        Raises:
            UnknownIdError: as for `embedding`.
            MismatchError: the folder's head has no bias.
        """
        return self._read("head_bias", np.asarray(cold_ids))

    def spec(self, name: str) -> TensorSpec:
        """Where a tensor lies in the file; the head of a tied model is its embedding.

        Raises:
            MismatchError: the folder has no such tensor.
        """
        stored = self._stored(name)
        if stored not in self._specs:
            raise MismatchError(
                f"{self._origin} has no {name!r} rows (it has {', '.join(self._specs) or 'none'}): "
                "export the folder again with its cold rows, for a task with a vocab head."
            )
        return self._specs[stored]

    def _stored_widths(self) -> tuple[int, ...]:
        names = (table_name("embedding", table) for table in range(len(self._specs)))
        return tuple(self._specs[name].shape[1] for name in names if name in self._specs)

    def _stored(self, name: str) -> str:
        return "embedding" if name == "head" and self._tied else name

    def _read(self, name: str, ids: npt.NDArray[Any]) -> Rows:
        if not self._maps:
            if ids.size == 0:
                return np.zeros((0, self.width), self.dtype)
            raise UnknownIdError(
                f"token id {int(ids.ravel()[0]):,} is cold and this folder has no cold rows: "
                "export it again without --no-cold."
            )
        dtype = self.spec(name).dtype
        rows = _convert(
            np.asarray(self._maps[name])[_places(self._ids_of(name), ids)], dtype, self._graph_dtype
        )
        _release(self._maps[name])
        return rows

    def _ids_of(self, name: str) -> Ids:
        """The ids that a stored tensor has a row for."""
        return self.cold_ids if name.startswith("embedding") else self.head_cold_ids

    def _check(self, spec: TensorSpec) -> None:
        rows = spec.shape[0] if spec.shape else 0
        rank = 1 if spec.name == "head_bias" else 2
        expected = len(self._ids_of(spec.name))
        if rows != expected or len(spec.shape) != rank or spec.dtype not in _FLOAT_DTYPES:
            raise MismatchError(
                f"{self._origin}: {spec.name!r} should be a float tensor of rank {rank} with "
                f"{expected:,} rows but is {spec.dtype} of shape {spec.shape}: "
                "export the folder again."
            )


class _QuantizedRows:
    """The cold rows of a quantised head, mapped."""

    def __init__(self, folder: TrimmedFolder, width: int) -> None:
        quantization = Quantization.from_dict(folder.manifest.quantization)
        file = folder.opened(COLD_BLOCKS_NAME)
        path = file.path
        if quantization is None:
            raise MismatchError(
                f"{path} is quantised and the manifest does not say how: export the folder again."
            )
        scheme = quantization.rows
        dtype = "F16" if folder.manifest.dtype == "fp16" else "F32"
        specs = block_specs(file, len(folder.vocab.head.cold_ids), width, scheme, dtype)
        if specs.end > file.size:
            raise MismatchError(
                f"{path} should have at least {specs.end:,} bytes but has {file.size:,}: "
                "export the folder again."
            )
        self.scheme = scheme
        self.nbytes = specs.end
        self._width = width
        self._integers, self._scales = map_tensor(specs.integers), map_tensor(specs.scales)
        self._zero_points = None if specs.zero_points is None else map_tensor(specs.zero_points)

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows (S, H) as floats."""
        integers, scales = _take(self._integers, rows), _take(self._scales, rows)
        zero_points = None if self._zero_points is None else _take(self._zero_points, rows)
        return dequantize(integers, scales, self._width, self.scheme, zero_points)


def _places(cold_ids: Ids, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where some ids are among the cold ids, which increase."""
    if ids.size == 0:
        return np.zeros(0, np.int64)
    rows = np.searchsorted(cold_ids, ids)
    found = rows < len(cold_ids)
    found[found] = cold_ids[rows[found]] == ids[found]
    if not found.all():
        raise UnknownIdError(
            f"token id {int(ids[~found][0]):,} has no cold row: it is kept or outside the model's vocab."
        )
    return rows


def _take(mapped: Rows, rows: npt.NDArray[np.int64]) -> Rows:
    """Copy rows out of a map and let its pages go."""
    found = np.asarray(mapped)[rows]
    _release(mapped)
    return found


def _release(mapped: Rows) -> None:
    """Take a map's pages out of this process; they stay in the system's page cache.

    Linux maps what lies around a touched page too, up to a megabyte or two a row: a few dozen scattered
    rows would make the whole file resident, as if nothing had been trimmed.
    """
    # An empty tensor is no map, and Windows has no madvise.
    if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.base.madvise(mmap.MADV_DONTNEED)


def _convert(stored: Rows, dtype: str, graph_dtype: str) -> Rows:
    """Convert stored rows to the graph's dtype: exact upwards, to nearest (ties to even) downwards."""
    if dtype == "BF16" and graph_dtype == "bf16":
        return stored
    values = to_float32(stored, dtype)
    if graph_dtype == "bf16":
        return to_bfloat16(values)
    with np.errstate(over="ignore"):  # beyond fp16's range: infinity, as in the exported rows
        return values.astype(GRAPH_DTYPES[graph_dtype], copy=False)
