"""`export --quantize`: the quantised trimmed model is the quantised full model, cut."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import onnx_ir as ir
import onnxruntime as ort
import transformers

from tests.support.exports import open_graph, run
from tests.support.folders import make_vocab
from tests.support.generators import FullSampler, make_pair, open_generator
from tests.support.models import PLAIN_EXPORTER, save_model
from tests.support.rounding import assert_within, gamma, product_bound
from tests.support.translators import save_translator
from trimserve.cli.main import main
from trimserve.decoding.sampling import SamplingParams
from trimserve.encoder.answers import cold_logits
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.quantized import BlockScheme, Quantization, dequantize, round_activations
from trimserve.files.tensors import read_header
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_MAX_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import open_session
from trimserve.vocab.map import VocabMap
from trimserve_export import planning
from trimserve_export.full_model import export_full
from trimserve_export.graphs.head import find_head
from trimserve_export.options import Options
from trimserve_export.pipeline import export
from trimserve_export.serving.block_rows import quantize_rows
from trimserve_export.serving.quantize import quantization_of, quantize_graph, scheme_of
from trimserve_export.verify import verify
from trimserve_export.verify.plain_run import GraphModel

pytestmark = pytest.mark.export

LOOKUP = "GatherBlockQuantized"
TEXTS = ["the cat sat on the mat", "a", "Grüße, Welt! 🎉"]
RANDOM = np.random.default_rng(0)
# Widths of whole blocks, of less than one, and with a padded last block at odd and even counts of blocks.
WIDTHS = (32, 16, 48, 80, 40)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_each_row_is_quantised_by_itself(bits, width):
    scheme = BlockScheme(bits)
    rows = RANDOM.standard_normal((37, width)).astype(np.float32)
    whole = quantize_rows(rows, scheme)
    for chosen in ([5], [0, 36], range(3, 30)):
        part = quantize_rows(rows[list(chosen)], scheme)
        np.testing.assert_array_equal(part.integers, whole.integers[list(chosen)])
        np.testing.assert_array_equal(part.scales, whole.scales[list(chosen)])
    transposed = quantize_rows(np.ascontiguousarray(rows.T).T, scheme)
    np.testing.assert_array_equal(transposed.integers, whole.integers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_dequantised_rows_are_what_the_kernel_multiplies_with(bits, width):
    scheme = BlockScheme(bits)
    rows = RANDOM.standard_normal((37, width)).astype(np.float32)
    blocks = quantize_rows(rows, scheme)
    floats = dequantize(blocks.integers, blocks.scales, width, scheme)
    padded = np.zeros((37, scheme.blocks(width) * 32), np.float32)
    padded[:, :width] = np.abs(rows)
    step = padded.reshape(37, -1, 32).max(axis=2).repeat(32, axis=1)[:, :width] / 2 ** (bits - 1)
    # The largest of a block may be clipped by one step; a scale, a quotient and a product are rounded.
    assert (np.abs(floats - rows) <= step + gamma(4) * np.abs(rows)).all()
    hidden = RANDOM.standard_normal((3, width)).astype(np.float32)
    rounded = round_activations(hidden, scheme)
    bound = product_bound(rounded, floats.T, after=4)
    assert_within(_multiply(hidden, blocks, scheme), rounded @ floats.T, bound, rows=1)


def _multiply(hidden, blocks, scheme):
    rows, width = len(blocks.scales), hidden.shape[1]
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "q", "s"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=rows,
        bits=scheme.bits,
        block_size=scheme.block_size,
        accuracy_level=scheme.accuracy_level,
    )
    float_type = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", float_type, [None, width])],
        [onnx.helper.make_tensor_value_info("y", float_type, [None, rows])],
        [
            onnx.numpy_helper.from_array(blocks.integers, "q"),
            onnx.numpy_helper.from_array(blocks.scales, "s"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": hidden})[0]


@pytest.fixture(
    scope="module",
    params=[
        ("llama_tied", "int4", {"hidden_size": 48}),
        ("llama", "int4", {"hidden_size": 80, "intermediate_size": 40}),
        ("qwen3", "int4", {}),
        ("qwen3", "int8", {"hidden_size": 48}),
        ("gpt2", "int4", {}),  # the body is Gemm with a bias
        ("phi", "int8", {}),  # the head has a bias
        ("gemma2", "int4", {}),  # the logits are capped
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def quantized(request, tmp_path_factory):
    family, quantize, options = request.param
    root = tmp_path_factory.mktemp(f"{family}-{quantize}")
    return make_pair(root, family, tokenizer="byte_level_bpe", kept=275, seed=1, quantize=quantize, **options)


def test_exact_ids_equal_those_of_the_untrimmed_quantised_graph(quantized):
    generator = quantized.generator
    sampler = FullSampler(quantized.full_graph, quantized.vocab_size)
    cold = 0
    for seed, text in enumerate(TEXTS):
        (ids,) = generator.codec.encode([text])
        for params in ({}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}):
            (result,) = generator.generate(text, max_new_tokens=24, seed=seed, **params)
            expected = sampler.run(ids, SamplingParams(seed=seed, **params), 24, generator.stop_ids)
            assert list(result.ids) == expected
            cold += int((~generator.folder.vocab.is_kept(np.array(result.ids))).sum())
    assert cold > 0, "no cold token was produced: this test would not see a broken check"


def test_kept_logits_are_the_full_quantised_graphs(quantized):
    generator = quantized.generator
    cold, vocab = ColdRows(generator.folder), generator.folder.vocab
    (ids,) = generator.codec.encode([TEXTS[2]])
    slotted = vocab.with_slots(ids[None])
    trimmed = open_graph(generator.folder.path / "model.onnx")
    found = run(trimmed, slotted.ids, cold_rows=cold.embedding(slotted.cold_ids))
    no_rows = np.zeros((1, cold.width), np.float32)
    expected = run(open_graph(quantized.full_graph), ids[None].astype(np.int64), cold_rows=no_rows)
    np.testing.assert_array_equal(found["hidden_states"], expected["hidden_states"])
    logits, hidden = expected["logits"][0], found["hidden_states"][0]
    # V and K columns end in other tails, whose blocks are added up in another order.
    bound = logits_bound(quantized.torch_model(), generator.folder, hidden)
    assert_within(found["logits"][0], logits[:, vocab.kept_ids], bound[:, vocab.kept_ids], rows=1)
    cold_logits = ColdHead(generator.folder).logits(hidden)
    assert_within(cold_logits, logits[:, vocab.cold_ids], bound[:, vocab.cold_ids], rows=1)


def logits_bound(model, folder, hidden: np.ndarray) -> np.ndarray:
    """How far two orders of a head's quantised sums may lie apart: (T, V); bias and cap follow the sum."""
    scheme = Quantization.from_dict(folder.manifest.quantization).rows
    head = model.get_output_embeddings()
    blocks = quantize_rows(head.weight.detach().numpy(), scheme)
    rows = dequantize(blocks.integers, blocks.scales, hidden.shape[-1], scheme)
    bias = 0 if head.bias is None else 2 * gamma(8) * np.abs(head.bias.detach().numpy())
    return product_bound(round_activations(hidden, scheme), rows.T, after=8) + bias


