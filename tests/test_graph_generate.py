"""Folders made of ONNX graphs, through the runtime: exact mode's tokens are the untrimmed graph's."""

import json
import logging
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import onnxruntime as ort
from onnxruntime.quantization import quant_utils

import trimserve
from tests.exports import open_graph
from tests.generators import FullSampler, open_generator
from tests.models import FAMILIES, save_model
from trimserve.errors import MismatchError, UsageError
from trimserve.folder import open_folder
from trimserve.resolving import resolve_model
from trimserve.sampling import SamplingParams
from trimserve.source import load_tokenizer
from trimserve.structural import structural_ids
from trimserve.vocab import Reason, VocabMap
from trimserve_export import export
from trimserve_export.exporters import GraphJob, optimum
from trimserve_export.graph.export import serve_full

pytestmark = pytest.mark.export

TEXTS = ["the cat sat on the mat", "a", "Grüße, Welt! 🎉", "数学 ábc\n\ndef", "dog"]


def save_graph(root, family: str, kind: str, **options):
    """A folder as another tool would leave it: a graph, perhaps quantised, a tokenizer and configs."""
    source = save_model(family, root / "checkpoint", **options)
    graph = optimum.export_checkpoint(source, root / "onnx", GraphJob(FAMILIES[family].task))
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, root / "onnx" / name)
    if kind in ("int4", "uint4"):
        _quantize_blocks(graph, symmetric=kind == "int4")
    elif kind == "qdq":
        _quantize_blocks(graph, symmetric=True, quant_format=quant_utils.QuantFormat.QDQ)
    elif kind in ("int8", "int8_fused"):
        _quantize_dynamic(graph)
    if kind == "int8_fused":
        fuse(graph)
    return resolve_model(root / "onnx")


def _quantize_blocks(graph, *, symmetric: bool, **options):
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        str(graph), block_size=32, is_symmetric=symmetric, **options
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(graph), True)


def _quantize_dynamic(graph):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.load(graph)
    whole = graph.rename(graph.with_name("whole.onnx"))
    quantize_dynamic(whole, graph, weight_type=QuantType.QUInt8)
    whole.unlink()


def fuse(graph):
    """As ONNX Runtime's optimiser stores a graph: integer products and their scales are one operator."""
    whole = graph.rename(graph.with_name("whole.onnx"))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(graph)
    options.log_severity_level = 3
    ort.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    whole.unlink()


def vocab_of(source, others: int = 20) -> VocabMap:
    """The structural ids and a few others."""
    structural = structural_ids(source)
    rest = np.setdiff1d(np.arange(source.vocab_size), structural)
    picked = np.random.default_rng(1).choice(rest, min(others, len(rest) // 2), replace=False)
    kept = np.sort(np.concatenate([structural, picked]))
    reason = np.full(kept.shape, Reason.PROFILE, np.uint8)
    return VocabMap(kept, reason, source.vocab_size, source.tokenizer_sha256)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "fp32"),
        ("llama", "int4"),
        ("llama", "uint4"),
        ("llama", "int8"),
        ("llama", "int8_fused"),
        ("llama", "qdq"),
        ("llama_tied", "int4"),
        ("llama_tied", "int8"),
        ("gemma2", "fp32"),
    ],
)
def test_exact_mode_gives_the_untrimmed_graphs_tokens(tmp_path, family, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    source = save_graph(tmp_path, family, kind, tokenizer="byte_level_bpe", seed=1, **sizes)
    export(source, vocab_of(source), tmp_path / "trimmed")
    (tmp_path / "full").mkdir()
    full = FullSampler(serve_full(source, tmp_path / "full", task=FAMILIES[family].task), source.vocab_size)
    generator = open_generator(tmp_path / "trimmed")
    blocks = family == "llama" and kind in ("int4", "uint4")  # a tied head is a Transpose, which stays
    # Of a tied int8 table ONNX Runtime makes floats, which the cold rows are, too.
    by_graph = kind in ("int8", "int8_fused", "qdq") and family != "llama_tied"
    assert ("cold_head.onnx_data" in generator.folder.manifest.files) == blocks
    assert ("cold_head.onnx_weights" in generator.folder.manifest.files) == by_graph
    cold = 0
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        (result,) = generator.generate(text, max_new_tokens=30)
        assert list(result.ids) == full.run(ids, SamplingParams(), 30, generator.stop_ids)
        cold += int((~generator.folder.vocab.is_kept(np.array(result.ids))).sum())
    assert cold > 0, "no cold token was produced: this test would not see a broken check"


@pytest.mark.parametrize(("family", "kind"), [("bert_encoder", "fp32"), ("bert_encoder", "int8")])
def test_encoder_takes_any_text(tmp_path, family, kind):
    source = save_graph(tmp_path, family, kind, tokenizer="wordpiece")
    export(source, vocab_of(source, 5), tmp_path / "trimmed")
    encoder = trimserve.load(tmp_path / "trimmed")
    (tmp_path / "full").mkdir()
    full = open_graph(serve_full(source, tmp_path / "full", task="feature-extraction"))
    for text, found in zip(TEXTS, [encoder.forward([text])[0] for text in TEXTS], strict=True):
        ids = encoder.codec.encode([text])[0][None].astype(np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
            "cold_rows": np.zeros((1, 16), np.float32),
        }
        (expected,) = full.run(None, feeds)
        np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-5)


