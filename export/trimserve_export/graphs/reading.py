"""Read a graph in the form that all later steps take: every lookup of token ids is a Gather of rows."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.content import check_content
from trimserve.files.inner import inner_path
from trimserve.foreign import foreign
from trimserve_export.graphs.turned import turn_tables
from trimserve_export.graphs.values import describe


class GraphFiles:
    """Graphs of one export: each file is parsed once, and each reader gets a copy to change.

    Copies share their tensors, large ones by their place in a file.
    """

    def __init__(self) -> None:
        self._parsed: dict[Path, ir.Model] = {}

    def parsed(self, path: Path) -> ir.Model:
        """The one graph that copies are made of, as it is written: not to be changed.

        Raises:
            UnsupportedModelError: see `load_graph`.
            MismatchError: see `load_graph`.
        """
        if path not in self._parsed:
            model = load_graph(path, turned=False)
            # onnx_ir copies nodes in their order; older builders wrote some before what they read.
            model.graph.sort()
            self._parsed[path] = model
        return self._parsed[path]

    def copy(self, path: Path, *, turned: bool = True) -> ir.Model:
        """A copy of a graph; see `load_graph`."""
        model = self.parsed(path).clone()
        if turned:
            turn_tables(model.graph)
        return model


def load_graph(path: Path, *, turned: bool = True) -> ir.Model:
    """Read a graph of any origin; its large tensors stay in their files, its Constant nodes are initializers.

    Args:
        path: the .onnx file, or a link to it: external data is looked for beside the link, as the hub's
            cache has it.
        turned: bring lookups into their normal form (`turn_tables`). Trimming takes the tables as they are
            stored, so it reads the graph without.

    Raises:
        UnsupportedModelError: not a plain ONNX graph.
        MismatchError: a file is damaged, or its external data missing, cut off or outside its folder.
    """
    model = _parse(path)
    # What has a default need not be fed: graphs of before IR version 4 list every weight as an input.
    model.graph.inputs[:] = [value for value in model.graph.inputs if not value.is_initializer()]
    with foreign(f"{path} cannot be read as an ONNX graph", advice="fetch it again."):
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _resolved(value.const_value, path)
    if turned:
        turn_tables(model.graph)
    return model


def _parse(path: Path) -> ir.Model:
    if path.suffix == ".ort":
        raise UnsupportedModelError(
            f"{path} is in ONNX Runtime's own format: use the .onnx it was made from."
        )
    check_content(path)
    with foreign(f"{path} cannot be read as an ONNX graph", advice="fetch it again."):
        model = ir.load(path)
    for node in model.graph.all_nodes():
        if node.op_type == "EPContext":
            raise UnsupportedModelError(
                f"{describe(node)} holds a part of the model compiled for one device: use the graph it was "
                "compiled from."
            )
    return model


def read_exported(path: Path, *, turned: bool = True) -> ir.Model:
    """Read a graph that an exporter or a serving pass wrote; its Constant nodes stay nodes.

    torch moves every large tensor of a graph over 2 GB to external data, those of Constant nodes too (the
    rotary frequencies of Llama); onnx_ir rewrites initializers alone when it saves. So constants are read
    into memory, where a changed data file cannot leave them behind.

    Args:
        path: the .onnx file, or a link to it.
        turned: see `load_graph`.
    """
    model = _parse(path.resolve())
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _in_memory(attribute.value))
    if turned:
        turn_tables(model.graph)
    return model


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    # A copy, so that the mapped file can go.
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _resolved(tensor: ir.ExternalTensor, graph: Path) -> ir.ExternalTensor:
    """The tensor at the real place of its file.

    onnx_ir refuses links that lead out of the graph's folder and hard links, which are what the hub's cache
    consists of; the name in the graph, which is what a stranger writes, must stay within the folder.
    """
    named = inner_path(graph.parent, str(tensor.location), str(graph))
    path = named.resolve()
    if not path.is_file():
        raise MismatchError(f"{named} is missing, which holds {tensor.name}: fetch it.")
    begin, size = tensor.offset or 0, tensor.nbytes
    if begin < 0 or size < 0 or (tensor.length or size) != size or path.stat().st_size < begin + size:
        check_content(path)
        raise MismatchError(
            f"{named} should have {size:,} bytes from {begin:,} on for {tensor.name} but has "
            f"{path.stat().st_size:,} in all: fetch it again."
        )
    return ir.ExternalTensor(
        path,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        base_dir="",
    )
