"""Each pattern of the fusion pass on a few lines of ONNX text, against the numbers of what it replaces."""

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.support.rounding import assert_within, gamma
from trimserve_export.fusion.activations import fuse_activations
from trimserve_export.fusion.chains import places_of
from trimserve_export.fusion.heads import heads_behind
from trimserve_export.fusion.linear import pack_products
from trimserve_export.fusion.masks import Windows
from trimserve_export.fusion.norms import fuse_norms, fuse_skips
from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused

pytestmark = pytest.mark.export

H = 8
_HEAD = '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]> '
# Data is what comes from the past: hidden states stand in its place here.
_FED = "states"
STATES = f"agraph (float[B, T, {H}] states, float[B, T, {H}] residual)"
RNG = np.random.default_rng(0)


def model_of(body, outputs=f"float[B, T, {H}] y", inputs=STATES, **constants):
    """A graph of ONNX text, with arrays for the names in it that no node makes."""
    model = ir.from_onnx_text(f"{_HEAD} {inputs} => ({outputs}) {{ {body} }}")
    values = {str(v.name): v for node in model.graph for v in node.inputs if v is not None}
    for name, array in constants.items():
        if name in values:
            tensor = ir.tensor(np.asarray(array), name=name)
            values[name].const_value, values[name].type = tensor, ir.TensorType(tensor.dtype)
            values[name].shape = ir.Shape(np.shape(array))
            model.graph.register_initializer(values[name])
    for value in model.graph.inputs:
        if value.name in ("states", "residual"):
            value.name = f"past_key_values.{value.name}"
    return model


def outputs_of(model, **feeds):
    """What a graph gives, all its outputs; states that are not given are noise of their own."""
    noise = np.random.default_rng(1)
    arrays = {v: noise.standard_normal((1, 3, H)).astype(np.float32) for v in model.graph.inputs}
    arrays |= {v: feeds[v.name] for v in model.graph.inputs if v.name in feeds}
    return Probe(model).run(list(model.graph.outputs), arrays, new=3, past=0)


def kinds(model):
    return sorted(node.op_type for node in model.graph)


def fused(model, *passes):
    """The same graph after some passes, and whether its numbers are the same."""
    before = outputs_of(model)
    probe = Probe(model)
    counts = [fuse(model.graph, probe) for fuse in passes]
    RemoveUnusedNodesPass()(model)
    for one, other in zip(before, outputs_of(model), strict=True):
        assert_within(other, one, gamma(64) * np.abs(one).max(), rows=None)
    return counts


