"""Graphs that the runtime could not feed or read, or that take one shape of input, are refused early."""

import json

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir

from tests.support.graphs import GraphText
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.model.source import ModelSource
from trimserve_export.shapes.fixed_sizes import fixed_size
from trimserve_export.source.admission import check_source

pytestmark = pytest.mark.export

V, H = 37, 16
IDS = "int64[batch, seq] input_ids"
MASK = "int64[batch, seq] attention_mask"
STATES = f"float[batch, seq, {H}] last_hidden_state"
PAST = "float[batch, 2, past, 8] past_key_values.0.key, float[batch, 2, past, 8] past_key_values.0.value"
PRESENT = "float[batch, 2, total, 8] present.0.key, float[batch, 2, total, 8] present.0.value"
LOGITS = f"float[batch, seq, {V}] logits"


def graph(*lines, inputs=f"{IDS}, {MASK}", outputs=STATES, **tensors):
    made = GraphText()
    made.add("rows = Gather(table, input_ids)", table=made.floats(V, H))
    for line in lines or ("last_hidden_state = Identity(rows)",):
        made.add(line)
    made.add("", **tensors)
    return made.model(outputs, inputs)


def decoder(inputs=f"{IDS}, int64[batch, total] attention_mask, {PAST}", outputs=f"{LOGITS}, {PRESENT}"):
    made = GraphText()
    made.add("rows = Gather(table, input_ids)", table=made.floats(V, H))
    made.add("logits = MatMul(rows, head)", head=made.floats(H, V))
    made.add("k = Identity(past_k)\nv = Identity(past_v)")
    text = {"past_key_values.0.key": "past_k", "past_key_values.0.value": "past_v", "present.0.key": "k"}
    text |= {"present.0.value": "v"}
    for name, short in text.items():
        inputs, outputs = inputs.replace(name, short), outputs.replace(name, short)
    model = made.model(outputs, inputs)
    names = {short: name for name, short in text.items()}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(value.name, value.name)
    return model


def check(folder, model, config=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": V} | (config or {})), "utf-8")
    ir.save(model, folder / "model.onnx")
    check_source(ModelSource("a-model", None, folder), **options)


def test_graphs_that_can_be_fed_pass(tmp_path):
    check(tmp_path, graph())
    check(tmp_path, graph(inputs=IDS))  # texts of one length are fed together
    check(tmp_path, graph(inputs=f"int32[b, s] input_ids, {MASK}, int64[b, s] token_type_ids"))
    check(tmp_path, decoder())
    optional = graph()  # what has a default need not be fed
    value = ir.Value(name="scale", const_value=ir.tensor(np.float32(2), name="scale"))
    optional.graph.inputs.append(value)
    optional.graph.register_initializer(value)
    check(tmp_path, optional)
    # Whatever is flattened by names, not by numbers.
    back = (
        "sizes = Shape(rows)",
        "flat = Reshape(rows, flattened)",
        "last_hidden_state = Reshape(flat, sizes)",
    )
    check(tmp_path, graph(*back, flattened=np.array([-1, H])))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            graph(inputs=f"{IDS}, {MASK}, float[b, 3, 8, 8] pixel_values"),
            "takes pixel_values, which the runtime",
        ),
        (graph(inputs=f"{IDS}, float[b, s] attention_mask"), "takes attention_mask as float"),
        (graph(inputs=f"{IDS}, int64[b, 1, s, s] attention_mask"), "attention_mask with 4 axes"),
        (decoder(inputs=f"{IDS}, {PAST}"), "lacks the input attention_mask"),
        (decoder(inputs=f"{IDS}, {MASK}, {PAST}, float[b, s, 16] inputs_embeds"), "takes inputs_embeds"),
        (decoder(inputs=f"int32[b, s] input_ids, {MASK}, {PAST}"), "input_ids as int32"),
        (decoder(inputs=f"{IDS}, {MASK}, {PAST.replace('2', 'heads')}"), "without a number of heads"),
        (decoder(outputs=f"{LOGITS}, {PRESENT.split(', float')[0]}"), "lacks the output present.0.value"),
    ],
)
def test_what_the_runtime_does_not_feed_or_read(tmp_path, model, match):
    with pytest.raises(UnsupportedModelError, match=rf"model\.onnx.*{match}.*--layout graph or"):
        check(tmp_path, model)
    check(tmp_path, model, layout="graph")


def test_outputs_that_are_missing(tmp_path):
    with pytest.raises(UnsupportedModelError, match="lacks the output logits"):
        check(tmp_path, graph(), task="text-classification")
    with pytest.raises(UnsupportedModelError, match="expected logits or last_hidden_state"):
        check(tmp_path, graph("pooled = Identity(rows)", outputs=f"float[b, s, {H}] pooled"))
    alone = graph("logits = MatMul(rows, head)", outputs=LOGITS, head=np.ones((H, V), np.float32))
    check(tmp_path, alone, {"architectures": ["BertForMaskedLM"]})
    with pytest.raises(UnsupportedModelError, match=r"a decoder .LlamaForCausalLM. without past_key_values"):
        check(tmp_path, alone, {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (graph(inputs="int64[1, seq] input_ids"), "the batch of its input input_ids is fixed to 1"),
        (
            graph(inputs=f"int64[b, 128] input_ids, {MASK}"),
            "the length of its input input_ids is fixed to 128",
        ),
        (graph(inputs=f"{IDS}, int64[b, 128] attention_mask"), "length of its input attention_mask is fixed"),
        (
            decoder(inputs=f"{IDS}, {MASK}, {PAST.replace('past,', '64,')}"),
            "past length .*key is fixed to 64",
        ),
        (
            graph("last_hidden_state = Reshape(rows, to)", to=np.array([1, 128, H])),
            r"Reshape .*reshapes to \[1, 128, 16\], whatever",
        ),
        (
            graph("last_hidden_state = Reshape(rows, to)", to=np.array([-1, 128, 2, 8])),
            r"reshapes to \[-1, 128, 2, 8\], which fits one length",
        ),
        (
            graph("last_hidden_state = Reshape(rows, to)", to=np.array([1, -1, 2, 8])),
            r"reshapes to \[1, -1, 2, 8\], which takes the texts of a batch for one",
        ),
        (
            graph("last_hidden_state = Add(rows, positions)", positions=np.ones((1, 128, H), np.float32)),
            "Add .*fits a size of 128 alone",
        ),
    ],
)
def test_fixed_sizes(tmp_path, model, match):
    with pytest.raises(
        UnsupportedModelError, match=rf"one shape of input alone, since .*{match}.*dynamic axes"
    ):
        check(tmp_path, model)
    assert fixed_size(graph().graph) is None


def test_a_graph_by_name_alone(tmp_path):
    check(tmp_path, graph())
    for content, match in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
    ):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(MismatchError, match=rf"model\.onnx .*{match}"):
            check_source(ModelSource("a-model", None, tmp_path))
