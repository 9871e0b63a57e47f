"""Checks of a folder that was made of an ONNX graph: trim the graph again and compare what is stored.

That tells a damaged or exchanged row from a right one; that trimming itself is right is what the checks of
numbers show, against the untrimmed graph.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimserve.files.scratch import scratch_folder
from trimserve.files.tensors import map_tensor, read_header
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_NAME, COLD_WEIGHTS_NAME
from trimserve_export.from_graph.trimmed import trim_to_folder
from trimserve_export.graphs.reading import load_graph
from trimserve_export.layouts.drop_in import COLD_TENSOR
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check


def check_retrimmed(context: Context) -> Check:
    """Trim the source's graph again; every constant and every cold row must be the same, bit for bit."""
    folder = context.folder
    with scratch_folder("again") as again:
        manifest = folder.manifest
        trim_to_folder(
            context.source,
            folder.vocab,
            again,
            task=manifest.task,
            layout=manifest.layout,
            cold=folder.has_cold or _drop_in_has_cold(folder.path, manifest.graphs.values()),
        )
        graphs = manifest.graphs.values()
        differing = [name for graph in graphs for name in _constants(folder.path, again, graph)]
        differing += _cold(folder.path, again)
    if differing:
        detail = f"{', '.join(differing)} differ from {context.source.name} trimmed again"
        return Check("kept-rows", False, None, detail)
    cold = f"{len(folder.vocab.cold_ids):,} cold rows" if folder.has_cold else "no cold rows stored"
    return Check("kept-rows", True, 0.0, f"{len(folder.vocab):,} kept rows, {cold}: the graph trimmed again")


def _drop_in_has_cold(folder: Path, graphs: Iterable[str]) -> bool:
    """Whether a drop-in names cold rows, which of several graphs are called after each."""
    return any(COLD_TENSOR in ir.load(folder / name).graph.initializers for name in graphs)


def _constants(folder: Path, again: Path, name: str) -> Iterator[str]:
    """Names of the constants that differ, or that one of two graphs lacks."""
    # Not ir.load, which refuses to read what lies behind a hard link (`--link`).
    found, expected = (load_graph(path / name, turned=False).graph.initializers for path in (folder, again))
    yield from sorted(found.keys() ^ expected.keys())
    for key in sorted(found.keys() & expected.keys()):
        first, second = found[key].const_value, expected[key].const_value
        if first is None or second is None or not _same(first, second):
            yield key


def _same(first: ir.TensorProtocol, second: ir.TensorProtocol) -> bool:
    shapes = tuple(first.shape.numpy()) == tuple(second.shape.numpy())
    return shapes and first.dtype == second.dtype and _same_arrays(first.numpy(), second.numpy())


def _same_arrays(first: np.ndarray, second: np.ndarray) -> bool:
    bits = np.dtype(f"u{first.itemsize}")
    return np.array_equal(np.atleast_1d(first).view(bits), np.atleast_1d(second).view(bits))


def _cold(folder: Path, again: Path) -> Iterator[str]:
    """Names of the cold tensors that differ."""
    if not (again / COLD_NAME).is_file():
        return
    found, expected = (read_header(path / COLD_NAME)[0] for path in (folder, again))
    yield from sorted(found.keys() ^ expected.keys())
    for key in sorted(found.keys() & expected.keys()):
        if not _same_arrays(map_tensor(found[key]), map_tensor(expected[key])):
            yield f"cold {key}"
    for name in (COLD_BLOCKS_NAME, COLD_WEIGHTS_NAME):
        if (again / name).is_file() and not _same_files(folder, again, name):
            yield name


def _same_files(folder: Path, again: Path, name: str) -> bool:
    first, second = (np.memmap(path / name, np.uint8, "r") for path in (folder, again))
    return np.array_equal(first, second)
