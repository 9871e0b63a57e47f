"""The pass that writes shapes as constants: what it proves, what it leaves, and that no bit changes."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.support.exports import V, open_graph, run
from trimserve_export import export
from trimserve_export.serving import servable as serving
from trimserve_export.shapes.fix import fix_shapes

pytestmark = pytest.mark.export

# As exporters write it: every size of a Reshape's shape is computed, also those that are numbers.
SIZES = """
    sizes = Shape(x)
    batch = Gather<axis = 0>(sizes, zero)
    length = Gather<axis = 0>(sizes, one)
    width = Gather<axis = 0>(sizes, two)
    batch_1 = Unsqueeze(batch, front)
    length_1 = Unsqueeze(length, front)
    half = Div(width, two)
    half_1 = Unsqueeze(half, front)
"""
CONSTANTS = {
    "zero": 0, "one": 1, "two": 2, "front": [0], "ones": [1], "last": [-1], "third": [3], "heads": [2],
    "all_minus": [-1, -1, -1], "endless": [2**62], "five": [5],
}  # fmt: skip


def parse(body: str, shape: str = "batch_size, sequence_length, 6") -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    model (int64[batch_size, sequence_length] input_ids, float[{shape}] x,
           float[batch_size, past_length, 6] past) => (float[a, b, c] y) {{ {body} }}"""
    tensors = [ir.tensor(np.array(value, np.int64), name=name) for name, value in CONSTANTS.items()]
    return ir.from_onnx_text(text, initializers=[tensor for tensor in tensors if tensor.name in body])


def compute(model: ir.Model, path, batch: int, length: int, past: int) -> np.ndarray:
    ir.save(model, path)
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": np.zeros((batch, length), np.int64),
        "x": random.standard_normal((batch, length, 6), np.float32),
        "past": random.standard_normal((batch, past, 6), np.float32),
    }
    session = open_graph(path)
    return session.run(["y"], {value.name: feeds[value.name] for value in session.get_inputs()})[0]


def fixed(body: str, tmp_path, *, same: bool = True) -> list[str]:
    """Operators that are left, after a comparison of both graphs on awkward sizes."""
    before, after = parse(body), parse(body)
    fix_shapes(after.graph)
    RemoveUnusedNodesPass()(after)
    for sizes in ((1, 1, 0), (1, 1, 4), (3, 2, 0), (2, 5, 3)) if same else ():
        wanted, found = (compute(model, tmp_path / "m.onnx", *sizes) for model in (before, after))
        np.testing.assert_array_equal(found, wanted)
        assert found.shape == wanted.shape
    return [node.op_type for node in after.graph]


def test_computed_shapes_become_constants(tmp_path):
    body = (
        SIZES
        + """
        shape = Concat<axis = 0>(batch_1, length_1, heads, half_1)
        four = Reshape(x, shape)
        turned = Transpose<perm = [0, 2, 1, 3]>(four)
        back = Transpose<perm = [0, 2, 1, 3]>(turned)
        flat_shape = Concat<axis = 0>(batch_1, length_1, last)
        y = Reshape(back, flat_shape)
    """
    )
    assert fixed(body, tmp_path) == ["Reshape", "Transpose", "Transpose", "Reshape"]


def test_repeated_heads_need_no_sizes(tmp_path):
    body = (
        SIZES
        + """
        long_x = Concat<axis = 1>(past, x)
        deep = Unsqueeze(long_x, ones)
        long_sizes = Shape(long_x)
        long_length = Gather<axis = 0>(long_sizes, one)
        long_length_1 = Unsqueeze(long_length, front)
        width_1 = Unsqueeze(width, front)
        target = Concat<axis = 0>(batch_1, heads, long_length_1, width_1)
        wide = Expand(deep, target)
        shape = Concat<axis = 0>(batch_1, last, width_1)
        y = Reshape(wide, shape)
    """
    )
    assert fixed(body, tmp_path) == ["Concat", "Unsqueeze", "Expand", "Reshape"]


def test_idle_expands_and_slices_go(tmp_path):
    body = (
        SIZES
        + """
        asked = Concat<axis = 0>(batch_1, last, length_1)
        minus = Equal(asked, all_minus)
        ones_3 = Mul(all_minus, last)
        target = Where(minus, ones_3, asked)
        turned = Transpose<perm = [0, 2, 1]>(x)
        wide = Expand(turned, target)
        all = Slice(wide, front, length_1, heads)
        back = Transpose<perm = [0, 2, 1]>(all)
        y = Slice(back, front, endless, ones)
    """
    )
    # The last one makes the graph's output, whose name must stay.
    assert fixed(body, tmp_path) == ["Transpose", "Transpose", "Slice"]


def test_slices_that_cut_stay(tmp_path):
    body = (
        SIZES
        + """
        start = Neg(length_1)
        some = Slice(x, start, endless, heads)
        rest = Slice(some, front, five, heads)
        y = Neg(rest)
    """
    )
    assert fixed(body, tmp_path).count("Slice") == 2


def test_two_sizes_that_are_not_the_inputs_stay_computed(tmp_path):
    body = (
        SIZES
        + """
        rows = Concat<axis = 0>(last, half_1)
        flat = Reshape(x, rows)
        shape = Concat<axis = 0>(batch_1, length_1, last)
        y = Reshape(flat, shape)
    """
    )
    left = fixed(body, tmp_path)
    assert left.count("Reshape") == 2
    assert "Concat" in left  # a constant has one -1


def test_a_size_that_may_be_nothing_is_not_divided_by(tmp_path):
    # Nothing times anything: -1 could not be solved for an empty past.
    body = (
        SIZES
        + """
        past_sizes = Shape(past)
        past_length = Gather<axis = 0>(past_sizes, one)
        past_1 = Unsqueeze(past_length, front)
        turned = Transpose<perm = [1, 2, 0]>(past)
        six = Mul(batch, width)
        six_1 = Unsqueeze(six, front)
        shape = Concat<axis = 0>(past_1, six_1, ones)
        y = Reshape(turned, shape)
    """
    )
    assert "Concat" in fixed(body, tmp_path)


@pytest.mark.optimum(only=True)  # its traces are the ones with the shape arithmetic
@pytest.mark.parametrize("family", ["llama_tied", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_no_bit_changes_in_a_family(family, exported, tmp_path, monkeypatch):
    made = exported(family)
    monkeypatch.setattr(serving, "fix_shapes", lambda _: None)
    export(made.source, made.vocab, tmp_path / "plain")
    plain = ir.load(tmp_path / "plain" / "model.onnx").graph
    assert len(ir.load(made.folder.path / "model.onnx").graph) < 0.7 * len(plain)
    session = open_graph(tmp_path / "plain" / "model.onnx")
    past = {"plain": None, "fixed": None}
    for shape in ((2, 9), (2, 1), (2, 3)):
        ids = made.vocab.with_slots(np.random.default_rng(shape[1]).integers(0, V, shape).astype(np.int32))
        rows = made.cold_rows(ids.cold_ids)
        for name, graph in (("plain", session), ("fixed", made.trimmed)):
            past[name] = run(graph, ids.ids, cold_rows=rows, past=past[name])
        for name, wanted in past["plain"].items():
            np.testing.assert_array_equal(past["fixed"][name], wanted)
