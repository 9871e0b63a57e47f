"""Embeddings of sentence-transformers folders against SentenceTransformer.encode in torch."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import save_model, with_random_weights
from tests.support.sentence_models import (
    HIDDEN,
    NEW,
    TEXTS,
    V,
    add_modules,
    apart,
    assert_close,
    change_json,
    copy,
    library,
    redeclared,
    save_weights,
    trimmed,
    write_json,
)
from tests.support.tiny_tokenizers import KINDS
from trimserve.encoder.activations import ACTIVATIONS, activate
from trimserve.encoder.pooling import pool
from trimserve.errors import UsageError
from trimserve.folder.opening import open_folder
from trimserve_export.pipeline import export
from trimserve_export.verify import verify

pytestmark = pytest.mark.export
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
MEAN = ("Pooling", {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True})
DENSE = {"in_features": HIDDEN, "out_features": 8, "bias": True}
FAR = 1e-3  # a setting that is ignored changes more than this


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model folder that declares nothing, and its trimmed folder."""
    root = tmp_path_factory.mktemp("plain")
    source = save_model("bert_encoder", root / "model", rows=V)
    return source, trimmed(source, root / "trimmed")


@pytest.fixture
def folder(plain, tmp_path):
    """A copy that a test may add files to."""
    return copy(plain[0], tmp_path / "model")


@pytest.fixture
def encoder_of(plain, tmp_path):
    """The trimmed folder with what a copy of its source declares; `name` where a test makes several."""
    return lambda source, name="trimmed": redeclared(source, plain[1].folder.path, tmp_path / name)


def check(folder, encoder, other, **options):
    """Equal to the library, and not equal to an encoder that ignores what the folder declares."""
    expected = library(folder).encode(TEXTS, **options)
    assert_close(encoder.encode(TEXTS, batch_size=4, **options), expected)
    assert apart(other.encode(TEXTS), expected) > FAR


@pytest.mark.parametrize("mode", MODES)
def test_every_pooling_mode(plain, folder, encoder_of, mode):
    keys = {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken"}
    key = keys.get(mode) or f"{mode}_{'token' if mode == 'cls' else 'tokens'}"
    config = {"word_embedding_dimension": HIDDEN, f"pooling_mode_{key}": True}
    add_modules(folder, ("Pooling", config))
    encoder = encoder_of(folder)
    assert_close(encoder.encode(TEXTS), library(folder).encode(TEXTS))
    if mode != "mean":
        check(folder, encoder, plain[1])


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["max", "cls", "weightedmean"]},
        {"pooling_mode": "lasttoken", "pooling_mode_cls_token": True},
    ],
)
def test_several_modes_stand_one_behind_the_other(plain, folder, encoder_of, config):
    add_modules(folder, ("Pooling", {"word_embedding_dimension": HIDDEN} | config))
    check(folder, encoder_of(folder), plain[1])


def test_no_mode_is_the_mean(folder, encoder_of):
    off = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False}
    add_modules(folder, ("Pooling", off))
    assert_close(encoder_of(folder).encode(TEXTS), library(folder).encode(TEXTS))


@pytest.mark.parametrize("mode", [*MODES, ["mean", "cls"]])
def test_a_prompt_that_does_not_count(folder, encoder_of, mode):
    config = {"embedding_dimension": HIDDEN, "pooling_mode": mode, "include_prompt": False}
    add_modules(folder, ("Pooling", config))
    encoder, model = encoder_of(folder), library(folder)
    expected = model.encode(TEXTS, prompt="the dog on ")
    assert_close(encoder.encode(TEXTS, prompt="the dog on ", batch_size=2), expected)
    change_json(folder / "1_Pooling" / "config.json", include_prompt=True)
    counted = encoder_of(folder, "counted").encode(TEXTS, prompt="the dog on ")
    assert mode == "lasttoken" or apart(counted, expected) > FAR


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name):
    values = np.concatenate([np.linspace(-12, 12, 4001), [-100, 100, 0]]).astype(np.float32)
    values = values.reshape(4, -1)
    module = getattr(torch.nn, name)(**({"dim": 1} if name == "Softmax" else {}))
    assert_close(activate(name, values), module(torch.tensor(values)).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"activation_function": "torch.nn.modules.linear.Identity", "bias": False},
        {"activation_function": "torch.nn.modules.activation.GELU"},
    ],
)
def test_dense(plain, folder, encoder_of, config):
    add_modules(folder, MEAN, ("Dense", DENSE | config))
    bias = {"linear_bias": (8,)} if config.get("bias", True) else {}
    save_weights(folder / "2_Dense", linear_weight=(8, HIDDEN), **bias)
    check(folder, encoder_of(folder), plain[1])


