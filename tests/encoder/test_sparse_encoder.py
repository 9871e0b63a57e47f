"""Sparse vectors (SPLADE) against SparseEncoder.encode in torch."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from tests.support.models import save_model
from tests.support.sentence_models import (
    TEXTS,
    V,
    add_modules,
    apart,
    assert_close,
    library,
    trimmed,
    write_json,
)
from trimserve.encoder.sparse import keep_largest
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve_export.verify import verify

pytestmark = pytest.mark.export
MLM = "sentence_transformers.sparse_encoder.models.MLMTransformer"
SPLADE = "sentence_transformers.sparse_encoder.models.SpladePooling"


def sparse_folder(path, config, *behind, first=MLM, family="bert"):
    folder = add_modules(save_model(family, path, rows=V), (SPLADE, config), *behind, first=first)
    prompts = {"prompts": {"query": "the cat "}}
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder"} | prompts)
    return folder


def dense(model, texts, **options):
    return model.encode(texts, **options).to_dense().numpy()


@pytest.mark.optimum
def test_vectors_are_the_librarys(tmp_path):
    source = sparse_folder(tmp_path / "model", {"pooling_strategy": "max", "activation_function": "relu"})
    encoder, model = trimmed(source, tmp_path / "trimmed"), library(source, "SparseEncoder")
    expected = dense(model, TEXTS)
    assert expected.shape == (len(TEXTS), V)
    assert (expected[:, encoder.folder.vocab.cold_ids] > 0).any()
    assert_close(encoder.encode(TEXTS, batch_size=3), expected)
    for vector, row in zip(encoder.encode_sparse(TEXTS), expected, strict=True):
        np.testing.assert_array_equal(vector.ids, np.flatnonzero(row > 0))
        np.testing.assert_allclose(vector.weights, row[vector.ids], atol=1e-5)
    assert_close(encoder.encode_query(TEXTS), dense(model, TEXTS, prompt_name="query"))
    assert apart(encoder.encode_query(TEXTS), expected) > 1e-3
    found = model.similarity(model.encode(TEXTS), model.encode(TEXTS[:2])).numpy()  # dot by default
    np.testing.assert_allclose(encoder.similarity(expected, expected[:2]), found, rtol=1e-5)
    assert (encoder.task, encoder.dimension) == ("fill-mask", V)
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_sum_of_the_logarithm_twice_and_todays_names(tmp_path):
    config = {"pooling_strategy": "sum", "activation_function": "log1p_relu", "embedding_dimension": V}
    first = "sentence_transformers.base.modules.transformer.Transformer"
    source = sparse_folder(tmp_path / "model", config, ("Normalize", {}), first=first, family="distilbert")
    write_json(source / "sentence_bert_config.json", {"transformer_task": "fill-mask", "max_seq_length": 9})
    names = ["input_ids", "attention_mask"]
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
    write_json(source / "tokenizer_config.json", tokenizer)
    encoder, model = trimmed(source, tmp_path / "trimmed"), library(source, "SparseEncoder")
    assert encoder.max_tokens == 9
    assert_close(encoder.encode(TEXTS), dense(model, TEXTS))


def test_the_largest_weights():
    weights = np.array([[0.0, 3.0, 1.0, 2.0], [4.0, 0.0, 0.0, 1.0]], np.float32)
    assert keep_largest(weights, 2).tolist() == [[0, 3, 0, 2], [4, 0, 0, 1]]
    assert keep_largest(weights, 9) is weights


def test_cold_rows_are_needed_and_other_ends_refused(tmp_path):
    source = sparse_folder(tmp_path / "model", {})
    with pytest.raises(UsageError, match="leave --no-cold out"):
        trimmed(source, tmp_path / "out", cold=False)
    write_json(source / "1_SpladePooling" / "config.json", {"pooling_strategy": "mean"})
    with pytest.raises(UnsupportedModelError, match="'mean'"):
        trimmed(source, tmp_path / "out")
    add_modules(source, ("sentence_transformers.sparse_encoder.models.SparseAutoEncoder", {}))
    with pytest.raises(UnsupportedModelError, match="SparseAutoEncoder"):
        trimmed(source, tmp_path / "out")
