"""Pairs of texts against CrossEncoder.predict and .rank in torch."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

import torch
import transformers

from tests.support.models import save_model
from tests.support.sentence_models import (
    HIDDEN,
    PAIRS,
    V,
    add_modules,
    apart,
    assert_close,
    change_json,
    copy,
    encoder_folder,
    library,
    redeclared,
    save_weights,
    trimmed,
    write_json,
)
from tests.support.tiny_tokenizers import CHAT_TEMPLATE
from trimserve.errors import UnsupportedModelError, UsageError

pytestmark = pytest.mark.export
FAR = 1e-3


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    """A classifier of one label, and its trimmed folder; its tokenizer tells the texts of a pair apart."""
    root = tmp_path_factory.mktemp("reranker")
    source = save_model("bert_classifier", root / "model", rows=V, num_labels=1)
    # transformers 5 takes no class for it from config.json, as 4 does.
    names = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(source / "tokenizer_config.json", {"model_input_names": names})
    return source, trimmed(source, root / "trimmed")


@pytest.fixture
def folder(reranker, tmp_path):
    return copy(reranker[0], tmp_path / "model")


@pytest.fixture
def encoder_of(reranker, tmp_path):
    return lambda source, name="trimmed": redeclared(source, reranker[1].folder.path, tmp_path / name)


@pytest.mark.optimum
def test_scores_of_pairs(reranker):
    source, encoder = reranker
    model = library(source, "CrossEncoder")
    expected = model.predict(PAIRS)
    assert_close(encoder.predict(PAIRS, batch_size=3), expected)
    assert_close(encoder.predict([list(pair) for pair in PAIRS]), expected)
    assert_close(encoder.predict(PAIRS[0]), model.predict(PAIRS[0]))
    assert encoder.predict([]).shape == (0,)
    assert encoder.stats.cold_tokens > 0


def test_logits_of_pairs_are_the_models(reranker):
    source, encoder = reranker
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for pair in PAIRS:
        with torch.no_grad():
            fed = tokenizer(*pair, return_tensors="pt", truncation="longest_first", max_length=64)
            expected = model(**fed).logits[0].numpy()
        assert_close(encoder.forward([pair])[0], expected)
        fed["token_type_ids"] = torch.zeros_like(fed["input_ids"])
        with torch.no_grad():  # segments count
            assert apart(model(**fed).logits[0].numpy(), expected) > FAR


def test_ranking(reranker):
    source, encoder = reranker
    documents = [second for _, second in PAIRS]
    expected = library(source, "CrossEncoder").rank("the cat", documents, return_documents=True)
    found = encoder.rank("the cat", documents, return_documents=True)
    assert [entry["corpus_id"] for entry in found] == [entry["corpus_id"] for entry in expected]
    assert [entry["text"] for entry in found] == [entry["text"] for entry in expected]
    np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in expected], atol=1e-5)
    assert len(encoder.rank("the cat", documents, top_k=2)) == 2
    assert encoder.rank("the cat", []) == []


@pytest.mark.parametrize("limit", [9, 12])
def test_the_longer_text_of_a_pair_is_cut_first(reranker, folder, encoder_of, limit):
    write_json(folder / "tokenizer_config.json", {"model_max_length": limit})
    add_modules(folder)
    write_json(folder / "sentence_bert_config.json", {"transformer_task": "sequence-classification"})
    write_json(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    encoder, expected = encoder_of(folder), library(folder, "CrossEncoder").predict(PAIRS)
    assert encoder.max_tokens == limit
    assert_close(encoder.predict(PAIRS), expected)
    assert apart(reranker[1].predict(PAIRS), expected) > FAR


@pytest.mark.parametrize(
    "config",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
        {
            "sentence_transformers": {"version": "4.1"},
            "sbert_ce_default_activation_function": "torch.nn.Tanh",
        },
    ],
)
def test_activations_that_config_json_names(reranker, folder, encoder_of, config):
    change_json(folder / "config.json", **config)
    expected = library(folder, "CrossEncoder").predict(PAIRS)
    assert_close(encoder_of(folder).predict(PAIRS), expected)
    assert apart(reranker[1].predict(PAIRS), expected) > FAR


def test_prompts_and_activation_of_todays_folders(folder, encoder_of):
    add_modules(folder, first="sentence_transformers.base.modules.transformer.Transformer")
    text = {"method": "forward", "method_output_name": "logits"}
    settings = {"modality_config": {"text": text}, "module_output_name": "scores"}
    write_json(
        folder / "sentence_bert_config.json", settings | {"transformer_task": "sequence-classification"}
    )
    config = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    config |= {"prompts": {"ask": "the dog "}, "default_prompt_name": "ask"}
    write_json(folder / "config_sentence_transformers.json", config)
    encoder, model = encoder_of(folder), library(folder, "CrossEncoder")
    expected = model.predict(PAIRS)
    assert_close(encoder.predict(PAIRS), expected)
    assert apart(encoder.predict(PAIRS, prompt=""), expected) > FAR
    assert_close(encoder.predict(PAIRS, prompt="a "), model.predict(PAIRS, prompt="a "))


def test_several_labels(tmp_path):
    source = save_model("bert_classifier", tmp_path / "model", rows=V, num_labels=3)
    encoder, model = trimmed(source, tmp_path / "trimmed"), library(source, "CrossEncoder")
    expected = model.predict(PAIRS)
    assert_close(encoder.predict(PAIRS), expected)
    assert_close(encoder.predict(PAIRS, apply_softmax=True), model.predict(PAIRS, apply_softmax=True))
    with pytest.raises(UsageError, match="scores 3 labels: call predict"):
        encoder.rank("the cat", ["a dog"])


def test_scores_from_modules_behind_an_encoder(tmp_path):
    dense = {"in_features": HIDDEN, "out_features": 1, "bias": True, "module_output_name": "scores"}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    pooling = ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": "cls"})
    source = encoder_folder(tmp_path / "model", pooling, ("Dense", dense))
    save_weights(source / "2_Dense", linear_weight=(1, HIDDEN), linear_bias=(1,))
    write_json(source / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    encoder, model = trimmed(source, tmp_path / "trimmed"), library(source, "CrossEncoder")
    assert_close(encoder.predict(PAIRS), model.predict(PAIRS))
    with pytest.raises(UsageError, match="scores no pairs"):
        trimmed(encoder_folder(tmp_path / "other", pooling), tmp_path / "embeds").predict(PAIRS)


def test_type_ids_that_the_tokenizers_class_drops(reranker, folder, encoder_of):
    write_json(folder / "tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]})
    expected = library(folder, "CrossEncoder").predict(PAIRS)
    assert_close(encoder_of(folder).predict(PAIRS), expected)
    assert apart(reranker[1].predict(PAIRS), expected) > FAR


def test_pairs_that_the_library_would_write_as_a_chat(folder, encoder_of):
    write_json(folder / "tokenizer_config.json", {"chat_template": CHAT_TEMPLATE})
    with pytest.raises(UsageError, match="has a chat template"):
        encoder_of(folder).predict(PAIRS)


@pytest.mark.parametrize("name", ["trained.activations.Steep", "torch.nn.Threshold", "torch.relu"])
def test_an_unknown_activation_is_refused_by_name(folder, encoder_of, name):
    change_json(folder / "config.json", sentence_transformers={"activation_fn": name})
    with pytest.raises(UnsupportedModelError, match=name):
        encoder_of(folder)


def test_what_is_no_pair(reranker):
    for pairs in (["the cat", "sat", "on"], [("a",)], [("a", 1)]):
        with pytest.raises(UsageError, match=r"expected a pair of texts|pairs should be \(a text, a text\)"):
            reranker[1].predict(pairs)
    assert json.loads(reranker[1].settings.to_json())["activation"] == "Sigmoid"
