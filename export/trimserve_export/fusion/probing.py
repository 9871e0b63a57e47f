"""Run a part of a graph on numbers: what a pattern means is found out, and proven, by what it computes.

Exporters spell rotary tables, masks and heads in ever new ways, and each way gives the same numbers.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy

from trimserve.errors import require
from trimserve.foreign import foreign
from trimserve.runtime.contract import PAST
from trimserve_export.fusion.reasons import Unfused
from trimserve_export.graphs.nodes import take_over
from trimserve_export.shapes.facts import ShapeFacts
from trimserve_export.shapes.sizes import Size, Sizes

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]
_SHAPES = frozenset({"Shape", "Size"})


class Probe:
    """One graph, as it is when it is asked: parts of it are copied out and run."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._opsets = dict(model.opset_imports)
        self._version = model.ir_version
        self._facts = ShapeFacts(model.graph)
        values = [value for node in model.graph for value in node.outputs]
        self._declared = {value: sizes for value in values if (sizes := self._facts.declared(value))}
        self._data = _data_of(model.graph)
        self._same: dict[ir.Value, ir.Value] = {}

    def is_data(self, value: ir.Value | None) -> bool:
        """Whether a value depends on what the tokens are, and not only on how many and where they are."""
        return value is not None and value in self._data

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """The shape of a value: proven, or as the exporter declared it; None where its rank is not known."""
        if value is None:
            return None
        known = self._same.get(value, value)
        proven, declared = self._facts.sizes(known), self._declared.get(known)
        if proven is None or declared is None or len(proven) != len(declared):
            return proven or declared
        return tuple(map(_known_size, proven, declared))

    def width(self, value: ir.Value) -> int | None:
        """The size of a value's last axis, where it is a number."""
        sizes = self.sizes(value)
        return sizes[-1] if sizes and isinstance(sizes[-1], int) else None

    def declare(self, value: ir.Value, sizes: Sizes, dtype: ir.DataType | None) -> None:
        """Take note of data that a pass has made."""
        self._data.add(value)
        self._declared[value] = sizes
        value.type = None if dtype is None else ir.TensorType(dtype)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Put data in the place of other data, which it has the shape of (see `nodes.take_over`)."""
        self._data.add(new)
        self._same[new] = self._same.get(old, old)
        take_over(old, new)

    def run(
        self, outputs: Sequence[ir.Value], feeds: Mapping[ir.Value, Array], *, new: int, past: int
    ) -> list[Array]:
        """Compute values once; see `part`, and `Part.run`."""
        return self.part(outputs, feeds).run(feeds, new=new, past=past)

    def part(self, outputs: Sequence[ir.Value], fed: Iterable[ir.Value]) -> "Part":
        """Copy a part of the graph out, as it is now.

        Args:
            outputs: what it computes.
            fed: values where it begins, beside the graph's inputs.
        """
        sources = self._sources(outputs, set(fed))
        wanted = list(dict.fromkeys(outputs))
        with _border("taken apart"):
            graph = ir.convenience.extract(self._graph, sources, wanted)
        for value, source in zip(graph.inputs, sources, strict=True):
            value.shape = None  # a name of the whole graph may stand for two sizes in its part
            value.type = ir.TensorType(source.dtype or ir.DataType.FLOAT)
        for value in graph.outputs:
            value.shape = None
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
        model = ir.Model(graph, ir_version=self._version)
        model.opset_imports.update(self._opsets | {"com.microsoft": 1})
        with _border("opened"):
            session = _open(model)
        places = [wanted.index(value) for value in outputs]
        return Part(self, session, {str(value.name): value for value in sources}, places)

    def _sources(self, outputs: Sequence[ir.Value], fed: Set[ir.Value]) -> list[ir.Value]:
        """Where a part begins: at the values that are fed, at inputs, and at what only a size is asked of."""
        sources: dict[ir.Value, None] = {}
        seen: set[ir.Value] = set()
        sized: dict[ir.Value, None] = {}
        pending = list(outputs)
        while pending:
            value = pending.pop()
            if value in seen or value.const_value is not None:
                continue
            seen.add(value)
            node = value.producer()
            if node is None or value in fed:
                sources[value] = None
                continue
            operands = [operand for operand in node.inputs if operand is not None]
            if node.op_type in _SHAPES and operands[0] in self._data:
                sized[operands[0]] = None
            else:
                pending += operands
        return list(sources | {value: None for value in sized if value not in seen})

    def filled(self, value: ir.Value, new: int, past: int) -> Array:
        """What an input is for one sequence of `new` tokens after `past` others; zeros where none of them."""
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        name = str(value.name)
        if name == "attention_mask":
            return np.ones((1, past + new), dtype)
        if name == "position_ids":
            return np.arange(past, past + new, dtype=dtype)[None]
        if name == "input_ids":
            return np.zeros((1, new), dtype)
        sizes = self.sizes(value) or ()
        if name.startswith(PAST):
            return np.zeros((1, int(sizes[1]), past, int(sizes[3])), dtype)
        return np.zeros([self.size(size, new, past) for size in sizes], dtype)

    def size(self, size: Size, new: int, past: int) -> int:
        """What a size is for one sequence of `new` tokens after `past` others."""
        known: dict[sympy.Basic, int] = {}
        for value in self._graph.inputs:
            name, sizes = str(value.name), self.sizes(value) or ()
            lengths = {2: past} if name.startswith(PAST) else {1: past + new if "mask" in name else new}
            for axis, declared in enumerate(sizes):
                if isinstance(declared, sympy.Symbol):
                    known.setdefault(declared, lengths.get(axis, 1))
        found = sympy.sympify(size).subs(known)
        if not found.is_Integer:
            raise Unfused(f"it has a size {size} that nothing is known of")
        return int(found)


def _known_size(proven: Size, declared: Size) -> Size:
    """A proven size; one that nothing is known of as it was declared."""
    is_known = isinstance(proven, int) or not proven.atoms(sympy.Dummy)
    return proven if is_known else declared


def _data_of(graph: ir.Graph) -> set[ir.Value]:
    """All values that are computed of token ids or of the past, other than of their number."""
    data = {value for value in graph.inputs if str(value.name).startswith((PAST, "input_ids"))}
    for node in graph:
        if node.op_type not in _SHAPES and any(value in data for value in node.inputs):
            data.update(node.outputs)
    return data


class Part:
    """A part of a graph that can be run at many lengths."""

    def __init__(
        self,
        probe: Probe,
        session: "ort.InferenceSession",
        inputs: Mapping[str, ir.Value],
        places: Sequence[int],
    ) -> None:
        self._probe = probe
        self._session = session
        self._inputs = inputs
        self._places = places

    def run(self, feeds: Mapping[ir.Value, Array], *, new: int, past: int) -> list[Array]:
        """Compute the part's values for one sequence of `new` tokens after `past` others.

        Args:
            feeds: values where the part begins; the graph's inputs are filled in, other values are zeros.
            new: T, at least 1.
            past: cached positions.

        Returns:
            The outputs' arrays, in their order.
        """
        arrays = {
            name: feeds[value] if value in feeds else self._probe.filled(value, new, past)
            for name, value in self._inputs.items()
        }
        with _border("run"):
            found: list[Array] = self._session.run(None, arrays)
        return [found[place] for place in self._places]


def _border(done: str) -> contextlib.AbstractContextManager[None]:
    return foreign(f"a part of it cannot be {done}", advice="it is not understood.", error=Unfused)


def _open(model: ir.Model) -> "ort.InferenceSession":
    runtime = require("onnxruntime", extra="cpu", purpose="fusing a decoder's graph")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
