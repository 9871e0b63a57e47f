"""The cold product alone, for 1 to 48 hidden states: what its layout costs in time and in private memory.

Each variant is a graph over the same random cold rows in one file, and gives the largest logit of each tile:

- ``left``: the mapped rows are the left operand, in parts for the threads, as `serving/cold_graph.py` has it;
- ``left bf16``: the same over rows stored in BF16, cast a tile at a time;
- ``left bf16, one part``: the threads share each operator instead;
- ``right packed``: the rows are the right operand (FusedMatMul), which ONNX Runtime copies to pack it;
- ``right mapped``: the same without packing;
- ``int4``: quantised rows, packed in the file, as `serving/cold_head.py` writes it;
- ``int4 private``: the same, packed when the session is opened.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx

from bench import harness
from bench.decode.models import NormalTensor
from trimserve.console import human_bytes, table
from trimserve.files.tensors import exhaust, read_header, write_tensors
from trimserve.runtime.cold_head import PartedGraph
from trimserve.runtime.session import open_session

SHAPES = {"multidomain-qwen2": (144_256, 256), "gemma-3-270m": (245_760, 640)}
QUICK_SHAPES = {"tiny": (3000, 64)}
SIZES = (1, 2, 4, 8, 16, 24, 32, 48)
# variant -> its folder, and whether the session packs.
VARIANTS = {
    "left": ("left", False),
    "left bf16": ("left-bf16", False),
    "left bf16, one part": ("left-bf16-whole", False),
    "right packed": ("right", True),
    "right mapped": ("right", False),
    "int4": ("int4", True),
    "int4 private": ("int4-private", True),
}
GRAPH = "cold_max.onnx"
_FILE = "cold_rows.safetensors"
_REPEATS = 9
_TILE_BYTES = 4 << 20


def make(folder: Path, shape: tuple[int, int]) -> None:
    """Write the folders of all variants."""
    from trimserve_export.cold_head import graph as cold_graph
    from trimserve_export.cold_head.writing import write_cold_head
    from trimserve_export.serving.quantize import quantization_of, quantize_graph

    for name in ("left", "left-bf16", "left-bf16-whole", "right", "int4"):
        target = folder / name
        target.mkdir()
        rows = NormalTensor(shape, 1.0, 0, dtype="BF16" if "bf16" in name else "F32")
        exhaust(write_tensors(target / _FILE, {"embedding": rows}, {"tied": "true"}))
        graph = _head_graph(target / "head.onnx", shape[1])
        if name == "right":
            _write_right(target, shape)
            continue
        if name == "int4":
            (target / "quantized").mkdir()
            graph = quantize_graph(graph, target / "quantized", quantization_of("int4", 4), has_head=True)
        parts = 1 if "whole" in name else cold_graph.MOST_PARTS
        with patch.object(cold_graph, "MOST_PARTS", parts):
            write_cold_head(graph, target / _FILE)
    _forget_packed(folder / "int4", folder / "int4-private")


def _head_graph(path: Path, width: int) -> Path:
    """The least model with a head of this width."""
    value = onnx.helper.make_tensor_value_info
    constant = onnx.numpy_helper.from_array
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "body"], ["hidden"]),
        onnx.helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "head",
        [value("x", onnx.TensorProto.FLOAT, ["batch", "positions", 16])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", "positions", 16])],
        [
            constant(np.ones((16, width), np.float32), "body"),
            constant(np.ones((width, 16), np.float32), "head"),
        ],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=_opsets(), ir_version=10), path)
    return path


def _opsets() -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]


def _write_right(folder: Path, shape: tuple[int, int]) -> None:
    """The largest logit of each tile, with the rows as the right operand."""
    spec = read_header(folder / _FILE)[0]["embedding"]
    rows, width = shape
    step = max(1, _TILE_BYTES // (4 * width))
    nodes, tiles, maxima, places = [], [], [], []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tiles.append(_mapped(f"rows_{start}", spec.offset + 4 * start * width, (stop - start, width)))
        product = onnx.helper.make_node(
            "FusedMatMul",
            ["hidden_states", f"rows_{start}"],
            [f"logits_{start}"],
            domain="com.microsoft",
            transB=1,
        )
        outputs = [f"maximum_{start}", f"row_{start}"]
        nodes += [product, onnx.helper.make_node("TopK", [f"logits_{start}", "one"], outputs, axis=1)]
        maxima.append(outputs[0])
        places.append(outputs[1])
    nodes.append(onnx.helper.make_node("Concat", maxima, ["maximum"], axis=1))
    nodes.append(onnx.helper.make_node("Concat", places, ["row"], axis=1))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "right",
        [value("hidden_states", onnx.TensorProto.FLOAT, ["steps", width])],
        [
            value("maximum", onnx.TensorProto.FLOAT, ["steps", None]),
            value("row", onnx.TensorProto.INT64, ["steps", None]),
        ],
        [*tiles, onnx.numpy_helper.from_array(np.array([1], np.int64), "one")],
    )
    model = onnx.helper.make_model(graph, opset_imports=_opsets(), ir_version=10)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def _mapped(name: str, offset: int, shape: tuple[int, int]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.TensorProto.FLOAT,
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", _FILE), ("offset", offset), ("length", 4 * shape[0] * shape[1])):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _forget_packed(source: Path, target: Path) -> None:
    """Copy a folder less the notes that say where its packed matrices are."""
    shutil.copytree(source, target)
    model = onnx.load(target / GRAPH, load_external_data=False)
    for initializer in model.graph.initializer:
        kept = [entry for entry in initializer.external_data if not entry.key.startswith("prepacked_")]
        del initializer.external_data[:]
        initializer.external_data.extend(kept)
    (target / GRAPH).write_bytes(model.SerializeToString())


def worker(folder: Path, width: int, threads: int, *, prepack: bool) -> dict[str, Any]:
    """Open the graph of one variant in this process; memory it takes, and milliseconds by hidden states."""
    before = harness.memory()
    multiply = _product(folder, threads, prepack=prepack)
    random = np.random.default_rng(1)
    times = {}
    for size in SIZES:
        hidden = random.standard_normal((size, width), np.float32)
        samples = []
        for _ in range(_REPEATS + 2):
            begin = time.perf_counter_ns()
            multiply(hidden)
            samples.append((time.perf_counter_ns() - begin) / 1e6)
        times[str(size)] = float(np.median(samples[2:]))
    after = harness.memory()
    return {"ms": times, "anonymous": (after.anonymous or 0) - (before.anonymous or 0), "peak": after.peak}


def _product(folder: Path, threads: int, *, prepack: bool) -> Callable[[np.ndarray], object]:
    if folder.name == "right" or "whole" in folder.name:
        session = open_session(folder / GRAPH, threads=threads, prepack=prepack)
        return lambda hidden: session.run(None, {"hidden_states": hidden})
    graph = PartedGraph(folder / GRAPH, threads=threads, packed=prepack)
    return lambda hidden: graph.each(["maximum", "row"], hidden, lambda _, outputs: outputs)


def measure(name: str, shape: tuple[int, int], args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Measure all variants of one shape in turn."""
    with harness.scratch_folder("cold-head", args.work) as folder:
        make(folder, shape)
        neighbours = harness.Neighbours()
        common = ["--threads", str(args.threads), "--width", str(shape[1])]
        variants = {
            variant: ["-m", "bench.cold_head", "--worker", str(folder / path), *common, *(["--pack"] * packs)]
            for variant, (path, packs) in VARIANTS.items()
        }
        runs = harness.in_turn(variants, 2 if args.quick else args.rounds)
        stored = {name: _stored_bytes(folder / path) for name, (path, _) in VARIANTS.items()}
    return {
        "model": name,
        "rows": shape[0],
        "width": shape[1],
        "threads": args.threads,
        "others_cpu_share": neighbours.share(),
        "file_bytes": stored,
        "anonymous_bytes": {variant: min(run["anonymous"] for run in runs[variant]) for variant in VARIANTS},
        "ms": {variant: _by_size(runs[variant]) for variant in VARIANTS},
        "ms_samples": {variant: [run["ms"] for run in runs[variant]] for variant in VARIANTS},
    }