def test_drop_in_takes_token_ids(tmp_path):
    source = save_graph(tmp_path, "llama", "fp32", tokenizer="wordpiece")
    vocab = vocab_of(source, 5)
    export(source, vocab, tmp_path / "trimmed", layout="graph")
    ids = np.arange(source.vocab_size)[None, :9]
    mask, positions = np.ones_like(ids), np.arange(9)[None]
    empty = {
        f"past_key_values.{n}.{kind}": np.zeros((1, 1, 0, 8), np.float32)
        for n in (0, 1)
        for kind in ("key", "value")
    }
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | empty
    full = open_graph(source.graph).run(["logits"], feeds)[0]
    found = open_graph(tmp_path / "trimmed" / "model.onnx").run(["logits"], feeds)[0]
    np.testing.assert_array_equal(found[..., vocab.kept_ids], full[..., vocab.kept_ids])
    assert np.isneginf(found[..., vocab.cold_ids]).all()


def test_cut_tokenizer_beside_a_quantised_graph(tmp_path):
    source = save_graph(tmp_path, "llama", "int4", tokenizer="byte_level_bpe", hidden_size=64)
    export(source, vocab_of(source), tmp_path / "trimmed", layout="tokenizer")
    kept = open_folder(tmp_path / "trimmed").vocab
    config = json.loads((tmp_path / "trimmed" / "config.json").read_text("utf-8"))
    old = source.config
    assert config["vocab_size"] == len(kept)
    assert config["eos_token_id"] == kept.to_compact([old["eos_token_id"]])[0]
    tokenizer = load_tokenizer(tmp_path / "trimmed" / "tokenizer.json")
    assert tokenizer.get_vocab_size() == len(kept)
    ids = np.array([tokenizer.encode(TEXTS[0]).ids])
    feeds = {"attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]} | {
        f"past_key_values.{n}.{kind}": np.zeros((1, 1, 0, 32), np.float32)
        for n in (0, 1)
        for kind in ("key", "value")
    }
    found = open_graph(tmp_path / "trimmed" / "model.onnx").run(["logits"], feeds | {"input_ids": ids})[0]
    original = kept.to_original(ids).astype(np.int64)
    full = open_graph(source.graph).run(["logits"], feeds | {"input_ids": original})[0]
    np.testing.assert_allclose(found, full[..., kept.kept_ids], rtol=1e-5, atol=1e-5)


def test_options_of_checkpoints_are_refused(tmp_path):
    source = save_graph(tmp_path, "llama", "fp32", tokenizer="wordpiece")
    vocab = vocab_of(source, 5)
    for options in ({"to": "safetensors"}, {"quantize": "int4"}, {"dtype": "fp16"}, {"exporter": "optimum"}):
        with pytest.raises(UsageError, match=r"is an ONNX graph.*(leave|needs a checkpoint)"):
            export(source, vocab, tmp_path / "trimmed", **options)
    other = VocabMap(vocab.kept_ids, vocab.reason, source.vocab_size + 3)
    with pytest.raises(MismatchError, match="selected for"):
        export(source, other, tmp_path / "trimmed")
    assert not (tmp_path / "trimmed").exists()
