"""Write the sketch of a folder's cold rows: integers, what bounds the rest, and the graph that multiplies.

The rows are read as the folder's own runtime reads them (`ColdRows.head`): in the graph's dtype, and what
the integers stand for if the head is quantised. The integers of one run of `run_rows` rows are in memory
at a time, and a slice of its rows in floats: once for what they are sorted by, once in that order. Their
packed form lies behind them, as `serving/packed.py` does it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from trimserve.arrays import Doubles, Ids
from trimserve.errors import UsageError
from trimserve.exact.bounds import block_magnitude, round_up
from trimserve.exact.sketch import run_rows
from trimserve.exact.sketch_rows import BLOCKS, GROUP_ROWS, block_spread, sketch_blocks, sketch_rows
from trimserve.files.hashes import sha256_file
from trimserve.files.quantized import Quantization, block_specs
from trimserve.files.tensors import ArrayTensor, exhaust, map_tensor, write_tensors
from trimserve.folder.manifest import FileEntry, Manifest, write_manifest
from trimserve.folder.names import (
    COLD_BLOCKS_NAME,
    COLD_MAX_NAME,
    COLD_WEIGHTS_NAME,
    SKETCH_DATA_NAME,
    SKETCH_FILES,
    SKETCH_GRAPH_NAME,
    SKETCH_MASS_NAME,
    SKETCH_NAME,
)
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.runtime.cold_rows import ColdRows
from trimserve_export.cold_head.packed import store_packed
from trimserve_export.cold_head.sketch_graph import sketch_graph

# `--sketch` -> bits.
SKETCH_BITS = {"int8": 8, "int4": 4}
# Entries of rows in memory as floats: 4 MiB in float64, of which rounding holds several copies.
_SLICE_ENTRIES = 1 << 19
_Arrays = dict[str, npt.NDArray[Any]]


def wants_sketch(manifest: Manifest, choice: str | None) -> bool:
    """Whether an export adds a sketch.

    Args:
        manifest: of the folder made so far.
        choice: ``"int8"``, ``"int4"``, ``"none"``, or None for int8 where it pays: where the cold head is in
            floats.

    Raises:
        UsageError: a sketch was asked for, and the folder has no cold head that one could bound.
    """
    has_head = manifest.layout == "runtime" and COLD_MAX_NAME in manifest.files
    # The bounds are those of a product of floats, or of MatMulNBits' blocks.
    bounded = manifest.dtype in ("fp32", "fp16") and COLD_WEIGHTS_NAME not in manifest.files
    possible = has_head and bounded
    if choice in SKETCH_BITS and not possible:
        raise UsageError(
            "a sketch bounds the cold rows of a vocab head, in fp32 or fp16 and layout runtime, and this "
            "export has none: leave --sketch out."
        )
    return possible and (choice in SKETCH_BITS or (choice is None and manifest.quantization is None))


def add_sketch(path: Path, bits: int = 8) -> Manifest:
    """Add a sketch of its cold rows to a trimmed folder, and to its manifest.

    Args:
        path: a folder for which `wants_sketch` found what it takes.
        bits: 8 or 4.

    Returns:
        The manifest as written.
    """
    manifest = write_sketch(open_folder(path), bits)
    write_manifest(path, manifest)
    return manifest


def write_sketch(folder: TrimmedFolder, bits: int) -> Manifest:
    """Write a sketch of its cold rows into a folder; gives the manifest that lists it, which is not written.

    Args:
        folder: the folder as it is so far.
        bits: 8 or 4.
    """
    path, cold = folder.path, ColdRows(folder)
    magnitudes = _magnitudes(folder, cold)
    runs: list[_Arrays] = []
    with (path / SKETCH_DATA_NAME).open("wb") as data:
        for start in range(0, cold.head_cold_ids.size, run_rows(cold.width)):
            ids = cold.head_cold_ids[start : start + run_rows(cold.width)]
            stored, arrays = _sketch_run(cold, ids, start, magnitudes, bits)
            for part in stored:
                data.write(part.data)
            runs.append(arrays)
    arrays = _concatenated(runs)
    exhaust(write_tensors(path / SKETCH_NAME, {name: ArrayTensor(array) for name, array in arrays.items()}))
    sizes = [run["order"].size for run in runs]
    graphs = [path / SKETCH_GRAPH_NAME, path / SKETCH_MASS_NAME]
    for graph, masses in zip(graphs, (False, True), strict=True):
        onnx.save(sketch_graph(sizes, cold.width, bits, masses=masses), graph)
    parts = (sketch_graph(sizes, cold.width, bits, [number]) for number in range(len(sizes)))
    store_packed(graphs, path / SKETCH_DATA_NAME, parts)
    return _with_sketch(folder, arrays, bits)


def _sketch_run(
    cold: ColdRows, ids: Ids, start: int, magnitudes: Callable[[Ids, Doubles], Doubles], bits: int
) -> tuple[list[npt.NDArray[Any]], _Arrays]:
    """Sketch rows that follow each other, sorted: the integers and scales to store, and the arrays beside."""
    order_by = _largest_entry if bits == 8 else block_spread
    places = np.argsort(np.concatenate([order_by(rows) for _, rows in _read(cold, ids)]), kind="stable")
    places = np.concatenate([places, np.repeat(places[-1:], -len(places) % GROUP_ROWS)])
    stored = _room(cold.width, places.size, bits)
    parts: list[_Arrays] = []
    for where, rows in _read(cold, ids[places]):
        sketched = sketch_rows(rows) if bits == 8 else sketch_blocks(rows)
        if bits == 8:
            stored[0][:, where] = sketched.integers.T
        else:
            stored[0][where], stored[1][where] = sketched.integers, sketched.block_scales
        sizes = round_up(sketched.norms + sketched.residuals)
        part: _Arrays = {
            "order": (start + places[where]).astype(np.int32),
            "scales": sketched.scales,
            "residuals": sketched.residuals,
            "norms": sketched.norms,
            "magnitudes": np.maximum(sizes, magnitudes(ids[places[where]], sizes)),
        }
        if bits == 4:
            part["roundings"] = sketched.roundings
        if cold.has_head_bias:
            bias = cold.head_bias(ids[places[where]]).astype(np.float64)
            part["bias"] = bias.reshape(-1, GROUP_ROWS).max(axis=1)
        parts.append(part)
    return stored, _concatenated(parts)


def _largest_entry(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    largest: npt.NDArray[np.float32] = np.abs(rows).max(axis=1)
    return largest


def _room(width: int, rows: int, bits: int) -> list[npt.NDArray[Any]]:
    """Arrays for what a run stores, in the order and layout of `sketch_graph`."""
    if bits == 8:
        return [np.empty((width, rows), np.uint8)]
    blocks = BLOCKS.blocks(width)
    return [np.empty((rows, blocks, BLOCKS.block_bytes), np.uint8), np.empty((rows, blocks), np.float32)]


def _read(cold: ColdRows, ids: Ids) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Head rows a slice at a time, each of whole groups if all are."""
    step = max(1, _SLICE_ENTRIES // cold.width // GROUP_ROWS) * GROUP_ROWS
    for first in range(0, len(ids), step):
        where = slice(first, min(first + step, len(ids)))
        yield where, cold.head(ids[where]).astype(np.float32, copy=False)


def _concatenated(parts: Sequence[_Arrays]) -> _Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _magnitudes(folder: TrimmedFolder, cold: ColdRows) -> Callable[[Ids, Doubles], Doubles]:
    """What the head's rounding errors are proportional to, a group: of float rows their norms."""
    quantization = Quantization.from_dict(folder.manifest.quantization)
    if quantization is None or COLD_BLOCKS_NAME not in folder.manifest.files:
        return lambda _, sizes: sizes
    scheme = quantization.rows
    dtype = "F16" if folder.manifest.dtype == "fp16" else "F32"
    specs = block_specs(folder.file(COLD_BLOCKS_NAME), cold.head_cold_ids.size, cold.width, scheme, dtype)
    scales = map_tensor(specs.scales)

    def of_groups(ids: Ids, _: Doubles) -> Doubles:
        rows = np.searchsorted(cold.head_cold_ids, ids)
        sizes = block_magnitude(np.asarray(scales)[rows], scheme)
        largest: Doubles = sizes.reshape(-1, GROUP_ROWS).max(axis=1)
        return largest

    return of_groups


def _with_sketch(folder: TrimmedFolder, arrays: _Arrays, bits: int) -> Manifest:
    paths = [folder.path / name for name in SKETCH_FILES]
    files = {path.name: FileEntry(path.stat().st_size, sha256_file(path)) for path in paths}
    sketch = {
        "bits": bits,
        "group_rows": GROUP_ROWS,
        "bytes": sum(entry.bytes for entry in files.values()),
        # How far above a cold logit its bound is at most, as a share of the norms' product; what the
        # rounding of the hidden state adds is known only when it is there.
        "bound": _relative_bound(arrays),
    }
    return dataclasses.replace(
        folder.manifest, files=dict(sorted((folder.manifest.files | files).items())), sketch=sketch
    )


def _relative_bound(arrays: _Arrays) -> dict[str, float]:
    """Residual norm to row norm, of the median and the worst group."""
    norms = arrays["norms"]
    shares = arrays["residuals"] / np.where(norms > 0, norms, 1.0)
    return {"median": float(np.median(shares)), "largest": float(shares.max())}