_MEAN = "m = ReduceMean(s, last) e = Add(m, eps)"
_DIVIDED = "r = Sqrt(e) n = Div(h, r) y = Mul(n, weight)"
NORMS = {
    "reciprocal": f"s = Pow(h, two) {_MEAN} r = Sqrt(e) i = Reciprocal(r) n = Mul(h, i) y = Mul(weight, n)",
    "divided by the root": f"s = Mul(h, h) {_MEAN} {_DIVIDED}",
    "one over the root": f"s = Pow(h, two) {_MEAN} r = Sqrt(e) i = Div(one, r) n = Mul(h, i) "
    "y = Mul(n, weight)",
    "a power": f"s = Pow(h, two) {_MEAN} i = Pow(e, half) n = Mul(i, h) y = Mul(n, weight)",
    "Gemma's weight": f"s = Pow(h, two) {_MEAN} r = Sqrt(e) i = Reciprocal(r) n = Mul(h, i) "
    "w = Add(weight, one) y = Mul(n, w)",
}
NUMBERS = {
    "two": np.float32(2),
    "last": np.array([-1]),
    "eps": np.float32(1e-2),
    "one": np.float32(1),
    "half": np.float32(-0.5),
    "weight": np.linspace(0.5, 2, H, dtype=np.float32),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_is_one_node(name):
    model = model_of(f"h = Identity({_FED}) {NORMS[name]}", **NUMBERS)
    assert fused(model, fuse_norms) == [1]
    assert [kind for kind in kinds(model) if kind != "Add"] == ["Identity", "SimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    "body",
    [
        f"s = Pow(h, three) {_MEAN} {_DIVIDED}",
        f"s = Pow(h, two) {_MEAN} r = Sqrt(e) n = Div(residual, r) y = Mul(n, weight)",
        f"s = Pow(h, two) m = ReduceMean(s, first) e = Add(m, eps) {_DIVIDED}",
    ],
    ids=["cubes", "of another value", "over another axis"],
)
def test_what_only_looks_like_a_normalisation_stays(body):
    model = model_of(f"h = Identity({_FED}) {body}", **NUMBERS, three=np.float32(3), first=np.array([1]))
    before = kinds(model)
    assert fused(model, fuse_norms) == [0]
    assert kinds(model) == before


def test_the_sum_before_a_normalisation_goes_into_it():
    body = "h = Add(states, residual) " + NORMS["reciprocal"]
    model = model_of(body + " z = Identity(h)", f"float[B, T, {H}] y, float[B, T, {H}] z", **NUMBERS)
    assert fused(model, fuse_norms, fuse_skips) == [1, 1]
    assert kinds(model) == ["Identity", "SkipSimplifiedLayerNormalization"]


def test_a_bias_before_a_normalisation_is_no_sum_of_states():
    model = model_of(f"h = Add({_FED}, weight) " + NORMS["reciprocal"], **NUMBERS)
    assert fused(model, fuse_norms, fuse_skips) == [1, 0]


ACTIVATIONS = {
    "QuickGelu": "g = Sigmoid(h) y = Mul(g, h)",
    "FastGelu": "a = Pow(h, three) b = Mul(a, cubic) c = Add(h, b) d = Mul(c, root) t = Tanh(d) "
    "e = Add(t, one) f = Mul(h, minus) g = Neg(f) y = Mul(g, e)",
    "Gelu": "a = Div(h, root2) b = Erf(a) c = Add(b, one) d = Mul(h, c) e = Mul(d, minus) y = Neg(e)",
}
CONSTANTS = {
    "three": np.float32(3),
    "cubic": np.float32(0.044715),
    "root": np.float32(np.sqrt(2 / np.pi)),
    "root2": np.float32(np.sqrt(2)),
    "one": np.float32(1),
    "minus": np.float32(-0.5),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_is_one_node(kind):
    model = model_of(f"h = Identity({_FED}) {ACTIVATIONS[kind]}", **CONSTANTS)
    assert fused(model, fuse_activations) == [1]
    assert kinds(model) == sorted(["Identity", kind])


def test_a_gate_of_another_value_and_a_soft_cap_are_no_activations():
    assert fused(model_of(f"g = Sigmoid({_FED}) y = Mul(g, residual)"), fuse_activations) == [0]
    assert fused(model_of(f"a = Tanh({_FED}) y = Mul(a, three)", **CONSTANTS), fuse_activations) == [0]


def test_products_of_one_input_are_one():
    weights = {
        name: RNG.standard_normal((H, n)).astype(np.float32) for name, n in (("a", 3), ("b", 5), ("c", 4))
    }
    bias = RNG.standard_normal(5).astype(np.float32)
    body = f"u = MatMul({_FED}, a) p = MatMul({_FED}, b) v = Add(p, bias) w = MatMul({_FED}, c) "
    body += "x = MatMul(residual, a)"
    outputs = ", ".join(f"float[B, T, {n}] o{i}" for i, n in enumerate((3, 5, 4, 3)))
    body += "".join(f" o{i} = Identity({name})" for i, name in enumerate("uvwx"))
    model = model_of(body, outputs, **weights, bias=bias)
    assert fused(model, pack_products) == [1]
    assert [kind for kind in kinds(model) if kind != "Identity"] == ["Add", "MatMul", "MatMul", "Split"]


MASK_INPUTS = "agraph (int64[B, L] attention_mask, int64[B, T] input_ids)"
_PLACES = (
    "one = Constant<value_int=1>() zero = Constant<value_int=0>() "
    "t1 = Shape<start=1, end=2>(input_ids) l1 = Shape<start=1, end=2>(attention_mask) "
    "t = Squeeze(t1) l = Squeeze(l1) p = Sub(l, t) r = Range(zero, t, one) q = Add(r, p) "
    "k = Range(zero, l, one) q2 = Unsqueeze(q, last) d = Sub(q2, k) "
)


@pytest.mark.parametrize(
    ("body", "window"),
    [
        ("y = GreaterOrEqual(d, zero)", None),
        ("a = GreaterOrEqual(d, zero) b = Less(d, five) y = And(a, b)", 5),
        ("a = Less(d, zero) f = Cast<to=1>(a) y = Mul(f, low)", None),
    ],
    ids=["causal", "window", "added"],
)
def test_a_mask_is_read_by_what_it_hides(body, window):
    model = model_of(
        _PLACES + body,
        "float[T, L] y",
        MASK_INPUTS,
        last=np.array([-1]),
        five=np.int64(5),
        low=np.float32(-3e38),
    )
    (mask,) = model.graph.outputs
    mask.type = None
    assert Windows(Probe(model), 32).of((mask,)) == window


@pytest.mark.parametrize(
    "body",
    [
        "a = Cast<to=1>(d) y = Mul(a, slope)",  # ALiBi
        "a = Mod(k, two) b = Equal(a, zero) c = Unsqueeze(b, first) y = Expand(c, last2)",
    ],
    ids=["slopes", "every second"],
)
def test_another_mask_is_refused(body):
    model = model_of(
        _PLACES + body,
        "float[T, L] y",
        MASK_INPUTS,
        last=np.array([-1]),
        first=np.array([0]),
        last2=np.array([1, 1]),
        two=np.int64(2),
        slope=np.float32(-0.5),
    )
    (mask,) = model.graph.outputs
    mask.type = None
    with pytest.raises(Unfused):
        Windows(Probe(model), 32).of((mask,))


SPLIT = {
    # Side by side, and GPT-NeoX's, whose heads have queries, keys and values each.
    "one after the other": (
        "s1, s2, s3 = Split<axis=-1, num_outputs=3>(states) a = Reshape(s2, heads) "
        "y = Transpose<perm=[0,2,1,3]>(a)",
        [4, 5, 6, 7],
    ),
    "each head's": (
        "a = Reshape(states, apart) b = Transpose<perm=[0,2,1,3]>(a) "
        "s1, s2, y = Split<axis=-1, num_outputs=3>(b)",
        [4, 5, 10, 11],
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_heads_are_found_by_their_columns(name):
    body, columns = SPLIT[name]
    inputs = "agraph (float[B, T, 12] states, int64[B, T] input_ids)"
    model = model_of(
        body, "float[B, 2, T, 2] y", inputs, heads=np.array([0, 0, 2, 2]), apart=np.array([0, 0, 2, 6])
    )
    (value,) = model.graph.outputs
    found = heads_behind(value, 2, Probe(model), places_of(model.graph))
    assert found.columns.tolist() == columns
    assert str(found.source.name).endswith("states")
