"""Write the sketch of a folder's cold rows: integers, what bounds the rest, and the graph that multiplies.

The rows are read as the folder's own runtime reads them (`ColdRows.head`): in the graph's dtype, and what
the integers stand for if the head is quantised. The integers of one run of `run_rows` rows are in memory
at a time, and a slice of its rows in floats: once for their largest entries, once in the order of these.

The integers are the right operand of MatMulInteger, which is several times as fast on a packed matrix as
on one that lies row by row (docs/certificate.md has both); so they are stored transposed, a run of
rows a tile, with their packed form behind them, as `serving/packed.py` does it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from trimserve.artefacts import sha256_file
from trimserve.blocks import COLD_BLOCKS_NAME, BlockScheme, block_specs
from trimserve.bounds import Doubles, block_magnitude, round_up
from trimserve.cold import ColdRows
from trimserve.coldhead import COLD_MAX_NAME, COLD_WEIGHTS_NAME
from trimserve.errors import UsageError
from trimserve.folder import FileEntry, Manifest, TrimmedFolder, open_folder, write_manifest
from trimserve.sketch import (
    GROUP_ROWS,
    SKETCH_DATA_NAME,
    SKETCH_FILES,
    SKETCH_GRAPH_NAME,
    SKETCH_NAME,
    ZERO,
    run_rows,
    sketch_rows,
)
from trimserve.tensorfile import ArrayTensor, exhaust, map_tensor, write_tensors
from trimserve.vocab import Ids
from trimserve_export.serving.packed import store_packed

_OPSET = 20
# Nothing overflows 32 bits below this width.
_MAX_WIDTH = 1 << 17
# Entries of rows in memory as floats: 4 MiB in float64, of which rounding holds several copies.
_SLICE_ENTRIES = 1 << 19
_Arrays = dict[str, npt.NDArray[Any]]


def wants_sketch(manifest: Manifest, choice: str | None) -> bool:
    """Whether an export adds a sketch.

    Args:
        manifest: of the folder made so far.
        choice: ``"int8"``, ``"none"``, or None for int8 where it pays: where the cold head is in floats.

    Raises:
        UsageError: a sketch was asked for, and the folder has no cold head that one could bound.
    """
    has_head = manifest.layout == "runtime" and COLD_MAX_NAME in manifest.files
    # The bounds are those of a product of floats, or of MatMulNBits' blocks.
    bounded = manifest.dtype in ("fp32", "fp16") and COLD_WEIGHTS_NAME not in manifest.files
    possible = has_head and bounded
    if choice == "int8" and not possible:
        raise UsageError(
            "a sketch bounds the cold rows of a vocab head, in fp32 or fp16 and layout runtime, and this "
            "export has none: leave --sketch out."
        )
    return possible and (choice == "int8" or (choice is None and manifest.quantization is None))


def add_sketch(path: Path) -> Manifest:
    """Add a sketch of its cold rows to a trimmed folder, and to its manifest.

    Args:
        path: a folder for which `wants_sketch` found what it takes.

    Returns:
        The manifest as written.
    """
    folder = open_folder(path)
    cold = ColdRows(folder)
    magnitudes = _magnitudes(folder, cold)
    runs: list[_Arrays] = []
    with (path / SKETCH_DATA_NAME).open("wb") as data:
        for start in range(0, cold.head_cold_ids.size, run_rows(cold.width)):
            ids = cold.head_cold_ids[start : start + run_rows(cold.width)]
            integers, arrays = _sketch_run(cold, ids, start, magnitudes)
            data.write(integers.data)
            runs.append(arrays)
    arrays = _concatenated(runs)
    exhaust(write_tensors(path / SKETCH_NAME, {name: ArrayTensor(array) for name, array in arrays.items()}))
    graph = path / SKETCH_GRAPH_NAME
    sizes = [run["order"].size for run in runs]
    onnx.save(_graph(sizes, cold.width), graph)
    parts = (_graph(sizes, cold.width, [number]) for number in range(len(sizes)))
    store_packed([graph], path / SKETCH_DATA_NAME, parts)
    return _add_to_manifest(folder, arrays)


def _sketch_run(
    cold: ColdRows, ids: Ids, start: int, magnitudes: Callable[[Ids, Doubles], Doubles]
) -> tuple[npt.NDArray[np.uint8], _Arrays]:
    """Sketch rows that follow each other, sorted by their largest entries: integers (H, n), and the rest."""
    slices = [np.abs(rows).max(axis=1) for _, rows in _read(cold, ids)]
    places = np.argsort(np.concatenate(slices), kind="stable")
    places = np.concatenate([places, np.repeat(places[-1:], -len(places) % GROUP_ROWS)])
    integers = np.empty((cold.width, places.size), np.uint8)
    parts: list[_Arrays] = []
    for where, rows in _read(cold, ids[places]):
        sketched = sketch_rows(rows)
        integers[:, where] = sketched.integers.T
        sizes = round_up(sketched.norms + sketched.residuals)
        part: _Arrays = {
            "order": (start + places[where]).astype(np.int32),
            "scales": sketched.scales,
            "residuals": sketched.residuals,
            "norms": sketched.norms,
            "magnitudes": np.maximum(sizes, magnitudes(ids[places[where]], sizes)),
        }
        if cold.has_head_bias:
            bias = cold.head_bias(ids[places[where]]).astype(np.float64)
            part["bias"] = bias.reshape(-1, GROUP_ROWS).max(axis=1)
        parts.append(part)
    return integers, _concatenated(parts)


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
    scheme = BlockScheme.from_dict(folder.manifest.quantization)
    if scheme is None or COLD_BLOCKS_NAME not in folder.manifest.files:
        return lambda _, sizes: sizes
    dtype = "F16" if folder.manifest.dtype == "fp16" else "F32"
    specs = block_specs(folder.file(COLD_BLOCKS_NAME), cold.head_cold_ids.size, cold.width, scheme, dtype)
    scales = map_tensor(specs.scales)

    def of_groups(ids: Ids, _: Doubles) -> Doubles:
        rows = np.searchsorted(cold.head_cold_ids, ids)
        sizes = block_magnitude(np.asarray(scales)[rows], scheme)
        largest: Doubles = sizes.reshape(-1, GROUP_ROWS).max(axis=1)
        return largest

    return of_groups


def _graph(runs: Sequence[int], width: int, chosen: Sequence[int] | None = None) -> onnx.ModelProto:
    """Digits (M, H) -> the largest product with the integers of each group, int32 (M, groups).

    Args:
        runs: rows of each run.
        width: H.
        chosen: the runs whose groups it is about, all by default.
    """
    if width > _MAX_WIDTH:
        raise ValueError(f"rows of {width} integers overflow a sum of 32 bits")
    helper, types = onnx.helper, onnx.TensorProto
    initializers = [
        helper.make_tensor("zero", types.UINT8, [], [ZERO]),
        helper.make_tensor("last_axis", types.INT64, [1], [2]),
        helper.make_tensor("groups", types.INT64, [3], [0, -1, GROUP_ROWS]),
    ]
    chosen = range(len(runs)) if chosen is None else chosen
    nodes, maxima = [], []
    for number in chosen:
        rows = runs[number]
        integers, products, grouped, largest = (
            f"{name}_{number}" for name in ("integers", "products", "grouped", "largest")
        )
        initializers.append(_stored(integers, width * sum(runs[:number]), (width, rows)))
        nodes += [
            helper.make_node("MatMulInteger", ["digits", integers, "zero", "zero"], [products]),
            helper.make_node("Reshape", [products, "groups"], [grouped]),
            helper.make_node("ReduceMax", [grouped, "last_axis"], [largest], keepdims=0),
        ]
        maxima.append(largest)
    nodes.append(helper.make_node("Concat", maxima, ["maximum"], axis=1))
    groups = sum(runs[number] for number in chosen) // GROUP_ROWS
    graph = helper.make_graph(
        nodes,
        "cold_sketch",
        [helper.make_tensor_value_info("digits", types.UINT8, ["digits", width])],
        [helper.make_tensor_value_info("maximum", types.INT32, ["digits", groups])],
        initializers,
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="trimserve")


def _stored(name: str, offset: int, shape: tuple[int, int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.TensorProto.UINT8,
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": SKETCH_DATA_NAME, "offset": offset, "length": shape[0] * shape[1]}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _add_to_manifest(folder: TrimmedFolder, arrays: _Arrays) -> Manifest:
    paths = [folder.path / name for name in SKETCH_FILES]
    files = {path.name: FileEntry(path.stat().st_size, sha256_file(path)) for path in paths}
    sketch = {
        "bits": 8,
        "group_rows": GROUP_ROWS,
        "bytes": sum(entry.bytes for entry in files.values()),
        # How far above a cold logit its bound is at most, as a share of the norms' product; what the
        # rounding of the hidden state adds is known only when it is there.
        "bound": _relative_bound(arrays),
    }
    manifest = dataclasses.replace(
        folder.manifest, files=dict(sorted((folder.manifest.files | files).items())), sketch=sketch
    )
    write_manifest(folder.path, manifest)
    return manifest


def _relative_bound(arrays: _Arrays) -> dict[str, float]:
    """Residual norm to row norm, of the median and the worst group."""
    norms = arrays["norms"]
    shares = arrays["residuals"] / np.where(norms > 0, norms, 1.0)
    return {"median": float(np.median(shares)), "largest": float(shares.max())}