def test_dense_of_token_vectors_before_the_pooling(plain, folder, encoder_of):
    config = DENSE | {"module_input_name": "token_embeddings"}
    add_modules(folder, ("Dense", config), ("Pooling", {"embedding_dimension": 8, "pooling_mode": "max"}))
    save_weights(folder / "1_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    encoder = encoder_of(folder)
    assert encoder.dimension == 8
    check(folder, encoder, plain[1])


def test_weights_of_a_dense_in_a_pickle_are_read_as_tensors_alone(folder, encoder_of):
    add_modules(folder, MEAN, ("Dense", DENSE))
    layer = torch.nn.Linear(HIDDEN, 8)
    state = {f"linear.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save(state, folder / "2_Dense" / "pytorch_model.bin")
    assert_close(encoder_of(folder).encode(TEXTS), library(folder).encode(TEXTS))


def test_layer_norm_dropout_and_normalize(plain, folder, encoder_of):
    layers = [("LayerNorm", {"dimension": HIDDEN}), ("Dropout", {"dropout": 0.5}), ("Normalize", {})]
    add_modules(folder, MEAN, *layers)
    save_weights(folder / "2_LayerNorm", norm_weight=(HIDDEN,), norm_bias=(HIDDEN,))
    encoder = encoder_of(folder)
    check(folder, encoder, plain[1])
    longer = encoder.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(
        longer / np.linalg.norm(longer, axis=1, keepdims=True), encoder.encode(TEXTS), atol=1e-6
    )
    assert abs(np.linalg.norm(longer, axis=1) - 1).min() > FAR


def test_prompts(plain, folder, encoder_of):
    add_modules(folder, MEAN)
    prompts = {"question": "the cat ", "document": "a dog ", "empty": ""}
    write_json(
        folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "question"}
    )
    encoder, model = encoder_of(folder), library(folder)
    check(folder, encoder, plain[1])  # the default one
    for options in (
        {"prompt_name": "document"},
        {"prompt_name": "empty"},
        {"prompt": "on mat "},
        {"prompt": ""},
    ):
        expected = model.encode(TEXTS, **options)
        assert_close(encoder.encode(TEXTS, **options), expected)
        assert apart(encoder.encode(TEXTS), expected) > FAR
    assert_close(encoder.encode_query(TEXTS), model.encode_query(TEXTS))
    assert_close(encoder.encode_document(TEXTS), model.encode_document(TEXTS))
    with pytest.raises(
        UsageError, match="no prompt 'nothing': the folder has 'document', 'empty', 'query', 'question'"
    ):
        encoder.encode(TEXTS, prompt_name="nothing")
    with pytest.raises(UsageError, match="leave one of them out"):
        encoder.encode(TEXTS, prompt_name="query", prompt="a")


def test_truncated_embeddings(plain, folder, encoder_of):
    add_modules(folder, MEAN, ("Normalize", {}))
    write_json(folder / "config_sentence_transformers.json", {"truncate_dim": 5})
    encoder, model = encoder_of(folder), library(folder)
    check(folder, encoder, plain[1])
    assert_close(encoder.encode(TEXTS, truncate_dim=3), model.encode(TEXTS, truncate_dim=3))
    unit = model.encode(TEXTS, normalize_embeddings=True)
    assert_close(encoder.encode(TEXTS, normalize=True), unit)
    with pytest.raises(UsageError, match="1 or more"):
        encoder.encode(TEXTS, truncate_dim=0)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(folder, encoder_of, name):
    add_modules(folder, MEAN)
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": name})
    encoder, model = encoder_of(folder), library(folder)
    one, other = encoder.encode(TEXTS), encoder.encode(TEXTS[:3])
    assert_close(encoder.similarity(one, other), model.similarity(one, other).numpy(), atol=2e-5)
    pairwise = model.similarity_pairwise(one[:3], other[::-1].copy()).numpy()
    assert_close(encoder.similarity_pairwise(one[:3], other[::-1]), pairwise, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"],
)
def test_longest_input_in_each_config_that_the_library_reads(plain, folder, encoder_of, name):
    add_modules(folder, MEAN)
    write_json(folder / f"sentence_{name}_config.json", {"max_seq_length": 6, "do_lower_case": False})
    encoder = encoder_of(folder)
    assert encoder.max_tokens == library(folder).max_seq_length == 6
    if name == "roberta":
        check(folder, encoder, plain[1])


@pytest.mark.parametrize(
    ("settings", "tokenizer"),
    [
        ({"max_seq_length": 9, "tokenizer_args": {"model_max_length": 7}}, {}),
        ({"max_seq_length": None}, {"model_max_length": 11}),
        ({}, {"model_max_length": 1000}),
        ({"max_seq_length": None}, {}),
    ],
)
def test_longest_input_falls_back_as_in_the_library(folder, encoder_of, settings, tokenizer):
    add_modules(folder, MEAN)
    write_json(folder / "sentence_bert_config.json", settings)
    write_json(folder / "tokenizer_config.json", tokenizer)
    assert encoder_of(folder).max_tokens == library(folder).max_seq_length


def test_lower_casing_before_the_tokenizer(folder, tmp_path):
    add_modules(folder, MEAN)
    change_json(folder / "tokenizer.json", normalizer=None)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    without = trimmed(folder, tmp_path / "without")
    write_json(folder / "sentence_bert_config.json", {"do_lower_case": True})
    check(folder, trimmed(folder, tmp_path / "trimmed"), without)
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_type_strings_of_the_library_today(plain, folder, encoder_of):
    kinds = (f"{NEW}.pooling.Pooling", f"{NEW}.normalize.Normalize")
    config = {"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": True}
    first = "sentence_transformers.base.modules.transformer.Transformer"
    add_modules(folder, (kinds[0], config), (kinds[1], {}), first=first)
    check(folder, encoder_of(folder), plain[1])


def test_what_the_library_saves_today(plain, folder, encoder_of, tmp_path):
    add_modules(folder, ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": "max"}), ("Dense", DENSE))
    save_weights(folder / "2_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    model = library(folder)
    model.max_seq_length = 7
    model.prompts["query"] = "the "
    model.save(str(tmp_path / "saved"), create_model_card=False)
    encoder = encoder_of(tmp_path / "saved")
    assert encoder.max_tokens == 7
    check(tmp_path / "saved", encoder, plain[1], prompt_name="query")


@pytest.mark.optimum
def test_a_whole_export_in_the_old_layout(tmp_path):
    inner = tmp_path / "model" / "0_Transformer"
    save_model("bert_encoder", inner, rows=V)
    root = add_modules(tmp_path / "model", MEAN, ("Dense", DENSE), ("Normalize", {}))
    modules = json.loads((root / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(root / "modules.json", modules)
    write_json(inner / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": False})
    write_json(root / "config_sentence_transformers.json", {"prompts": {"query": "the "}})
    save_weights(root / "2_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    encoder = trimmed(root, tmp_path / "trimmed")
    assert (encoder.max_tokens, encoder.dimension) == (9, 8)
    model = library(root)
    assert_close(encoder.encode(TEXTS, prompt_name="query"), model.encode(TEXTS, prompt_name="query"))
    cosines = model.similarity_pairwise(model.encode(TEXTS), encoder.encode(TEXTS)).numpy()
    assert cosines.min() > 1 - 1e-6
    assert encoder.stats.cold_tokens > 0
    assert open_folder(tmp_path / "trimmed").manifest.task == "feature-extraction"


def test_a_sentence_model_trained_as_a_masked_language_model_is_an_encoder(tmp_path):
    folder = add_modules(save_model("bert", tmp_path / "model", rows=V), MEAN)
    encoder = trimmed(folder, tmp_path / "trimmed")
    assert encoder.task == "feature-extraction"
    assert_close(encoder.encode(TEXTS), library(folder).encode(TEXTS))


def test_settings_come_back_as_they_were_written(folder, encoder_of):
    add_modules(folder, ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": ["cls", "max"]}))
    settings = encoder_of(folder).settings
    assert type(settings).from_json(settings.to_json(), "x") == settings
    assert settings.modules == (replace(settings.modules[0], modes=("cls", "max")),)


def test_a_text_that_is_all_prompt():
    hidden, mask = np.ones((1, 2, 3), np.float32), np.ones((1, 2), np.int64)
    assert pool(hidden, mask, ("mean", "weightedmean", "lasttoken"), dropped=2).tolist() == [[0.0] * 9]
    assert pool(hidden, mask, ("cls",), dropped=2).tolist() == [[1.0] * 3]


def test_a_folder_for_other_runtimes_loads_in_the_library(folder, tmp_path):
    """Every id is kept, so that the cut tokenizer segments as the original one."""
    pooling = ("Pooling", {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True})
    add_modules(folder, pooling, ("Dense", DENSE), ("Normalize", {}))
    save_weights(folder / "2_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "the "}})
    export(folder, make_vocab(range(V), V), tmp_path / "out", to="safetensors", layout="tokenizer")
    made, model = library(tmp_path / "out"), library(folder)
    assert_close(made.encode(TEXTS, prompt_name="query"), model.encode(TEXTS, prompt_name="query"))
    manifest = open_folder(tmp_path / "out", verify="full").manifest
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= manifest.files.keys()


def test_the_originals_lie_beside_what_the_runtime_reads(folder, tmp_path):
    add_modules(folder, MEAN)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "the "}})
    trimmed(folder, tmp_path / "trimmed")
    for name in ("modules.json", "config_sentence_transformers.json"):
        assert (tmp_path / "trimmed" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_the_encoder_of_an_encoder_decoder(tmp_path, name):
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.T5Config(vocab_size=80, **sizes, **ids)
    folder = tmp_path / "model"
    with_random_weights(getattr(transformers, name)(config), 0).save_pretrained(folder)
    KINDS["unigram"]().save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json", tokenizer | {"model_input_names": ["input_ids", "attention_mask"]}
    )
    dense = DENSE | {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    add_modules(folder, MEAN, ("Dense", dense), ("Normalize", {}))
    save_weights(folder / "2_Dense", linear_weight=(8, HIDDEN))
    assert_close(trimmed(folder, tmp_path / "trimmed").encode(TEXTS), library(folder).encode(TEXTS))