def test_slots_get_the_quantised_heads_logits(quantized):
    from trimserve.decoding.columns import Columns
    from trimserve.decoding.slots import DraftSlots

    generator = quantized.generator
    vocab, decoder = generator.folder.vocab, generator._decoder
    kept = Columns(vocab.kept_ids, vocab.vocab_size)
    slots = DraftSlots(kept, generator._cold, decoder.after_head, vocab.cold_ids[[3, 7, 11]])
    hidden = RANDOM.standard_normal(decoder.hidden_size).astype(np.float32)
    found = slots.extend(np.zeros(len(vocab), np.float32), hidden)[len(vocab) :]
    expected = ColdHead(generator.folder).logits(hidden[None])[0, [3, 7, 11]]
    bound = logits_bound(quantized.torch_model(), generator.folder, hidden[None])
    assert_within(found, expected, bound[0, vocab.cold_ids[[3, 7, 11]]], rows=0)


def test_verify_passes_and_sees_a_changed_integer(quantized, tmp_path):
    path = quantized.generator.folder.path
    result = verify(path, quantized.model_path, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    assert "quantized-head" in [check.name for check in result.checks]
    changed = Path(shutil.copytree(path, tmp_path / "changed"))
    with (changed / COLD_BLOCKS_NAME).open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))
    write_manifest(changed, replace(read_manifest(changed), files=list_files(changed)))
    assert "quantized-head" in verify(changed, quantized.model_path, store=False).failed


def test_all_products_are_quantised_and_nothing_else_is(quantized):
    graph = ir.load(quantized.full_graph).graph
    left = [
        node.name
        for node in graph
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul") and node.inputs[1].const_value is not None
    ]
    assert not left
    # The embedding stays a table of floats, or is looked up in the head's rows.
    kinds = [node.op_type for node in graph]
    config = quantized.torch_model().config
    shares = config.tie_word_embeddings and config.hidden_size % 32 == 0
    assert kinds.count("GatherBlockQuantized") == int(shares)
    assert kinds.count("Gather") > 0


