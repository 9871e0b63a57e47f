"""Write the sketch of a folder's cold rows: integers, what bounds the rest, and the graph that multiplies.

The rows are read as the folder's own runtime reads them (`ColdRows.head`): in the graph's dtype, and what
the integers stand for if the head is quantised. A run of `SORTED_ROWS` rows is in memory at a time.

The integers are the right operand of MatMulInteger, which is several times as fast on a packed matrix as
on one that lies row by row (docs/certificate.md has both); so they are stored transposed, a run of
rows a tile, with their packed form behind them, as `serving/packed.py` does it.
"""

import dataclasses
from collections.abc import Callable, Sequence
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
    SORTED_ROWS,
    ZERO,
    SketchedRows,
    sketch_rows,
)
from trimserve.tensorfile import ArrayTensor, exhaust, map_tensor, write_tensors
from trimserve.vocab import Ids
from trimserve_export.serving.packed import store_packed

_OPSET = 20
# Nothing overflows 32 bits below this width.
_MAX_WIDTH = 1 << 17
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
        for start in range(0, len(cold), SORTED_ROWS):
            ids = cold.cold_ids[start : start + SORTED_ROWS]
            sketched, arrays = _sketch_run(cold, ids, start, magnitudes)
            data.write(np.ascontiguousarray(sketched.integers.T).tobytes())
            runs.append(arrays)
    arrays = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    exhaust(write_tensors(path / SKETCH_NAME, {name: ArrayTensor(array) for name, array in arrays.items()}))
    graph = path / SKETCH_GRAPH_NAME
    onnx.save(_graph([run["order"].size for run in runs], cold.width), graph)
    store_packed([graph], path / SKETCH_DATA_NAME)
    return _add_to_manifest(folder, arrays)


def _sketch_run(
    cold: ColdRows, ids: Ids, start: int, magnitudes: Callable[[Ids, Doubles], Doubles]
) -> tuple[SketchedRows, _Arrays]:
    """Sketch rows that follow each other, sorted by their largest entries."""
    rows = cold.head(ids).astype(np.float32)
    places = np.argsort(np.abs(rows).max(axis=1), kind="stable")
    places = np.concatenate([places, np.repeat(places[-1:], -len(places) % GROUP_ROWS)])
    sketched = sketch_rows(rows[places])
    sizes = round_up(sketched.norms + sketched.residuals)
    arrays: _Arrays = {
        "order": (start + places).astype(np.int32),
        "scales": sketched.scales,
        "residuals": sketched.residuals,
        "norms": sketched.norms,
        "magnitudes": np.maximum(sizes, magnitudes(ids[places], sizes)),
    }
    if cold.has_head_bias:
        bias = cold.head_bias(ids[places]).astype(np.float64)
        arrays["bias"] = bias.reshape(-1, GROUP_ROWS).max(axis=1)
    return sketched, arrays


def _magnitudes(folder: TrimmedFolder, cold: ColdRows) -> Callable[[Ids, Doubles], Doubles]:
    """What the head's rounding errors are proportional to, a group: of float rows their norms."""
    scheme = BlockScheme.from_dict(folder.manifest.quantization)
    if scheme is None or COLD_BLOCKS_NAME not in folder.manifest.files:
        return lambda _, sizes: sizes
    dtype = "F16" if folder.manifest.dtype == "fp16" else "F32"
    specs = block_specs(folder.file(COLD_BLOCKS_NAME), len(cold), cold.width, scheme, dtype)
    scales = map_tensor(specs.scales)

    def of_groups(ids: Ids, _: Doubles) -> Doubles:
        rows = np.searchsorted(cold.cold_ids, ids)
        sizes = block_magnitude(np.asarray(scales)[rows], scheme)
        largest: Doubles = sizes.reshape(-1, GROUP_ROWS).max(axis=1)
        return largest

    return of_groups


def _graph(runs: Sequence[int], width: int) -> onnx.ModelProto:
    """Digits (M, H) -> the largest product with the integers of each group, int32 (M, groups)."""
    if width > _MAX_WIDTH:
        raise ValueError(f"rows of {width} integers overflow a sum of 32 bits")
    helper, types = onnx.helper, onnx.TensorProto
    initializers = [
        helper.make_tensor("zero", types.UINT8, [], [ZERO]),
        helper.make_tensor("last_axis", types.INT64, [1], [2]),
        helper.make_tensor("groups", types.INT64, [3], [0, -1, GROUP_ROWS]),
    ]
    nodes, maxima, offset = [], [], 0
    for number, rows in enumerate(runs):
        integers, products, grouped, largest = (
            f"{name}_{number}" for name in ("integers", "products", "grouped", "largest")
        )
        initializers.append(_stored(integers, offset, (width, rows)))
        offset += width * rows
        nodes += [
            helper.make_node("MatMulInteger", ["digits", integers, "zero", "zero"], [products]),
            helper.make_node("Reshape", [products, "groups"], [grouped]),
            helper.make_node("ReduceMax", [grouped, "last_axis"], [largest], keepdims=0),
        ]
        maxima.append(largest)
    nodes.append(helper.make_node("Concat", maxima, ["maximum"], axis=1))
    graph = helper.make_graph(
        nodes,
        "cold_sketch",
        [helper.make_tensor_value_info("digits", types.UINT8, ["digits", width])],
        [helper.make_tensor_value_info("maximum", types.INT32, ["digits", sum(runs) // GROUP_ROWS])],
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
