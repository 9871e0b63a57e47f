"""Models of real shapes with random numbers, as a checkpoint and as an ONNX graph, streamed to disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bench.random_tensors import RandomTensor, random_block
from trimserve.files.tensors import TensorSource, exhaust, write_tensors

DATA_NAME = "model.onnx_data"


@dataclass(frozen=True, slots=True)
class Shape:
    """A tied decoder's sizes, in the words of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes of the matrices, as a Qwen3 checkpoint has them: (outputs, inputs)."""
        width, attention = self.hidden_size, self.num_attention_heads * self.head_dim
        cached = self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            name = f"model.layers.{layer}"
            yield f"{name}.self_attn.q_proj.weight", (attention, width)
            yield f"{name}.self_attn.k_proj.weight", (cached, width)
            yield f"{name}.self_attn.v_proj.weight", (cached, width)
            yield f"{name}.self_attn.o_proj.weight", (width, attention)
            yield f"{name}.mlp.gate_proj.weight", (self.intermediate_size, width)
            yield f"{name}.mlp.up_proj.weight", (self.intermediate_size, width)
            yield f"{name}.mlp.down_proj.weight", (width, self.intermediate_size)

    @property
    def parameters(self) -> int:
        """Numbers of all matrices."""
        return sum(rows * columns for _, (rows, columns) in self.tensors())


# The shapes of Gemma-3-270m, Qwen3-0.6B and Llama-3.2-1B; the last for trying the script.
SHAPES = {
    "0.27B": Shape(262_144, 640, 2048, 18, 4, 1, 256),
    "0.6B": Shape(151_936, 1024, 3072, 28, 16, 8, 128),
    "1.2B": Shape(128_256, 2048, 8192, 16, 32, 8, 64),
    "tiny": Shape(32_000, 256, 512, 2, 4, 2, 64),
}


def _write_texts(folder: Path, shape: Shape) -> None:
    config = {name: getattr(shape, name) for name in Shape.__slots__}
    names = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | names), "utf-8")
    (folder / "tokenizer.json").write_text("{}", "utf-8")


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """Write a fp32 checkpoint with the tensors that the model class has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimserve_export.checkpoint.axes import build_on_meta

    folder.mkdir(parents=True)
    _write_texts(folder, shape)
    model = build_on_meta(AutoConfig.from_pretrained(folder), AutoModelForCausalLM)
    block = random_block()
    tensors: dict[str, TensorSource] = {
        name: RandomTensor(tuple(parameter.shape), block) for name, parameter in model.named_parameters()
    }
    exhaust(write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}))


def make_graph(folder: Path, shape: Shape) -> None:
    """Write a fp32 graph: lookup, a product with each matrix of the body, and the tied head.

    Attention is left out: it has no weights, and trimming follows the vocab's nodes alone.
    """
    folder.mkdir(parents=True)
    _write_texts(folder, shape)
    stored = dict(_write_data(folder / DATA_NAME, shape))
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"]))
    past = ir.Value(
        name="past_key_values.0.key",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(["b", shape.num_key_value_heads, "p", shape.head_dim]),
    )
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        node = ir.Node("", op_type, inputs, name=f"{op_type}_{len(nodes)}")
        nodes.append(node)
        node.outputs[0].name = f"{node.name}_output"
        return node.outputs[0]

    table = stored["model.embed_tokens.weight"]
    hidden = op("Gather", table, ids)
    for layer in range(shape.num_hidden_layers):
        q, k, v, o, gate, up, down = (
            stored[name] for name in stored if name.startswith(f"model.layers.{layer}.")
        )
        attended = op("MatMul", op("MatMul", hidden, q), o)
        cached = op("Add", op("ReduceSum", op("MatMul", hidden, k)), op("ReduceSum", op("MatMul", hidden, v)))
        hidden = op("Add", op("Add", hidden, attended), cached)
        hidden = op(
            "Add", hidden, op("MatMul", op("Mul", op("MatMul", hidden, gate), op("MatMul", hidden, up)), down)
        )
    logits = op("MatMul", hidden, op("Transpose", table))
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["b", "s", shape.vocab_size])
    present = op("Identity", past)
    present.name, present.type, present.shape = "present.0.key", past.type, past.shape
    graph = ir.Graph(
        [ids, past],
        [logits, present],
        nodes=nodes,
        initializers=list(stored.values()),
        opset_imports={"": 20},
        name="decoder",
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")


def _write_data(path: Path, shape: Shape) -> Iterator[tuple[str, ir.Value]]:
    """Write the weights, matrices of the body as (inputs, outputs); yield them as constants."""
    block, offset = random_block(), 0
    with path.open("wb", buffering=0) as file:
        for name, (rows, columns) in shape.tensors():
            sizes = (rows, columns) if "embed" in name else (columns, rows)
            nbytes = exhaust(RandomTensor(sizes, block).write_to(file))
            tensor = ir.ExternalTensor(
                path.name,
                offset,
                nbytes,
                ir.DataType.FLOAT,
                shape=ir.Shape(sizes),
                name=name,
                base_dir=path.parent,
            )
            offset += nbytes
            yield (
                name,
                ir.Value(
                    name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(sizes), const_value=tensor
                ),
            )
