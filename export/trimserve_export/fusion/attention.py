"""Find the attention of a layer by the data that flows from its past to its output."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trimserve_export.fusion.chains import MOVES, Region, number_of, regions_behind
from trimserve_export.fusion.heads import Heads, heads_behind
from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused

_PASSING = MOVES | {"Cast", "Where", "Dropout"}


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made of queries and keys: ``softmax(cap(scale * q.k) + mask)``.

    Attributes:
        product: q.k.
        scale: what it is multiplied with.
        softcap: c of ``c * tanh(x / c)``, or 0.
        masks: what is added, or chooses what counts (bool): (B or 1, heads or 1, T, L) each.
    """

    product: ir.Node
    scale: float
    softcap: float
    masks: tuple[ir.Value, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one layer.

    Attributes:
        past: keys and values before this call, (B, kv_heads, P, size) each.
        present: the same with this call's behind them; outputs of the graph.
        queries: where they come from, and what is done to them.
        keys: likewise, of this call's.
        values: likewise.
        scores: see `Scores`.
        output: what the heads give, side by side: (B, T, heads * size).
        heads: of the queries.
        kv_heads: of keys and values.
        size: of one head.
    """

    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    queries: Heads
    keys: Heads
    values: Heads
    scores: Scores
    output: ir.Value
    heads: int
    kv_heads: int
    size: int

    @property
    def scale(self) -> float:
        """What q.k is multiplied with in all."""
        return self.scores.scale * self.queries.factor * self.keys.factor


def find_attention(past: tuple[ir.Value, ir.Value], probe: Probe, places: Mapping[ir.Node, int]) -> Attention:
    """Find the attention that reads a past.

    Args:
        past: keys and values of one layer, inputs of the graph.
        probe: of the graph.
        places: of its nodes.

    Raises:
        Unfused: an operator is there that is not understood.
    """
    joins = tuple(_join(value) for value in past)
    present = tuple(_present(join) for join in joins)
    shape = probe.sizes(past[0]) or ()
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise Unfused(f"{past[0].name} has no number of heads and their size in its shape")
    kv_heads, size = shape[1], shape[3]
    summed = _product(joins[1].outputs[0], 1)
    scores = _scores(summed, joins[0].outputs[0], probe, places)
    keys = _fed_back(scores.product.inputs[1], joins[0].outputs[0], probe, places)
    queries = heads_behind(_input(scores.product, 0), size, probe, places)
    new_keys = heads_behind(_input(joins[0], 1), size, probe, places)
    values = heads_behind(_input(joins[1], 1), size, probe, places)
    if values.rope is not None or values.norm is not None or values.factor != 1:
        raise Unfused("its values are changed by position, norm or scale")
    heads = len(queries.columns) // size
    output = _output(summed.outputs[0], heads * size, probe)
    scaled = Scores(scores.product, scores.scale * keys, scores.softcap, scores.masks)
    return Attention(
        past, (present[0], present[1]), queries, new_keys, values, scaled, output, heads, kv_heads, size
    )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise Unfused(f"{node.op_type} {node.name!r} lacks an input")
    return value


def _join(past: ir.Value) -> ir.Node:
    """The Concat of a past and this call's."""
    found = [use.node for use in past.uses() if use.node.op_type == "Concat" and use.idx == 0]
    if len(found) != 1 or len(found[0].inputs) != 2:
        raise Unfused(f"{past.name} is not put before this call's keys or values by one Concat")
    return found[0]


def _present(join: ir.Node) -> ir.Value:
    """The graph's output that a Concat gives, or a copy of it."""
    pending = [join.outputs[0]]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return value
        pending += [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Identity"]
    raise Unfused(f"no output gives what {join.op_type} {join.name!r} makes")


def _product(value: ir.Value, index: int) -> ir.Node:
    """The product that keys or values go into, behind what repeats and turns them."""
    pending, seen = [value], set[ir.Node]()
    found: list[ir.Node] = []
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type == "MatMul" and use.idx == index:
                found.append(use.node)
            elif use.node.op_type in MOVES and use.node not in seen:
                seen.add(use.node)
                pending += use.node.outputs
    if len(found) != 1:
        raise Unfused(f"{value.name} goes into {len(found)} products, where one is attention's")
    return found[0]


def _fed_back(value: ir.Value | None, source: ir.Value, probe: Probe, places: Mapping[ir.Node, int]) -> float:
    """What keys are multiplied with between the past and q.k."""
    factor = 1.0
    if value is source:
        return factor
    for region in () if value is None else regions_behind(value, probe, places):
        if region.factor is not None:
            factor *= region.factor
        elif not region.moves and not region.is_cast:
            break
        if region.entry is source:
            return factor
    raise Unfused(f"{source.name} is changed before the product with the queries")


class _Steps:
    """What is done to scores, read backwards from their Softmax.

    Attributes:
        softmax: it was met.
        factors: what scores are multiplied with behind a Tanh, or if there is none; and before it.
        capped: a Tanh was met.
        masks: see `Scores`.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.softmax = self.capped = False
        self.factors = [1.0, 1.0]
        self.masks: list[ir.Value] = []

    def take(self, region: Region) -> None:
        """Take note of a step.

        Raises:
            Unfused: it is not understood.
        """
        node = region.node
        if node.op_type == "Softmax":
            self.softmax = True
        elif node.op_type == "Tanh":
            self.capped = True
        elif region.factor is not None:
            self.factors[self.capped] *= region.factor
        elif (mask := _mask(region, self._probe)) is not None:
            self.masks.append(mask)
        elif not (region.moves or region.is_cast or _clears_rows(region)):
            raise Unfused(f"{node.op_type} {node.name!r} stands between q.k and the values")


def _clears_rows(region: Region) -> bool:
    """Whether NaN becomes 0, in rows of scores that nothing is allowed in: it reads no mask."""
    return {node.op_type for node in region.nodes} == {"Where", "IsNaN"}


def _scores(summed: ir.Node, keys: ir.Value, probe: Probe, places: Mapping[ir.Node, int]) -> Scores:
    steps, value = _Steps(probe), _input(summed, 0)
    for region in regions_behind(value, probe, places):
        if region.node.op_type == "MatMul":
            break
        value = region.entry
        steps.take(region)
    product = value.producer()
    if not steps.softmax or product is None or product.op_type != "MatMul" or not _reads(product, keys):
        raise Unfused("its scores are no Softmax of a product of queries and keys")
    after, before = steps.factors
    scale, cap = (before * after, after) if steps.capped else (after, 0.0)
    return Scores(product, scale, cap, tuple(steps.masks))


def _reads(product: ir.Node, keys: ir.Value) -> bool:
    """Whether a product's second factor is made of the keys."""
    pending, seen = [product.inputs[1]], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value is keys:
            return True
        if value is not None and value not in seen and (node := value.producer()) is not None:
            seen.add(value)
            pending += node.inputs[:2]
    return False


def _mask(region: Region, probe: Probe) -> ir.Value | None:
    """What is added to scores, or chooses among them."""
    node = region.node
    if len(region.nodes) != 1 or node.op_type not in ("Add", "Where"):
        return None
    others = [value for value in node.inputs if value is not None and value is not region.entry]
    if node.op_type == "Where":
        return others[0] if number_of(others[1]) is not None else None
    return others[0] if len(others) == 1 and not probe.is_data(others[0]) else None


def _output(value: ir.Value, width: int, probe: Probe) -> ir.Value:
    """The heads' outputs side by side, behind what turns them."""
    for made in _onward(value):
        sizes = probe.sizes(made)
        if sizes is not None and len(sizes) == 3 and sizes[-1] == width:
            return made
    raise Unfused(f"what its heads give is not put side by side, {width} numbers a token")


def _onward(value: ir.Value) -> Iterator[ir.Value]:
    while True:
        users = {use.node for use in value.uses()}
        if len(users) != 1 or (node := users.pop()).op_type not in _PASSING:
            return
        value = node.outputs[0]
        yield value
