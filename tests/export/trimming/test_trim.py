"""Trimming graphs of every layout: logits must equal the full graph's, `full[..., kept]`, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.folders import make_vocab
from tests.support.graphs import EMBEDDINGS, HEADS, TIED, GraphText, run, sketch, sketch_tied
from tests.support.rounding import assert_within, gamma
from trimserve.vocab.map import VocabMap
from trimserve_export.trimming import trim_graph

pytestmark = pytest.mark.export

V = 37
KEPT = (0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36)
VOCAB = make_vocab(KEPT, V)


def trimmed_equals_full(made: GraphText, vocab: VocabMap = VOCAB) -> tuple[np.ndarray, ir.Model]:
    compact = np.random.default_rng(1).integers(0, len(vocab), (1, 9))
    (full,) = run(made.model(), {"input_ids": vocab.to_original(compact).astype(np.int64)})
    model = made.model()
    trim_graph(model, vocab, has_head=True)
    (found,) = run(model, {"input_ids": compact})
    np.testing.assert_array_equal(found, full[..., vocab.kept_ids])
    assert np.ptp(found) > 0
    return found, model


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_embedding_layouts(embedding):
    trimmed_equals_full(sketch(embedding, "matmul"))


@pytest.mark.parametrize("H", [16, 48])
@pytest.mark.parametrize("head", HEADS)
def test_head_layouts(head, H):
    trimmed_equals_full(sketch("plain", head, H=H))


@pytest.mark.parametrize("kind", TIED)
def test_tied_layouts(kind):
    _, model = trimmed_equals_full(sketch_tied(kind))
    assert all(V not in value.const_value.shape for value in model.graph.initializers.values())


@pytest.mark.parametrize("after", ["biased", "capped", "masked", "cast"])
@pytest.mark.parametrize("head", ["matmul", "gemm", "integer_by_token", "nbits_4"])
def test_what_follows_the_head(head, after):
    trimmed_equals_full(sketch("plain", head, after))


SEVERAL = st.sampled_from


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sizes(data):
    V = data.draw(st.integers(5, 70))  # as many positions as tokens are fed
    block = data.draw(SEVERAL([16, 32]))
    H = block * data.draw(st.integers(1, 3))
    sizes = {"V": V, "H": H, "block": block, "seed": data.draw(st.integers(0, 9))}
    after = data.draw(SEVERAL(["bare", "biased", "masked"]))
    if data.draw(st.booleans()):
        made = sketch_tied(data.draw(SEVERAL(sorted(TIED))), after, **sizes)
    else:
        embedding, head = data.draw(SEVERAL(sorted(EMBEDDINGS))), data.draw(SEVERAL(sorted(HEADS)))
        made = sketch(embedding, head, after, **sizes)
    kept = data.draw(st.sets(st.integers(0, V - 1), min_size=1))
    vocab = make_vocab(sorted(kept), V)
    compact = np.random.default_rng(1).integers(0, len(vocab), (1, 5))
    (full,) = run(made.model(), {"input_ids": vocab.to_original(compact).astype(np.int64)})
    model = made.model()
    trim_graph(model, vocab, has_head=True)
    (found,) = run(model, {"input_ids": compact})
    expected = full[..., vocab.kept_ids]
    if len(vocab) > 1:
        np.testing.assert_array_equal(found, expected)
        return
    # A head of one row is a matrix times a vector to ONNX Runtime, which adds in another order.
    bound = 2 * gamma(H + 8) * sizes_of_sums(made, vocab.to_original(compact).astype(np.int64))
    assert_within(found, expected, bound[..., vocab.kept_ids], rows=None)


def sizes_of_sums(made: GraphText, ids: np.ndarray) -> np.ndarray:
    """|h|.|w| of every logit, the bias being one of the terms; rows are what unit vectors give."""
    width = f"batch, seq, {made.H}"
    (hidden,) = run(made.model(f"float[{width}] hidden"), {"input_ids": ids})
    lines = [line for line in made.lines if not line.startswith("hidden = ")]
    head = replace(made, lines=lines).model(inputs=f"int64[batch, seq] input_ids, float[{width}] hidden")
    units = np.concatenate([np.eye(made.H, dtype=np.float32), np.zeros((1, made.H), np.float32)])
    (rows,) = run(head, {"input_ids": np.zeros((made.H + 1, 1), np.int64), "hidden": units[:, None]})
    rows = np.abs(rows).reshape(len(units), -1)
    rows[rows > 1e8] = 0  # of those that are masked there is no sum
    return np.abs(hidden) @ (rows[:-1] + rows[-1]) + rows[-1]


def test_width_that_is_no_multiple_of_the_block():
    for head in ("nbits_2", "nbits_4", "nbits_4_flat", "nbits_8"):
        trimmed_equals_full(sketch("plain", head, H=40))


def test_sizes_that_equal_the_vocab_are_left_alone():
    _, model = trimmed_equals_full(sketch("layer_norm", "matmul", H=V, V=V))
    shapes = {name: tuple(value.shape) for name, value in model.graph.initializers.items()}
    assert shapes["positions"] == shapes["square"] == (V, V)
    assert shapes["table"] == (len(KEPT), V)
    assert shapes["head"] == (V, len(KEPT))


def test_declared_shapes_follow():
    _, model = trimmed_equals_full(sketch("plain", "gemm", "biased"))
    assert tuple(model.graph.outputs[0].shape) == ("batch", "seq", len(KEPT))


@pytest.mark.parametrize("kind", ["plain", "blocks_int4", "transposed"])
@pytest.mark.parametrize("head", ["matmul", "nbits_4", "qdq_int4", "bnb4", "integer_by_token"])
def test_shifted_row_is_noticed(kind, head):
    made = sketch(kind, head)
    compact = np.arange(len(KEPT))[None]
    (full,) = run(made.model(), {"input_ids": VOCAB.to_original(compact).astype(np.int64)})
    wrong = make_vocab((*KEPT[:4], KEPT[4] - 1, *KEPT[5:]), V)
    model = made.model()
    trim_graph(model, wrong, has_head=True)
    (found,) = run(model, {"input_ids": compact})
    assert not np.array_equal(found[0, 4], full[0, 4][VOCAB.kept_ids])  # the embedding's row
    assert not np.array_equal(found[0, :4, 4], full[0, :4, KEPT[4]])  # the head's


def compared(line: str, **tensors: np.ndarray) -> GraphText:
    """A graph whose rows get a number more where ids compare in some way."""
    made = GraphText()
    EMBEDDINGS["plain"](made)
    made.add(line, **tensors)
    made.add("number = Cast<to = 1>(flag)\nlast = Unsqueeze(number, minus)", minus=np.array([-1]))
    made.add("hidden = Add(rows, last)")
    HEADS["matmul"](made)
    made.add("logits = Identity(product)")
    return made


@pytest.mark.parametrize(
    "line",
    [
        "flag = Equal(input_ids, bound)",
        "flag = Equal(bound, input_ids)",
        "flag = Less(input_ids, bound)",
        "flag = Less(bound, input_ids)",
        "flag = LessOrEqual(input_ids, bound)",
        "flag = Greater(input_ids, bound)",
        "flag = GreaterOrEqual(input_ids, bound)",
        "flag = GreaterOrEqual(bound, input_ids)",
        "other = Where(mask, input_ids, bound)\nflag = Equal(other, bound)",
    ],
)
def test_constants_that_ids_are_compared_with_move(line):
    tensors = {"bound": np.array(20)} | (
        {"mask": np.array([[True] * 5 + [False] * 4])} if "mask" in line else {}
    )
    trimmed_equals_full(compared(line, **tensors))


@pytest.mark.parametrize("bound", [0, 3, 25, 36, 37, -1, 99])
@pytest.mark.parametrize("operator", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
def test_bounds_need_not_be_kept(operator, bound):
    trimmed_equals_full(compared(f"flag = {operator}(input_ids, bound)", bound=np.array(bound)))


def test_number_that_is_no_id_equals_none():
    trimmed_equals_full(compared("flag = Equal(input_ids, bound)", bound=np.array(-100)))


def test_shared_small_constant_changes_for_the_comparison_alone():
    line = "is_pad = Equal(input_ids, five)\nzero = Cast<to = 7>(is_pad)\nflag = Add(zero, five)"
    trimmed_equals_full(compared(line, five=np.array(5)))


def merged() -> GraphText:
    """Two branches over the same constants, as optimum-onnx merges decoders."""
    made = GraphText()
    branch = "across{n} = Transpose(table)\n made{n} = MatMul(found{n}, across{n})"
    for n in (1, 2):
        made.lines.append("")
        made.lines[-1] = f"found{n} = Gather(table, input_ids)\n" + branch.format(n=n)
    first, second = made.lines
    made.lines = [
        f"""logits = If (use_cache) <
            then_branch = first () => (float[batch, seq, {made.V}] made1) {{ {first} }},
            else_branch = second () => (float[batch, seq, {made.V}] made2) {{ {second} }}
        >"""
    ]
    made.add("", table=made.floats(made.V, made.H))
    return made


def test_branches_share_one_cut():
    made = merged()
    inputs = "int64[batch, seq] input_ids, bool use_cache"
    compact = np.array([[0, 3, 10, 4]])
    for flag in (True, False):
        feeds = {"use_cache": np.array(flag)}
        ids = VOCAB.to_original(compact).astype(np.int64)
        (full,) = run(made.model(inputs=inputs), feeds | {"input_ids": ids})
        model = made.model(inputs=inputs)
        plan = trim_graph(model, VOCAB, has_head=True)
        (found,) = run(model, feeds | {"input_ids": compact})
        np.testing.assert_array_equal(found, full[..., VOCAB.kept_ids])
        assert len(plan.cuts) == 1


def test_two_tables_are_both_cut():
    made = GraphText()
    EMBEDDINGS["plain"](made)
    made.add("layered = Gather(large, input_ids)", large=made.floats(made.V, made.H))
    made.add("hidden = Add(rows, layered)")
    HEADS["matmul"](made)
    made.add("logits = Identity(product)")
    trimmed_equals_full(made)


def test_graph_without_a_head():
    made = GraphText()
    EMBEDDINGS["blocks_uint8"](made)
    model = made.model(f"float[batch, seq, {made.H}] rows")
    (full,) = run(model, {"input_ids": np.array([KEPT])})
    trim_graph(model, VOCAB, has_head=False)
    (found,) = run(model, {"input_ids": np.arange(len(KEPT))[None]})
    np.testing.assert_array_equal(found, full)


def test_graph_without_an_embedding():
    made = GraphText()
    HEADS["nbits_4"](made)
    made.add("logits = Identity(product)")
    inputs = f"float[batch, seq, {made.H}] hidden"
    hidden = made.floats(1, 5, made.H)
    (full,) = run(made.model(inputs=inputs), {"hidden": hidden})
    model = made.model(inputs=inputs)
    trim_graph(model, VOCAB, has_head=True)
    (found,) = run(model, {"hidden": hidden})
    np.testing.assert_array_equal(found, full[..., VOCAB.kept_ids])
