"""Make an exported encoder-decoder servable: two graphs without branches over one file of weights.

optimum-onnx writes an encoder, a decoder for the first token, a decoder for the later ones, and merges the
two decoders under an `If`. Only two graphs are needed. The decoder for later tokens also takes an empty past
and any number of tokens, so it is the decoder. What the first one alone computes, the cross-attention's
keys and values, depends on the source text alone, so it moves to the end of the encoder and is run once a
request. Through transformers' exporter just these two graphs are written. Weights that both have, the
embedding first of all, are stored once and mapped twice.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve.errors import UnsupportedModelError
from trimserve.files.quantized import Quantization
from trimserve_export.graphs.reading import read_exported
from trimserve_export.graphs.values import describe, find_output
from trimserve_export.graphs.writing import ALIGNMENT
from trimserve_export.serving.quantize import quantize_products
from trimserve_export.serving.servable import apply_passes

ENCODER_NAME = "encoder_model.onnx"
DECODER_NAME = "decoder_model.onnx"
DATA_NAME = "model.onnx_data"
# optimum-onnx's names of the decoders for the first and for later tokens.
_FIRST_NAME = "decoder_model.onnx"
_LATER_NAME = "decoder_with_past_model.onnx"
_HEADS_BEFORE_POSITIONS = (0, 2, 1, 3)
# Smaller tensors stay in the graph, as ONNX Runtime wants shapes and scalars there.
_MIN_EXTERNAL_BYTES = 256
# dtype, bytes and hash of a tensor.
_Content: TypeAlias = tuple[str, int, bytes]


def make_seq2seq_servable(
    source: Path, output: Path, *, rows: int, scheme: Quantization | None = None
) -> dict[str, Path]:
    """Write the two graphs of an encoder-decoder.

    Args:
        source: the folder that the exporter wrote.
        output: the folder for `encoder_model.onnx`, `decoder_model.onnx` and `model.onnx_data`.
        rows: K, the rows that each vocab matrix must have.
        scheme: how to quantise the products of both, if at all.

    Returns:
        Role -> graph: "encoder" and "decoder".

    Raises:
        UnsupportedModelError: a part of a graph is not understood; nothing is written then.
    """
    encoder = read_exported(source / ENCODER_NAME)
    if (source / _LATER_NAME).is_file():
        decoder = read_exported(source / _LATER_NAME)
        add_cross_attention(encoder, read_exported(source / _FIRST_NAME))
    else:
        decoder = read_exported(source / DECODER_NAME)
    apply_passes(encoder, rows=rows, has_head=False)
    apply_passes(decoder, rows=rows, has_head=True)
    if scheme is not None:
        quantize_products(encoder, scheme, has_head=False)
        quantize_products(decoder, scheme, has_head=True)
    save_sharing({ENCODER_NAME: encoder, DECODER_NAME: decoder}, output)
    return {"encoder": output / ENCODER_NAME, "decoder": output / DECODER_NAME}


def add_cross_attention(encoder: ir.Model, first: ir.Model) -> None:
    """Give an encoder the outputs `present.N.encoder.key` and `.value` of the decoder for the first token.

    Raises:
        UnsupportedModelError: the decoder has none, or makes them of more than the encoder's hidden states.
    """
    hidden = find_output(encoder.graph, "last_hidden_state")
    outputs = [value for value in first.graph.outputs if ".encoder." in str(value.name)]
    if not outputs:
        raise UnsupportedModelError("the decoder makes no keys and values of the encoder's hidden states.")
    for domain, version in first.opset_imports.items():
        encoder.opset_imports.setdefault(domain, version)
    copier = _Copier(encoder.graph, hidden)
    encoder.graph.outputs.extend(copier.copy_output(value) for value in outputs)
    RemoveUnusedNodesPass()(encoder)


class _Copier:
    """Copies what the decoder computes of `encoder_hidden_states` alone to the end of the encoder."""

    def __init__(self, graph: ir.Graph, hidden: ir.Value) -> None:
        self._graph = graph
        self._hidden = hidden
        self._copies: dict[ir.Value, ir.Value] = {}

    def copy_output(self, value: ir.Value) -> ir.Value:
        """Copy the nodes behind keys or values (batch, heads, positions, size)."""
        transpose = _producer(value, "Transpose")
        reshape = _producer(transpose.inputs[0], "Reshape")
        if tuple(transpose.attributes["perm"].as_ints()) != _HEADS_BEFORE_POSITIONS or value.shape is None:
            raise UnsupportedModelError(f"{describe(transpose)} makes {value.name}: not understood.")
        if reshape.inputs[0] is None:
            raise UnsupportedModelError(f"{describe(reshape)} reshapes nothing: the graph is damaged.")
        projected = self._copy(reshape.inputs[0])
        # The decoder takes the batch size from its own hidden states; 0 takes it from the reshaped tensor.
        shape = self._constant(f"{value.name}/shape", [0, -1, value.shape[1], value.shape[3]])
        split = self._node("Reshape", [projected, shape], name=f"{value.name}/heads")
        made = self._node("Transpose", [split], name=f"{value.name}/transposed", like=transpose)
        made.name, made.type, made.shape = value.name, value.type, value.shape
        return made

    def _copy(self, value: ir.Value) -> ir.Value:
        if value.name == "encoder_hidden_states":
            return self._hidden
        if value not in self._copies:
            self._copies[value] = self._copied(value)
        return self._copies[value]

    def _copied(self, value: ir.Value) -> ir.Value:
        if value.const_value is not None:
            copy = ir.Value(
                name=f"cross/{value.name}", type=value.type, shape=value.shape, const_value=value.const_value
            )
            self._graph.register_initializer(copy)
            return copy
        node = value.producer()
        if node is None:
            raise UnsupportedModelError(
                f"the cross-attention's keys and values depend on {value.name}: not understood."
            )
        inputs = [None if operand is None else self._copy(operand) for operand in node.inputs]
        made = self._nodes(node.op_type, inputs, name=f"cross/{node.name}", like=node)
        self._copies.update(zip(node.outputs, made, strict=True))
        return self._copies[value]

    def _node(
        self, op_type: str, inputs: list[ir.Value | None], *, name: str, like: ir.Node | None = None
    ) -> ir.Value:
        return self._nodes(op_type, inputs, name=name, like=like)[0]

    def _nodes(
        self, op_type: str, inputs: list[ir.Value | None], *, name: str, like: ir.Node | None
    ) -> list[ir.Value]:
        """Append a node, with the attributes and as many outputs as another has."""
        attributes = list(like.attributes.values()) if like else []
        domain = like.domain if like else ""
        names = [f"cross/{output.name}" for output in like.outputs] if like else [f"{name}_output"]
        results = [ir.Value(name=result) for result in names]
        self._graph.append(ir.Node(domain, op_type, inputs, attributes, outputs=results, name=name))
        return results

    def _constant(self, name: str, dims: Iterable[object]) -> ir.Value:
        sizes = [size if isinstance(size, int) else None for size in dims]
        if None in sizes:
            raise UnsupportedModelError(
                f"the exporter gave {name.partition('/')[0]} no number of heads or no size of them: export "
                "the model as fp32 or fp16."
            )
        array = np.array(sizes, np.int64)
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        self._graph.register_initializer(value)
        return value


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        found = "nothing" if node is None else describe(node)
        raise UnsupportedModelError(f"expected a {op_type} before the cross-attention's keys, found {found}.")
    return node


def save_sharing(models: Mapping[str, ir.Model], output: Path) -> None:
    """Write models with their weights in one file, `model.onnx_data`, equal tensors once.

    Args:
        models: file name -> model; their large initializers become external.
        output: an existing or new folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = [
        (value, tensor)
        for model in models.values()
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None and tensor.nbytes >= _MIN_EXTERNAL_BYTES
    ]
    keys = [_content(tensor) for _, tensor in found]
    unique: dict[_Content, ir.TensorProtocol] = {}
    for key, (_, tensor) in zip(keys, found, strict=True):
        unique.setdefault(key, tensor)
    stored = ir.external_data.convert_tensors_to_external(
        list(unique.values()), output, DATA_NAME, alignment=ALIGNMENT
    )
    place = dict(zip(unique, stored, strict=True))
    for key, (value, tensor) in zip(keys, found, strict=True):
        value.const_value = _at(place[key], tensor)
    for name, model in models.items():
        ir.save(model, output / name)


def _content(tensor: ir.TensorProtocol) -> _Content:
    """What equal tensors have in common: dtype and bytes, in whatever shape."""
    entries = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return str(tensor.dtype), tensor.nbytes, hashlib.blake2b(entries.data).digest()


def _at(stored: ir.ExternalTensor, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """A tensor that reads the stored bytes."""
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(tensor.name),
        base_dir=stored.base_dir,
    )
