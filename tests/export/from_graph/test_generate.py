"""Folders made of ONNX graphs, through the runtime: exact mode's tokens are the untrimmed graph's."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import trimserve
from tests.support.exports import open_graph
from tests.support.generators import FullSampler, open_generator
from tests.support.graph_folders import TEXTS, save_graph, vocab_of
from tests.support.models import FAMILIES
from tests.support.rounding import assert_within
from trimserve.decoding.sampling import SamplingParams
from trimserve.errors import MismatchError, UsageError
from trimserve.folder.opening import open_folder
from trimserve.text.tokenizer import load_tokenizer
from trimserve.vocab.map import VocabMap
from trimserve_export import export
from trimserve_export.from_graph.trimmed import serve_full

pytestmark = [pytest.mark.export, pytest.mark.optimum]


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
        np.testing.assert_array_equal(found, expected[0])


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
    (tmp_path / "full").mkdir()
    served = serve_full(source, tmp_path / "full", task=FAMILIES["llama"].task)
    bound = FullSampler(served, source.vocab_size).rounding(original[0])
    assert_within(found, full[..., kept.kept_ids], bound, rows=-1)


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
