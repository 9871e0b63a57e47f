"""The graph of a sketch: digits -> the largest product with each group's rows, run by run of the rows.

The integers of 8 bits are the right operand of MatMulInteger, which is several times as fast on a packed
matrix as on one that lies row by row (docs/certificate.md has both), so they are stored transposed, (H, n).
Those of 4 bits lie as MatMulNBits takes them, (n, blocks, 16), with their scales (n, blocks) behind them.
"""

from collections.abc import Sequence

import onnx

from trimserve.exact.sketch import row_bytes
from trimserve.exact.sketch_rows import BLOCKS, GROUP_ROWS, ZERO
from trimserve.folder.names import SKETCH_DATA_NAME

_OPSET = 20
# No product, and no difference of two, overflows 32 bits up to this width.
_MAX_WIDTH = 1 << 16
_CONTRIB = "com.microsoft"
_TYPES = onnx.TensorProto


def sketch_graph(
    runs: Sequence[int],
    width: int,
    bits: int,
    chosen: Sequence[int] | None = None,
    *,
    masses: bool = False,
) -> onnx.ModelProto:
    """Digits (M, H) -> the largest product with the rows of each group, (M, groups).

    Args:
        runs: rows of each run.
        width: H.
        bits: 8, for uint8 digits and int32 products, or 4, for float32 and H padded to whole blocks.
        chosen: the runs whose groups it is about, all by default.
        masses: add the output `mass`, float32 (M, groups): the sum of exp(steepness * (p - largest p)) over
            the products p of a group, with the input `steepness`, float32 (M, groups).
    """
    if width > _MAX_WIDTH:
        raise ValueError(f"rows of {width} integers overflow a sum of 32 bits")
    helper = onnx.helper
    chosen = range(len(runs)) if chosen is None else chosen
    initializers = [
        helper.make_tensor("last_axis", _TYPES.INT64, [1], [2]),
        helper.make_tensor("groups", _TYPES.INT64, [3], [0, -1, GROUP_ROWS]),
    ]
    if bits == 8:
        initializers.append(helper.make_tensor("zero", _TYPES.UINT8, [], [ZERO]))
    nodes: list[onnx.NodeProto] = []
    for number in chosen:
        offset = sum(runs[:number]) * row_bytes(width, bits)
        make = _integer_product if bits == 8 else _block_product
        product, matrices = make(number, runs[number], width, offset)
        initializers += matrices
        nodes += [
            product,
            helper.make_node("Reshape", [product.output[0], "groups"], [f"grouped_{number}"]),
            helper.make_node(
                "ReduceMax", [f"grouped_{number}", "last_axis"], [f"largest_{number}"], keepdims=0
            ),
        ]
    largest = [f"largest_{number}" for number in chosen]
    nodes.append(helper.make_node("Concat", largest, ["maximum"], axis=1))
    groups = sum(runs[number] for number in chosen) // GROUP_ROWS
    digits, found = (_TYPES.UINT8, _TYPES.INT32) if bits == 8 else (_TYPES.FLOAT, _TYPES.FLOAT)
    info = helper.make_tensor_value_info
    inputs = [info("digits", digits, ["digits", _columns(width, bits)])]
    outputs = [info("maximum", found, ["digits", groups])]
    if masses:
        sizes = [runs[number] // GROUP_ROWS for number in chosen]
        initializers.append(helper.make_tensor("sizes", _TYPES.INT64, [len(sizes)], sizes))
        nodes += _mass_nodes(list(chosen))
        inputs.append(info("steepness", _TYPES.FLOAT, ["digits", groups]))
        outputs.append(info("mass", _TYPES.FLOAT, ["digits", groups]))
    graph = helper.make_graph(nodes, "cold_sketch", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="trimserve")


def _mass_nodes(chosen: Sequence[int]) -> list[onnx.NodeProto]:
    make = onnx.helper.make_node
    nodes = [
        make("Split", ["steepness", "sizes"], [f"steepness_{number}" for number in chosen], axis=1),
    ]
    for number in chosen:
        nodes += [
            make("Unsqueeze", [f"largest_{number}", "last_axis"], [f"top_{number}"]),
            make("Sub", [f"grouped_{number}", f"top_{number}"], [f"below_{number}"]),
            make("Cast", [f"below_{number}"], [f"float_{number}"], to=_TYPES.FLOAT),
            make("Unsqueeze", [f"steepness_{number}", "last_axis"], [f"slope_{number}"]),
            make("Mul", [f"float_{number}", f"slope_{number}"], [f"exponents_{number}"]),
            make("Exp", [f"exponents_{number}"], [f"weights_{number}"]),
            make("ReduceSum", [f"weights_{number}", "last_axis"], [f"mass_{number}"], keepdims=0),
        ]
    nodes.append(make("Concat", [f"mass_{number}" for number in chosen], ["mass"], axis=1))
    return nodes


def _columns(width: int, bits: int) -> int:
    return width if bits == 8 else BLOCKS.blocks(width) * BLOCKS.block_size


def _integer_product(
    number: int, rows: int, width: int, offset: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    integers = _stored(f"integers_{number}", _TYPES.UINT8, offset, (width, rows))
    inputs = ["digits", integers.name, "zero", "zero"]
    return onnx.helper.make_node("MatMulInteger", inputs, [f"products_{number}"]), [integers]


def _block_product(
    number: int, rows: int, width: int, offset: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    blocks = BLOCKS.blocks(width)
    shape = (rows, blocks, BLOCKS.block_bytes)
    integers = _stored(f"integers_{number}", _TYPES.UINT8, offset, shape)
    offset += rows * blocks * BLOCKS.block_bytes
    scales = _stored(f"scales_{number}", _TYPES.FLOAT, offset, shape[:2])
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["digits", integers.name, scales.name],
        [f"products_{number}"],
        domain=_CONTRIB,
        K=_columns(width, 4),
        N=rows,
        bits=BLOCKS.bits,
        block_size=BLOCKS.block_size,
        accuracy_level=BLOCKS.accuracy_level,
    )
    return node, [integers, scales]


def _stored(name: str, data_type: int, offset: int, shape: Sequence[int]) -> onnx.TensorProto:
    length = 4 if data_type == _TYPES.FLOAT else 1
    for size in shape:
        length *= size
    tensor = onnx.TensorProto(
        name=name, data_type=data_type, dims=shape, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in {"location": SKETCH_DATA_NAME, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
