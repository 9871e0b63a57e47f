"""Static embeddings (a table alone) against SentenceTransformer.encode in torch."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from safetensors.numpy import save_file

from tests.support.folders import make_vocab
from tests.support.sentence_models import (
    NEW,
    OLD,
    TEXTS,
    V,
    add_modules,
    apart,
    assert_close,
    change_json,
    library,
    save_weights,
    trimmed,
    write_json,
)
from tests.support.tiny_tokenizers import KINDS
from trimserve.errors import UnsupportedModelError
from trimserve.model.resolve import resolve_model
from trimserve_export.inspection import ModelFacts, inspect
from trimserve_export.pipeline import export
from trimserve_export.verify import verify

pytestmark = pytest.mark.export
WIDTH = 12


def static_folder(
    path, *modules, name="embedding.weight", kind=f"{OLD}.StaticEmbedding", inner="0_StaticEmbedding"
):
    """A folder as sentence-transformers saved static embeddings at first, in a folder of their own."""
    add_modules(path, *modules, first=kind)
    modules = (path / "modules.json").read_text().replace('"path": ""', f'"path": "{inner}"', 1)
    (path / "modules.json").write_text(modules)
    (path / inner).mkdir(exist_ok=True)
    KINDS["wordpiece"]().save(str(path / inner / "tokenizer.json"))
    table = np.random.default_rng(1).normal(size=(V, WIDTH)).astype(np.float32)
    save_file({name: table}, path / inner / "model.safetensors")
    return path


def test_a_static_embedding_with_modules_behind_it(tmp_path):
    dense = {"in_features": WIDTH, "out_features": 5, "bias": True}
    source = static_folder(tmp_path / "model", ("Dense", dense), ("Normalize", {}))
    save_weights(source / "1_Dense", linear_weight=(5, WIDTH), linear_bias=(5,))
    write_json(
        source / "config_sentence_transformers.json", {"prompts": {"query": "the cat "}, "truncate_dim": 4}
    )
    encoder, model = trimmed(source, tmp_path / "trimmed"), library(source)
    assert (encoder.max_tokens, encoder.dimension) == (8, 5)  # its tokenizer.json cuts at 8
    assert encoder.stats.texts == 0
    assert_close(encoder.encode(TEXTS), model.encode(TEXTS))
    expected = model.encode(TEXTS, prompt_name="query")
    assert_close(encoder.encode(TEXTS, prompt_name="query"), expected)
    assert apart(encoder.encode(TEXTS), expected) > 1e-3
    assert encoder.stats.cold_tokens > 0
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_in_the_root_without_truncation_and_as_model2vec_names_it(tmp_path):
    kind = f"{NEW}.static_embedding.StaticEmbedding"
    source = static_folder(tmp_path / "model", name="embeddings", kind=kind, inner="")
    cut = trimmed(source, tmp_path / "cut").encode(TEXTS)
    change_json(source / "tokenizer.json", truncation=None)
    encoder, expected = trimmed(source, tmp_path / "trimmed"), library(source).encode(TEXTS)
    assert encoder.max_tokens is None
    assert_close(encoder.encode(TEXTS), expected)
    assert apart(cut, expected) > 1e-3
    assert encoder.encode([""]).tolist() == [[0.0] * WIDTH]


def test_what_such_a_model_has_not_is_refused(tmp_path):
    source = static_folder(tmp_path / "model")
    vocab = make_vocab(range(11), V)
    with pytest.raises(UnsupportedModelError, match="--quantize does not apply"):
        export(source, vocab, tmp_path / "out", quantize="int8")
    tables = {"embeddings": np.zeros((V, 2), np.float32), "mapping": np.zeros(V, np.int64)}
    save_file(tables, source / "0_StaticEmbedding" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="has mapping"):
        export(source, vocab, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "settings", "truncation"),
    [
        ("left", {"truncation_side": "left", "model_max_length": 5}, None),
        ("limit", {"model_max_length": 5}, 0),
        ("split", {"split_special_tokens": True}, None),
        ("cased", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}, None),
        ("own side", {}, {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ],
)
def test_what_stands_beside_its_tokenizer_does_not_count(tmp_path, name, settings, truncation):
    source = static_folder(tmp_path / "model", inner="")
    write_json(source / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    if truncation is not None:
        change_json(source / "tokenizer.json", truncation=truncation or None)
    texts = [*TEXTS, "the cat sat on the mat. A dog sat on the log."]
    encoder = trimmed(source, tmp_path / "trimmed")
    assert_close(encoder.encode(texts), library(source).encode(texts))
    vocab_hash = encoder.folder.manifest.tokenizer_sha256
    assert resolve_model(source).has_tokenizer(vocab_hash), name
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_as_model2vec_saves_it(tmp_path):
    """Its modules.json calls the folder itself ".", its config.json names a class of its own."""
    source = static_folder(tmp_path / "model", ("Normalize", {}), name="embeddings", inner=".")
    write_json(source / "config.json", {"model_type": "model2vec", "architectures": ["StaticModel"]})
    facts = inspect(source, kept=7)
    assert isinstance(facts, ModelFacts)
    assert (facts.vocab_size, facts.hidden_size, facts.architecture) == (V, WIDTH, "StaticModel")
    assert facts.prize.bytes_removed == (V - 7) * WIDTH * 4
    assert_close(trimmed(source, tmp_path / "trimmed").encode(TEXTS), library(source).encode(TEXTS))
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_inspect_without_a_config(tmp_path):
    facts = inspect(static_folder(tmp_path / "model"))
    assert isinstance(facts, ModelFacts)
    assert (facts.architecture, facts.model_type) == ("StaticEmbedding", "StaticEmbedding")
