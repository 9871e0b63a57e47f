"""Store the packed form of quantised matrices, for ONNX Runtime to map instead of making a private copy.

A MatMulNBits kernel works on a matrix in an order of its own, which depends on the processor. ONNX Runtime
can write packed matrices into the external data; when it opens such a graph it packs again, matrix by
matrix, compares hashes, and where they agree keeps the mapped bytes. On a processor that wants another
order they do not agree: then it keeps its copy, and all that is lost is memory.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx

from trimserve.errors import require

_KEY = "prepacked_"
# A page: what starts there is mapped where it is aligned as in memory.
_ALIGNMENT = 4096


def store_packed(graphs: Sequence[Path], data: Path, parts: Iterable[onnx.ModelProto] | None = None) -> None:
    """Append the packed form of the graphs' matrices to their data, and point to it in the graphs.

    Args:
        graphs: graphs whose initialisers of one name are the same bytes of `data`.
        data: the file beside them.
        parts: graphs that have these matrices between them. A session holds all its packed matrices until
            it has written them, so memory holds those of one part at a time; by default the first graph's.
    """
    entries: dict[str, list[tuple[str, str]]] = {}
    part_path = data.with_name(f".{data.name}.part.onnx")
    for graph in graphs[:1] if parts is None else _saved(parts, part_path):
        with tempfile.TemporaryDirectory(dir=data.parent, prefix=".packed.") as scratch:
            entries.update(_append(_pack(graph, Path(scratch)), data))
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        for initializer in model.graph.initializer:
            for key, value in entries.get(initializer.name, ()):
                initializer.external_data.add(key=key, value=value)
        onnx.save(model, path)


def _saved(parts: Iterable[onnx.ModelProto], path: Path) -> Iterator[Path]:
    """Each part in turn as a file at `path`, which must be beside the data that the parts refer to."""
    try:
        for part in parts:
            onnx.save(part, path)
            yield path
    finally:
        path.unlink(missing_ok=True)


def _pack(graph: Path, folder: Path) -> Path:
    """Let ONNX Runtime write the graph with its matrices packed."""
    runtime = require("onnxruntime", extra="cpu", purpose="export --quantize")
    path = folder / graph.name
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns that the file is for this kind of processor
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps the names
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", f"{path.name}_data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
    ):
        options.add_session_config_entry(key, value)
    runtime.InferenceSession(str(graph.resolve()), options, providers=["CPUExecutionProvider"])
    return path


def _append(packed: Path, data: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Copy packed matrices from one file to the end of another; yields an initialiser's new entries.

    An entry's value is ``KERNEL+HASH|OFFSET;LENGTH;CHECKSUM``, the last part once a buffer.
    """
    model = onnx.load(packed, load_external_data=False)
    with packed.with_name(f"{packed.name}_data").open("rb") as source, data.open("ab") as target:
        for initializer in model.graph.initializer:
            entries = []
            for entry in initializer.external_data:
                if entry.key.startswith(_KEY):
                    kernel, *buffers = entry.value.split("|")
                    moved = []
                    for buffer in buffers:
                        offset, length, checksum = buffer.split(";")
                        source.seek(int(offset))
                        target.write(bytes(-target.tell() % _ALIGNMENT))
                        moved.append(f"{target.tell()};{length};{checksum}")
                        target.write(source.read(int(length)))
                    entries.append((entry.key, "|".join([kernel, *moved])))
            yield initializer.name, entries
