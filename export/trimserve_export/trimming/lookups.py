"""Follow token ids from the graph's input: to the tables they are looked up in, and to what compares them."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.values import describe
from trimserve_export.graphs.vocab_flow import uses_of_ids
from trimserve_export.trimming.plan import Lookup, VocabPlan, constant, optional_input, replace_constant
from trimserve_export.trimming.weights import follow_weight, int_attribute

_MIRRORED = {
    "Less": "Greater",
    "Greater": "Less",
    "LessOrEqual": "GreaterOrEqual",
    "GreaterOrEqual": "LessOrEqual",
}
# Where the word table of each is; the first input is the ids.
_WORD_TABLES = {"EmbedLayerNormalization": 2, "QEmbedLayerNormalization": 2}


def follow_ids(plan: VocabPlan, ids: ir.Value) -> None:
    """Cut every table that token ids are looked up in, and move the ids that they are compared with.

    Args:
        plan: collects the cuts.
        ids: the graph's input.

    Raises:
        UnsupportedModelError: a node computes with ids in a way that is not understood.
    """
    for use in uses_of_ids(ids):
        if use.is_choice:
            _chosen(plan, use.node, use.index)
        elif use.is_comparison:
            _compared(plan, use.node, use.index)
        else:
            # Where the graph has replaced some of the ids, a table may have no rows for the last ones.
            _looked_up(plan, use.node, use.index, guarded=use.choice is not None)


def _looked_up(plan: VocabPlan, node: ir.Node, index: int, *, guarded: bool) -> None:
    if node.op_type == "Gather" and index == 1:
        axis, table = int_attribute(node, "axis", 0), constant(node.inputs[0])
        if guarded and table is not None and node.inputs[0] is not None:
            plan.shorten(node.inputs[0], int(table.shape.numpy()[axis]))
        follow_weight(plan, node, 0, axis)
    elif node.op_type == "GatherBlockQuantized" and index == 1:
        _quantized_rows(plan, node)
    elif node.op_type in _WORD_TABLES and index == 0:
        follow_weight(plan, node, _WORD_TABLES[node.op_type], 0)
    else:
        raise UnsupportedModelError(
            f"{describe(node)} computes with token ids: expected a lookup, or a comparison with an id."
        )
    plan.lookups.append(Lookup(node, index))


def _quantized_rows(plan: VocabPlan, node: ir.Node) -> None:
    if int_attribute(node, "gather_axis", 0) != 0 or int_attribute(node, "quantize_axis", 1) == 0:
        raise UnsupportedModelError(
            f"{describe(node)} looks ids up along an axis that is quantised in blocks, or not the first: "
            "they cannot be parted."
        )
    for index in (0, 2, 3):
        if optional_input(node, index) is not None:
            follow_weight(plan, node, index, 0)


def _compared(plan: VocabPlan, node: ir.Node, index: int) -> None:
    """Move the ids that a comparison has as a constant.

    Kept ids stay in order, so an inequality holds for compact ids if its constant is moved to the first
    compact id that it does not hold for.
    """
    array = _id_constant(node, 1 - index)
    operator = node.op_type if index == 0 else _MIRRORED.get(node.op_type, node.op_type)

    def change(vocab: VocabMap) -> None:
        moved = _MOVED[operator](vocab, array, node)
        replace_constant(node, 1 - index, moved.astype(array.dtype))

    plan.edit(change)


def _chosen(plan: VocabPlan, node: ir.Node, index: int) -> None:
    """Where(condition, ids, id): the other side is ids as well."""
    other = 3 - index
    array = _filled_with(node, other)
    plan.edit(
        lambda vocab: _fill_with(node, other, _compact(vocab, array, node, fed=True).astype(array.dtype))
    )


def _filled_with(node: ir.Node, index: int) -> np.ndarray:
    """The ids at an input of a node: a constant, or a shape filled with one."""
    value = optional_input(node, index)
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "ConstantOfShape":
        filling = maker.attributes.get("value")
        return np.zeros(1, np.float32) if filling is None else filling.as_tensor().numpy()
    if maker is not None and maker.op_type == "Expand":
        return _id_constant(maker, 0)
    return _id_constant(node, index)


def _fill_with(node: ir.Node, index: int, array: np.ndarray) -> None:
    value = optional_input(node, index)
    maker = None if value is None else value.producer()
    if maker is None:
        replace_constant(node, index, array)
        return
    copy = ir.Node(
        maker.domain,
        maker.op_type,
        maker.inputs,
        list(maker.attributes.values()),
        outputs=[ir.Value(name=f"trimserve/{maker.outputs[0].name}", type=maker.outputs[0].type)],
        name=f"trimserve/{maker.name}",
    )
    if not isinstance(node.graph, ir.Graph):
        raise UnsupportedModelError(f"{describe(node)} has no graph.")
    node.graph.insert_before(node, copy)
    if copy.op_type == "Expand":
        replace_constant(copy, 0, array)
    else:
        copy.attributes.add(ir.AttrTensor("value", ir.tensor(array)))
    node.replace_input_with(index, copy.outputs[0])


def _id_constant(node: ir.Node, index: int) -> np.ndarray:
    tensor = constant(optional_input(node, index))
    if tensor is None:
        raise UnsupportedModelError(f"{describe(node)} sets token ids beside a value that is no constant.")
    return tensor.numpy()


def _compact(vocab: VocabMap, ids: np.ndarray, node: ir.Node, *, fed: bool = False) -> np.ndarray:
    """Compact ids of the constants of a node; what is no token id stays, for it equals none."""
    inside = (ids >= 0) & (ids < vocab.vocab_size)
    if fed and not inside.all():
        raise UnsupportedModelError(f"{describe(node)} feeds ids outside the vocab: {ids[~inside].tolist()}.")
    cold = ids[inside][~vocab.is_kept(ids[inside])]
    if cold.size:
        raise UnsupportedModelError(
            f"{describe(node)} compares token ids with {int(cold[0])}, which this vocab does not keep: "
            f"select with --keep-ids {int(cold[0])}."
        )
    moved = ids.astype(np.int64)
    moved[inside] = vocab.to_compact(ids[inside])
    return moved


def _first_not_below(vocab: VocabMap, bounds: np.ndarray, _node: ir.Node) -> np.ndarray:
    return np.searchsorted(vocab.kept_ids, bounds, "left")


def _last_not_above(vocab: VocabMap, bounds: np.ndarray, _node: ir.Node) -> np.ndarray:
    return np.searchsorted(vocab.kept_ids, bounds, "right") - 1


_MOVED: dict[str, Callable[[VocabMap, np.ndarray, ir.Node], np.ndarray]] = {
    "Equal": _compact,
    "Less": _first_not_below,
    "GreaterOrEqual": _first_not_below,
    "LessOrEqual": _last_not_above,
    "Greater": _last_not_above,
}
