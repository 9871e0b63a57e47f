"""Ways to write a graph: with a copy of its weights, in one file, or beside links to what nothing changed."""

import errno
import os
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from trimserve.errors import UsageError

# Smaller tensors stay in the graph, as ONNX Runtime wants shapes and scalars there.
_MIN_EXTERNAL_BYTES = 256


class Writer(Protocol):
    """Writes a graph and what it needs into the folder of `path`."""

    def __call__(self, model: ir.Model, path: Path) -> None:
        """Write."""


def write_whole(model: ir.Model, path: Path) -> None:
    """Write a graph with its weights in one file, as a graph without external data was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.external_data.load_to_model(model)
    ir.save(model, path)


class LinkingWriter:
    """Writes graphs whose untouched weights are hard links to the files that they lie in.

    What was cut, turned or made is written to a file of its own. All of a graph's files are called
    ``<name>_data``, ``<name>_data_1`` and so on; graphs in one folder share the links.
    """

    def __init__(self) -> None:
        self._links: dict[Path, Path] = {}

    def __call__(self, model: ir.Model, path: Path) -> None:
        """Link, write what is not linked, and write the graph.

        Raises:
            UsageError: a file cannot be linked, because the target lies on another file system, or because
                the file system has no hard links.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [value for graph in model.graphs() for value in graph.initializers.values()]
        made: list[tuple[ir.Value, ir.TensorProtocol]] = []
        for value in values:
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = self._at_link(tensor, path)
            elif tensor is not None and tensor.nbytes >= _MIN_EXTERNAL_BYTES:
                made.append((value, tensor))
        stored = ir.external_data.convert_tensors_to_external(
            [tensor for _, tensor in made], path.parent, _free_name(path).name, alignment=ALIGNMENT
        )
        for (value, _), tensor in zip(made, stored, strict=True):
            value.const_value = tensor
        ir.save(model, path)

    def _at_link(self, tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
        source = Path(tensor.path)
        if source not in self._links:
            self._links[source] = link_file(source, _free_name(path))
        return ir.ExternalTensor(
            self._links[source].name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
            base_dir=path.parent,
        )


def link_file(source: Path, target: Path) -> Path:
    """Make a hard link and return its path.

    Raises:
        UsageError: the file system cannot.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES):
            raise
        raise UsageError(
            f"{source} cannot be linked into {target.parent.parent} ({error.strerror}): --link needs the "
            "model and the target on one file system that has hard links; choose another target or leave "
            "--link out."
        ) from error
    return target


def _free_name(path: Path) -> Path:
    """The first of a graph's data files that does not exist yet."""
    name, number = path.with_name(f"{path.name}_data"), 0
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}_data_{number}")
    return name


GRAPH_NAME = "model.onnx"
# Large tensors start on a boundary at which every system can map them.
ALIGNMENT = 65536


def write_copy(model: ir.Model, path: Path) -> None:
    """Write a graph, and a copy of its weights to ``<name>_data``, which ONNX Runtime maps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}_data", alignment=ALIGNMENT)
