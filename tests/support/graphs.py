"""Tiny graphs with every layout of embedding and head that exporters and quantisers make.

All numbers are small integers, and scales powers of two, so that sums are exact in whatever order a kernel
adds: logits of a trimmed graph must equal those of the full one bit for bit. `GraphText.real` draws real
numbers instead, for what must be equal even then.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

CONTRIB = "com.microsoft"


@dataclass
class GraphText:
    """A graph in the making: lines of ONNX text, and the constants they name."""

    V: int = 37
    H: int = 16
    block: int = 16
    seed: int = 0
    real: bool = False
    lines: list[str] = field(default_factory=list)
    tensors: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def floats(self, *shape: int, dtype=np.float32) -> np.ndarray:
        numbers = self.random.uniform(-4, 4, shape) if self.real else self.random.integers(-4, 5, shape)
        return np.asarray(numbers, dtype)

    def scales(self, *shape: int) -> np.ndarray:
        powers = self.random.uniform(-2, 2, shape) if self.real else self.random.integers(-2, 2, shape)
        return np.exp2(powers).astype(np.float32)

    def bytes(self, *shape: int) -> np.ndarray:
        return self.random.integers(0, 256, shape).astype(np.uint8)

    def add(self, line: str, **tensors: np.ndarray) -> None:
        self.lines.append(line)
        for name, array in tensors.items():
            self.tensors[name] = ir.tensor(array, name=name)

    @property
    def blocks(self) -> int:
        return -(-self.H // self.block)

    def model(self, outputs: str | None = None, inputs: str = "int64[batch, seq] input_ids") -> ir.Model:
        outputs = outputs or f"float[batch, seq, {self.V}] logits"
        body = "\n".join(self.lines)
        text = f"""<ir_version: 10, opset_import: ["" : 21, "{CONTRIB}" : 1]>
        model ({inputs}) => ({outputs}) {{ {body} }}"""
        words = set(re.findall(r"\w+", body))
        named = [tensor for name, tensor in self.tensors.items() if name in words]
        parsed = ir.from_onnx_text(text, initializers=named)
        return ir.from_proto(ir.to_proto(parsed))  # as a file is read: values know their constants' shapes


def plain(s: GraphText) -> None:
    s.add("rows = Gather(table, input_ids)", table=s.floats(s.V, s.H))


def transposed(s: GraphText) -> None:
    s.add("turned = Transpose<perm = [1, 0]>(table)", table=s.floats(s.H, s.V))
    s.add("rows = Gather(turned, input_ids)")


def second_axis(s: GraphText) -> None:
    s.add("columns = Gather<axis = 1>(table, input_ids)", table=s.floats(s.H, s.V))
    s.add("rows = Transpose<perm = [1, 2, 0]>(columns)")


def half(s: GraphText) -> None:
    s.add("small = Gather(table, input_ids)", table=s.floats(s.V, s.H, dtype=np.float16))
    s.add("rows = Cast<to = 1>(small)")


def dequantized_after(s: GraphText) -> None:
    s.add("integers = Gather(table, input_ids)", table=s.bytes(s.V, s.H))
    s.add("rows = DequantizeLinear(integers, scale, zero)", scale=np.float32(0.25), zero=np.uint8(120))


def dequantized_before(s: GraphText) -> None:
    s.add(
        "floats = DequantizeLinear<axis = 0>(table, scales, zeros)",
        table=s.bytes(s.V, s.H),
        scales=s.scales(s.V),
        zeros=s.bytes(s.V),
    )
    s.add("rows = Gather(floats, input_ids)")


def scaled_rows(s: GraphText) -> None:
    """Integers and their scales are looked up each by itself."""
    s.add("integers = Gather(table, input_ids)", table=s.bytes(s.V, s.H).view(np.int8))
    s.add("scale = Gather(scales, input_ids)", scales=s.scales(s.V, 1))
    s.add("floats = Cast<to = 1>(integers)\nrows = Mul(floats, scale)")


def _gather_blocks(s: GraphText, data: str, bits: int, zeros: np.ndarray | None) -> None:
    s.add("", gather_scales=s.scales(s.V, s.blocks), **({} if zeros is None else {"gather_zeros": zeros}))
    operands = ", ".join(
        [data, "input_ids", "gather_scales", *(["gather_zeros"] if zeros is not None else [])]
    )
    attributes = f"gather_axis = 0, quantize_axis = 1, bits = {bits}, block_size = {s.block}"
    s.add(f"rows = {CONTRIB}.GatherBlockQuantized<{attributes}>({operands})")


def blocks_int4(s: GraphText) -> None:
    s.add("", table=s.random.integers(-8, 8, (s.V, s.H)).astype(ml_dtypes.int4))
    _gather_blocks(s, "table", 4, None)


def blocks_uint4(s: GraphText) -> None:
    s.add("", table=s.random.integers(0, 16, (s.V, s.H)).astype(ml_dtypes.uint4))
    _gather_blocks(s, "table", 4, s.random.integers(0, 16, (s.V, s.blocks)).astype(ml_dtypes.uint4))


def blocks_uint8(s: GraphText) -> None:
    _gather_blocks(s, "table", 8, s.bytes(s.V, s.blocks))
    s.add("", table=s.bytes(s.V, s.H))


def blocks_reshaped(s: GraphText) -> None:
    """onnxruntime-genai: the head's blocks seen as rows."""
    width = s.blocks * s.block // 2
    s.add("seen = Reshape(table, shape)", table=s.bytes(s.V, s.blocks, s.block // 2))
    s.add("", shape=np.array([s.V, width], np.int64))
    _gather_blocks(s, "seen", 4, s.bytes(s.V, -(-s.blocks // 2)))


def layer_norm(s: GraphText) -> None:
    s.add(
        f"rows, mask_index, total = {CONTRIB}.EmbedLayerNormalization<epsilon = 0.5>"
        "(small_ids, , table, positions, , gamma, beta)",
        table=s.floats(s.V, s.H),
        positions=s.floats(s.V, s.H),  # as many as tokens: not to be taken for the table
        gamma=s.floats(s.H),
        beta=s.floats(s.H),
    )
    s.lines.insert(0, "small_ids = Cast<to = 6>(input_ids)")


EMBEDDINGS: dict[str, Callable[[GraphText], None]] = {
    made.__name__: made
    for made in (
        plain,
        transposed,
        second_axis,
        half,
        dequantized_after,
        dequantized_before,
        scaled_rows,
        blocks_int4,
        blocks_uint4,
        blocks_uint8,
        blocks_reshaped,
        layer_norm,
    )
}


def matmul(s: GraphText) -> None:
    s.add("product = MatMul(hidden, head)", head=s.floats(s.H, s.V))


def fused(s: GraphText) -> None:
    s.add(f"product = {CONTRIB}.FusedMatMul<transB = 1>(hidden, head)", head=s.floats(s.V, s.H))


def turned(s: GraphText) -> None:
    s.add("across = Transpose(head)\nproduct = MatMul(hidden, across)", head=s.floats(s.V, s.H))


def _flattened(s: GraphText, product: str) -> None:
    s.add("lines = Reshape(hidden, flat)", flat=np.array([-1, s.H], np.int64))
    s.add(product)


def gemm(s: GraphText) -> None:
    _flattened(s, "scored = Gemm<transB = 1, alpha = 2.0>(lines, head, gemm_bias)")
    s.add("product = Reshape(scored, unflat)", unflat=np.array([1, -1, s.V], np.int64))
    s.add("", head=s.floats(s.V, s.H), gemm_bias=s.floats(s.V))


def gemm_by_column(s: GraphText) -> None:
    """The shape is put together when the graph runs."""
    _flattened(s, "scored = Gemm(lines, head)")
    s.add("rows_shape = Shape<start = 0, end = 2>(input_ids)\nwhole = Concat<axis = 0>(rows_shape, last)")
    s.add("product = Reshape(scored, whole)", head=s.floats(s.H, s.V), last=np.array([s.V], np.int64))


def nbits(
    s: GraphText, bits: int, *, flat: bool = False, zeros: str = "", bias: bool = False, order: bool = False
) -> None:
    n = s.blocks
    data, scales = s.bytes(s.V, n, s.block * bits // 8), s.scales(s.V, n)
    tensors = {"data": data, "head_scales": scales.reshape(-1) if flat else scales}
    if zeros == "packed":
        packed = s.bytes(s.V, -(-n * bits // 8))
        tensors["head_zeros"] = packed.reshape(-1) if flat else packed
    elif zeros == "float":
        tensors["head_zeros"] = s.floats(s.V, n)
    if bias:
        tensors["head_bias"] = s.floats(s.V)
    if order:
        tensors["order"] = (np.arange(s.H) // s.block).astype(np.int32)
    optional = {"head_zeros": zeros, "order": order, "head_bias": bias}
    names = ["hidden", "data", "head_scales", *(name if there else "" for name, there in optional.items())]
    attributes = f"K = {s.H}, N = {s.V}, bits = {bits}, block_size = {s.block}"
    operands = ", ".join(names).rstrip(", ")
    s.add(f"product = {CONTRIB}.MatMulNBits<{attributes}>({operands})", **tensors)


def nbits_2(s: GraphText) -> None:
    nbits(s, 2, zeros="packed")


def nbits_4(s: GraphText) -> None:
    nbits(s, 4)


def nbits_4_flat(s: GraphText) -> None:
    nbits(s, 4, flat=True, zeros="packed")


def nbits_4_bias(s: GraphText) -> None:
    nbits(s, 4, zeros="packed", bias=True)


def nbits_4_float_zeros(s: GraphText) -> None:
    nbits(s, 4, zeros="float")


def nbits_8(s: GraphText) -> None:
    nbits(s, 8, zeros="packed")


def _qdq(s: GraphText, dtype) -> None:
    info = ml_dtypes.iinfo(dtype)
    integers = s.random.integers(info.min, info.max + 1, (s.H, s.V)).astype(dtype)
    zeros = s.random.integers(info.min, info.max + 1, (s.blocks, s.V)).astype(dtype)
    s.add(
        f"head = DequantizeLinear<axis = 0, block_size = {s.block}>(head_q, head_scales, head_zeros)",
        head_q=integers,
        head_scales=s.scales(s.blocks, s.V),
        head_zeros=zeros,
    )
    s.add("product = MatMul(hidden, head)")


def qdq_int4(s: GraphText) -> None:
    _qdq(s, ml_dtypes.int4)


def qdq_uint4(s: GraphText) -> None:
    _qdq(s, ml_dtypes.uint4)


def qdq_by_token(s: GraphText) -> None:
    """A scale a token."""
    s.add(
        "head = DequantizeLinear<axis = 1>(head_q, head_scales)",
        head_q=s.bytes(s.H, s.V).view(np.int8),
        head_scales=s.scales(s.V),
    )
    s.add("product = MatMul(hidden, head)")


def qdq_one_scale(s: GraphText) -> None:
    s.add(
        "head = DequantizeLinear(head_q, head_scale, head_zero)",
        head_q=s.bytes(s.H, s.V),
        head_scale=np.float32(0.125),
        head_zero=np.uint8(120),
    )
    s.add("product = MatMul(hidden, head)")


def _integer(s: GraphText, weight: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> None:
    s.add("q, q_scale, q_zero = DynamicQuantizeLinear(hidden)")
    s.add("whole = MatMulInteger(q, head, q_zero, head_zero)", head=weight, head_zero=zero)
    s.add("both = Mul(q_scale, head_scale)\nwide = Cast<to = 1>(whole)", head_scale=scale)
    s.add("product = Mul(wide, both)")


def integer(s: GraphText) -> None:
    _integer(s, s.bytes(s.H, s.V), np.uint8(7), np.float32(0.5))


def integer_by_token(s: GraphText) -> None:
    _integer(s, s.bytes(s.H, s.V).view(np.int8), np.zeros(s.V, np.int8), s.scales(s.V))


def integer_fused(s: GraphText) -> None:
    s.add(
        f"product = {CONTRIB}.DynamicQuantizeMatMul(hidden, head, head_scale, head_zero, head_bias)",
        head=s.bytes(s.H, s.V),
        head_scale=s.scales(s.V),
        head_zero=s.bytes(s.V),
        head_bias=s.floats(s.V),
    )


def integer_fused_scalar(s: GraphText) -> None:
    """One scale for all tokens; zero points and bias left out."""
    s.add(
        f"product = {CONTRIB}.DynamicQuantizeMatMul(hidden, head, head_scale)",
        head=s.bytes(s.H, s.V).view(np.int8),
        head_scale=np.float32(0.5),
    )


def integer_to_float(s: GraphText) -> None:
    s.add("q, q_scale, q_zero = DynamicQuantizeLinear(hidden)")
    s.add(
        f"product = {CONTRIB}.MatMulIntegerToFloat"
        "(q, head, q_scale, head_scale, q_zero, head_zero, head_bias)",
        head=s.bytes(s.H, s.V),
        head_scale=s.scales(s.V),
        head_zero=s.bytes(s.V),
        head_bias=s.floats(s.V),
    )


def static_integer(s: GraphText) -> None:
    """Static quantisation: the logits are integers for a moment."""
    s.add("q = QuantizeLinear(hidden, q_scale, q_zero)", q_scale=np.float32(0.25), q_zero=np.uint8(128))
    s.add(
        "whole = QLinearMatMul(q, q_scale, q_zero, head, head_scale, head_zero, y_scale, y_zero)",
        head=s.bytes(s.H, s.V).view(np.int8),
        head_scale=s.scales(s.V),
        head_zero=np.zeros(s.V, np.int8),
        y_scale=np.float32(32),
        y_zero=np.uint8(128),
    )
    s.add("product = DequantizeLinear(whole, y_scale, y_zero)")


def static_to_float(s: GraphText) -> None:
    """Activations by one constant scale, logits in floats."""
    s.add("q = QuantizeLinear(hidden, q_scale, q_zero)", q_scale=np.float32(0.25), q_zero=np.uint8(128))
    s.add(
        f"product = {CONTRIB}.MatMulIntegerToFloat"
        "(q, head, q_scale, head_scale, q_zero, head_zero, head_bias)",
        head=s.bytes(s.H, s.V),
        head_scale=s.scales(s.V),
        head_zero=s.bytes(s.V),
        head_bias=s.floats(s.V),
    )


def nbits_4_g_idx(s: GraphText) -> None:
    """The order of the columns, as GPTQ has it."""
    nbits(s, 4, zeros="packed", order=True)


def bnb4(s: GraphText) -> None:
    attributes = f"K = {s.H}, N = {s.V}, block_size = {s.block}, quant_type = 1"
    s.add(
        f"product = {CONTRIB}.MatMulBnb4<{attributes}>(hidden, data, absmax)",
        data=s.bytes(s.V * s.H // 2),
        absmax=s.scales(s.V * s.H // s.block),
    )


HEADS: dict[str, Callable[[GraphText], None]] = {
    made.__name__: made
    for made in (
        matmul,
        fused,
        turned,
        gemm,
        gemm_by_column,
        nbits_2,
        nbits_4,
        nbits_4_flat,
        nbits_4_bias,
        nbits_4_float_zeros,
        nbits_8,
        qdq_int4,
        qdq_uint4,
        qdq_by_token,
        qdq_one_scale,
        integer,
        integer_by_token,
        integer_fused,
        integer_fused_scalar,
        integer_to_float,
        static_integer,
        static_to_float,
        nbits_4_g_idx,
        bnb4,
    )
}


def tied(s: GraphText) -> None:
    plain(s)
    middle(s)
    s.add("across = Transpose(table)\nproduct = MatMul(hidden, across)")


def tied_fused(s: GraphText) -> None:
    plain(s)
    middle(s)
    s.add(f"product = {CONTRIB}.FusedMatMul<transB = 1>(hidden, table)")


def tied_transposed(s: GraphText) -> None:
    """onnxruntime-genai, float: the head's matrix turned for the embedding."""
    transposed(s)
    middle(s)
    s.add("product = MatMul(hidden, table)")


def tied_blocks(s: GraphText) -> None:
    """onnxruntime-genai, int4: one matrix of blocks for both, with one set of scales and zero points."""
    blocks_reshaped(s)
    middle(s)
    attributes = f"K = {s.H}, N = {s.V}, bits = 4, block_size = {s.block}"
    s.add(
        f"product = {CONTRIB}.MatMulNBits<{attributes}>(hidden, table, gather_scales, gather_zeros)",
    )


def tied_int8(s: GraphText) -> None:
    """quantize_dynamic: the integers are looked up, and turned for the head."""
    dequantized_after(s)
    middle(s)
    s.add("across = Transpose(table)\nhead = DequantizeLinear(across, scale, zero)")
    s.add("product = MatMul(hidden, head)")


TIED = {made.__name__: made for made in (tied, tied_fused, tied_transposed, tied_blocks, tied_int8)}


def middle(s: GraphText) -> None:
    """A body: a square matrix, to be left alone even where H equals V."""
    s.add("hidden = MatMul(rows, square)", square=np.eye(s.H, dtype=np.float32)[::-1].copy())


def _bare(s: GraphText) -> None:
    s.add("logits = Identity(product)")


def _biased(s: GraphText) -> None:
    s.add("logits = Add(bias, product)", bias=s.floats(1, s.V))


def _capped(s: GraphText) -> None:
    s.add("small = Div(product, thirty)\nbent = Tanh(small)", thirty=np.float32(32))
    s.add("logits = Mul(bent, thirty)")


def _masked(s: GraphText) -> None:
    s.add("logits = Where(allowed, product, low)", allowed=s.floats(s.V) > 0, low=np.float32(-1e9))


def _cast(s: GraphText) -> None:
    s.add("half = Cast<to = 10>(product)\nlogits = Cast<to = 1>(half)")


AFTER = {"bare": _bare, "biased": _biased, "capped": _capped, "masked": _masked, "cast": _cast}


def sketch(embedding: str, head: str, after: str = "bare", **sizes: int) -> GraphText:
    """A graph of an embedding, a body and a head."""
    made = GraphText(**sizes)
    EMBEDDINGS[embedding](made)
    middle(made)
    HEADS[head](made)
    AFTER[after](made)
    return made


def sketch_tied(kind: str, after: str = "bare", **sizes: int) -> GraphText:
    """A graph whose head shares the embedding's constants."""
    made = GraphText(**sizes)
    TIED[kind](made)
    AFTER[after](made)
    return made


def run(model: ir.Model | Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model, or a file, in ONNX Runtime as it is: no rewriting, no layout changes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def save(made: GraphText, folder: Path, name: str = "model.onnx") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    ir.save(made.model(), folder / name, external_data="weights.data", size_threshold_bytes=64)
    (folder / "config.json").write_text(json.dumps({"vocab_size": made.V}))
    return folder