def test_a_tied_embedding_is_looked_up_in_the_heads_bytes(tmp_path):
    """No second table in the file: kept and cold rows are what the 8-bit integers stand for."""
    model = save_model("llama_tied", tmp_path / "model", hidden_size=64)
    export(model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", quantize="int4")
    folder = open_folder(tmp_path / "out")
    proto = onnx.load(folder.path / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    lookup = next(node for node in proto.graph.node if node.op_type == "GatherBlockQuantized")
    whole = stored[lookup.input[0]]
    places = [list(tensor.external_data) for tensor in stored.values() if tensor.external_data]
    assert places.count(list(whole.external_data)) == 2
    assert not any(list(tensor.dims) == [10, 64] and tensor.data_type == 1 for tensor in stored.values())
    table = transformers.AutoModelForCausalLM.from_pretrained(model).lm_head.weight.detach().numpy()
    blocks = quantize_rows(table, BlockScheme(8))
    expected = dequantize(blocks.integers, blocks.scales, 64, BlockScheme(8))
    cold_ids = folder.vocab.cold_ids
    np.testing.assert_array_equal(ColdRows(folder).embedding(cold_ids), expected[cold_ids])
    np.testing.assert_array_equal(ColdRows(folder).head(cold_ids), expected[cold_ids])
    result = verify(folder.path, model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    assert "quantized-embedding" in [check.name for check in result.checks]


def test_float_head_rows_are_not_stored_beside_the_quantised_ones(quantized):
    specs, metadata = read_header(quantized.generator.folder.path / "cold_rows.safetensors")
    assert "head" not in specs
    assert "embedding" in specs
    assert "tied" in metadata


def test_packed_matrices_are_mapped_and_a_processor_with_another_order_still_computes_right(
    quantized, tmp_path
):
    folder = quantized.generator.folder
    model = onnx.load(folder.path / COLD_MAX_NAME, load_external_data=False)
    entries = [e for i in model.graph.initializer for e in i.external_data if e.key.startswith("prepacked_")]
    assert entries, "the cold head is not stored packed"
    hidden = RANDOM.standard_normal((5, quantized.generator._decoder.hidden_size)).astype(np.float32)
    expected = ColdHead(folder).maxima(hidden)
    for entry in entries:  # what a processor finds whose own packing has another hash
        entry.value = entry.value.replace("MatMulNBits+", "MatMulNBits+1")
    copied = Path(shutil.copytree(folder.path, tmp_path / "copied"))
    onnx.save(model, copied / COLD_MAX_NAME)
    values, rows = open_graph(copied / COLD_MAX_NAME).run(None, {"hidden_states": hidden})
    np.testing.assert_array_equal(values.max(axis=0), expected[0])
    np.testing.assert_array_equal(folder.vocab.cold_ids[rows[values.argmax(0), range(5)]], expected[1])


def test_fp16_scales_and_embeddings(tmp_path):
    model = save_model("llama_tied", tmp_path / "model", hidden_size=48, tokenizer="byte_level_bpe")
    size = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    export(model, make_vocab(list(range(0, size, 2)), size), tmp_path / "out", dtype="fp16", quantize="int4")
    generator = open_generator(tmp_path / "out")
    assert generator.generate("the cat", max_new_tokens=4)[0].ids
    assert verify(tmp_path / "out", model, store=False).ok


def test_a_text_encoder_is_quantised_too(tmp_path):
    model = save_model("bert_encoder", tmp_path / "model")
    export(model, make_vocab(list(range(0, 37)), 37), tmp_path / "out", quantize="int8")
    folder = open_folder(tmp_path / "out")
    assert folder.manifest.quantization == quantization_of("int8").to_dict()
    assert COLD_BLOCKS_NAME not in folder.manifest.files


def test_an_encoders_embedding_is_looked_up_in_blocks_kept_and_cold_rows_alike(tmp_path):
    """Each row is rounded by itself: any text has the untrimmed quantised model's states, to the bit."""
    model = save_model("bert_encoder", tmp_path / "model", hidden_size=64)
    export(model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", quantize="int8")
    folder, source = open_folder(tmp_path / "out"), resolve_model(model)
    (lookup,) = (node for node in ir.load(folder.file("model.onnx")).graph if node.op_type == LOOKUP)
    integers, _, scales = lookup.inputs
    assert (integers.shape.numpy(), scales.shape.numpy()) == ((10, 64), (10, 2))
    result = verify(tmp_path / "out", model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    assert "quantized-embedding" in [check.name for check in result.checks]
    (tmp_path / "full").mkdir()
    scheme = Quantization.from_dict(folder.manifest.quantization)
    task = "feature-extraction"
    full = GraphModel(
        open_session(export_full(source, tmp_path / "full", task, "fp32", scheme, exporter=PLAIN_EXPORTER)),
        VocabMap.everything(37),
        None,
    )
    ids = np.array([4, 7, 20, 36, 5, 11, 30], np.int32)
    cold = GraphModel(open_session(folder.file("model.onnx")), folder.vocab, ColdRows(folder))
    assert not folder.vocab.is_kept(ids).all()
    np.testing.assert_array_equal(cold.run(ids)["last_hidden_state"], full.run(ids)["last_hidden_state"])


def test_folders_of_earlier_versions_are_compared_with_a_table_of_floats(tmp_path):
    model = save_model("bert_encoder", tmp_path / "model", hidden_size=64)
    entry = quantization_of("int8").to_dict()
    assert entry.pop("table")
    scheme = Quantization.from_dict(entry)
    path = export_full(
        resolve_model(model), tmp_path, "feature-extraction", "fp32", scheme, exporter=PLAIN_EXPORTER
    )
    kinds = {node.op_type for node in ir.load(path).graph}
    assert "MatMulNBits" in kinds
    assert LOOKUP not in kinds


def test_the_command_line_passes_the_option_on(tmp_path, capsys):
    model = save_model("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n", "utf-8")
    words = ["export", "-m", str(model), "-o", str(tmp_path / "out"), "--corpus", str(text)]
    assert main([*words, "--quantize", "int4", "--format", "json"]) == 0
    assert open_folder(tmp_path / "out").manifest.quantization["body"]["bits"] == 4
    assert json.loads(capsys.readouterr().out)["files"]


@pytest.mark.parametrize(("vocab_bits", "expected"), [(None, 8), (4, 4), (8, 8)])
def test_vocab_rows_have_bits_of_their_own(tmp_path, vocab_bits, expected):
    """The head, its cold rows and the manifest agree; the body has four bits whatever the rows have."""
    model = save_model("llama", tmp_path / "model", hidden_size=48)
    export(
        model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", quantize="int4", vocab_bits=vocab_bits
    )
    folder = open_folder(tmp_path / "out")
    graph = ir.load(folder.path / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    head = find_head(graph).product
    assert scheme_of(head).bits == expected
    assert {scheme_of(node).bits for node in products if node is not head} == {4}
    quantization = Quantization.from_dict(folder.manifest.quantization)
    assert (quantization.body.bits, quantization.rows.bits) == (4, expected)
    cold_ids = folder.vocab.cold_ids
    rows = transformers.AutoModelForCausalLM.from_pretrained(model).lm_head.weight.detach().numpy()[cold_ids]
    step = np.abs(rows).max() / 2 ** (expected - 1)
    found = np.abs(ColdRows(folder).head(cold_ids) - rows).max()
    assert step / 8 < found <= step * (1 + 1e-5)
    card = (folder.path / "README.md").read_text("utf-8")
    assert f"--vocab-bits {expected}" in card
    assert verify(folder.path, model, store=False).ok


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_an_earlier_version_still_opens_and_verifies(tmp_path, monkeypatch, bits):
    """One scheme for all, by the largest number, an embedding of floats; no word of rows and body."""
    model = save_model("llama_tied", tmp_path / "model", hidden_size=64)
    vocab = make_vocab([*range(8), 20, 36], 37)
    old = Quantization(BlockScheme(bits), BlockScheme(bits), by_exporter=True)
    monkeypatch.setattr(planning, "quantization_of", lambda *_, **__: old)
    export(model, vocab, tmp_path / "out", quantize=f"int{bits}")
    manifest = read_manifest(tmp_path / "out")
    flat = {"bits": bits, "block_size": 32, "accuracy_level": 4, "zero_points": False}
    write_manifest(tmp_path / "out", replace(manifest, quantization=flat))
    table = transformers.AutoModelForCausalLM.from_pretrained(model).lm_head.weight.detach().numpy()
    cold = ColdRows(open_folder(tmp_path / "out"))
    np.testing.assert_array_equal(cold.embedding(vocab.cold_ids), table[vocab.cold_ids])
    blocks = quantize_rows(table[vocab.cold_ids], BlockScheme(bits))
    expected = dequantize(blocks.integers, blocks.scales, 64, BlockScheme(bits))
    np.testing.assert_array_equal(cold.head(vocab.cold_ids), expected)
    result = verify(tmp_path / "out", model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "int3"),
        ({"vocab_bits": 8}, "leave them out"),
        ({"quantize": "int4", "vocab_bits": 5}, "4 or 8"),
        ({"quantize": "int4", "vocab_bits": 8, "device": "cuda", "exporter": "genai"}, "builder"),
        ({"quantize": "int4", "to": "safetensors"}, "safetensors"),
        ({"quantize": "int4", "dtype": "bf16"}, "bf16"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_bits_of_a_head_that_there_is_not_are_refused(tmp_path):
    model = save_model("bert", tmp_path / "model", hidden_size=64)
    options = {"task": "feature-extraction", "quantize": "int4", "vocab_bits": 8}
    with pytest.raises(UsageError, match="feature-extraction has none"):
        export(model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_masks_and_encoder_decoders_are_quantised_too(tmp_path, family):
    if family == "t5":
        model = save_translator(family, tmp_path / "model", d_model=48)
    else:
        model = save_model(family, tmp_path / "model", hidden_size=48)
    export(model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", quantize="int4")
    folder = open_folder(tmp_path / "out")
    assert COLD_BLOCKS_NAME in folder.manifest.files
    result = verify(tmp_path / "out", model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    assert "quantized-head" in [check.name for check in result.checks]


def test_predicted_masks_use_the_quantised_cold_rows(tmp_path):
    """Logits of cold ids are those that the untrimmed quantised graph gives them."""
    model = save_model("bert", tmp_path / "model", hidden_size=48)
    export(model, make_vocab([*range(8), 20, 36], 37), tmp_path / "out", quantize="int8")
    (tmp_path / "full").mkdir()
    scheme, source = quantization_of("int8"), resolve_model(model)
    full = open_graph(
        export_full(source, tmp_path / "full", "fill-mask", "fp32", scheme, exporter=PLAIN_EXPORTER)
    )
    folder = open_folder(tmp_path / "out")
    ids = np.array([[4, 7, 20, 36, 5]], np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "cold_rows": np.zeros((1, 48), np.float32),
        "logits_to_keep": np.array(0),
    }
    names = [value.name for value in full.get_outputs()]
    made = dict(zip(names, full.run(names, feeds), strict=True))
    found = cold_logits(made["hidden_states"][0], ColdRows(folder))
    bound = logits_bound(
        transformers.BertForMaskedLM.from_pretrained(model), folder, made["hidden_states"][0]
    )
    cold_ids = folder.vocab.cold_ids
    assert_within(found, made["logits"][0][:, cold_ids], bound[:, cold_ids], rows=1)


@pytest.mark.parametrize("values", [{"bits": 3}, {"bits": 4, "block_size": 48}, {"bits": 4, "block_size": 8}])
def test_unknown_schemes_in_a_manifest_are_refused(values):
    with pytest.raises(MismatchError, match="not known"):
        Quantization.from_dict(values)


def test_a_graph_without_constant_products_is_refused(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 18]>
    net (float[n, 4] x) => (float[n, 4] y) { y = Add(x, x) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "plain.onnx")
    with pytest.raises(UnsupportedModelError, match="nothing to quantise"):
        quantize_graph(tmp_path / "plain.onnx", tmp_path, quantization_of("int4"), has_head=False)


def test_a_product_that_does_more_than_multiply_is_left_alone(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 18]>
    net (float[n, 4] x) => (float[n, 4] y, float[n, 4] z)
    <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
    { y = MatMul(x, w)
      z = Gemm <alpha = 0.5> (x, w) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "two.onnx")
    (tmp_path / "out").mkdir()
    path = quantize_graph(tmp_path / "two.onnx", tmp_path / "out", quantization_of("int8"), has_head=False)
    assert [node.op_type for node in ir.load(path).graph] == ["MatMulNBits", "Gemm"]
    x = np.array([[1, 2, 3, 4]], np.float32)
    y, z = open_graph(path).run(None, {"x": x})
    # The ones of a block may be clipped by one of 128 steps; an activation is off by half of one of 127.
    assert_within(y, x, x / 128 + 4 / 127 / 2 * (1 + 1 / 128), rows=1)
    np.testing.assert_array_equal(z, x / 2)