def _stored_bytes(folder: Path) -> int:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    names = {
        entry.value for i in model.graph.initializer for entry in i.external_data if entry.key == "location"
    }
    return sum((folder / name).stat().st_size for name in names)


def _by_size(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {str(size): asdict(harness.spread([run["ms"][str(size)] for run in runs])) for size in SIZES}


def summary(row: Mapping[str, Any]) -> str:
    """One shape for people: milliseconds by hidden states, and memory."""
    header = ("ms for hidden states", *map(str, SIZES), "anonymous", "file")
    lines = [
        (
            variant,
            *(f"{row['ms'][variant][str(size)]['median']:.1f}" for size in SIZES),
            human_bytes(max(0, row["anonymous_bytes"][variant])),
            human_bytes(row["file_bytes"][variant]),
        )
        for variant in VARIANTS
    ]
    return (
        f"{row['model']}: {row['rows']:,} x {row['width']}, {row['threads']} threads\n{table(header, lines)}"
    )


def main() -> int:
    """Measure, save a row a shape, print a table a shape."""
    parser = harness.parser(__doc__ or "", rounds=5, work="4 GB of graphs")
    parser.add_argument("--worker", type=Path, help="one measurement in this process")
    parser.add_argument("--width", type=int)
    parser.add_argument("--pack", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.width, args.threads, prepack=args.pack)))
        return 0
    rows = []
    for name, shape in (QUICK_SHAPES if args.quick else SHAPES).items():
        row = measure(name, shape, args)
        harness.save_row("cold_head", row, quick=args.quick)
        print(summary(row), file=sys.stderr)
        rows.append({key: value for key, value in row.items() if not key.endswith("_samples")})
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
