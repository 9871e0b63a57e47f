"""Read a graph that an exporter has just written."""

from pathlib import Path

import onnx_ir as ir


def read_exported(path: Path) -> ir.Model:
    """Read a graph whose initializers stay in their files.

    torch moves every large tensor of a graph over 2 GB to external data, those of Constant nodes too (the
    rotary frequencies of Llama); onnx_ir rewrites initializers alone when it saves. So constants are read
    into memory, where a changed data file cannot leave them behind.

    Args:
        path: the .onnx file, or a link to it.
    """
    model = ir.load(path.resolve())
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _in_memory(attribute.value))
    return model


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    # A copy, so that the mapped file can go.
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
