"""What a sentence-transformers folder may say that the runtime does not do: refused at export, by name."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import save_file

from tests.support.models import save_model
from tests.support.sentence_models import (
    HIDDEN,
    OLD,
    V,
    add_modules,
    change_json,
    copy,
    save_weights,
    write_json,
)
from trimserve.errors import MismatchError, TrimserveError, UnsupportedModelError
from trimserve.folder.sentence import SentenceSettings
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.checkpoint.sentence_config import read_declared, task_of_modules

pytestmark = pytest.mark.export
MEAN = ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": "mean"})
DENSE = {"in_features": HIDDEN, "out_features": 8, "bias": True}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_model("bert_encoder", tmp_path_factory.mktemp("encoder") / "model", rows=V)


@pytest.fixture
def folder(encoder, tmp_path):
    return copy(encoder, tmp_path / "model")


def declared(folder) -> SentenceSettings:
    source = resolve_model(folder)
    found = read_declared(source, task_of_modules(source), None)
    assert found is not None
    return found.settings


def refused(folder, match: str, error: type[TrimserveError] = UnsupportedModelError) -> None:
    with pytest.raises(error, match=match):
        declared(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            f"{OLD}.{name}"
            for name in ("Router", "Asym", "BoW", "CNN", "LSTM", "WordEmbeddings", "WordWeights")
        ),
        f"{OLD}.WeightedLayerPooling",
        "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        "custom.Pooling",
    ],
)
def test_modules(folder, kind):
    refused(add_modules(folder, (kind, {})), rf"a module {kind}")


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (("Pooling", {"pooling_mode": "median"}), "pools by 'median'"),
        (
            ("Pooling", {"pooling_mode": "mean", "window": 3}),
            "has 'window', which trimserve does not know of Pooling",
        ),
        (("Dense", DENSE | {"rank": 4}), "has 'rank', which trimserve does not know of Dense"),
        (("Dense", DENSE | {"activation_function": "my.module.Steep"}), "my.module.Steep"),
        (("Dense", DENSE | {"activation_function": "torch.nn.modules.activation.GLU"}), "activation.GLU"),
        (("LayerNorm", {"dimension": HIDDEN, "eps": 1}), "has 'eps'"),
        (("Dense", DENSE | {"module_input_name": "pooled"}), "reads pooled, which no module before it makes"),
        ((f"{OLD}.SpladePooling", {}), "SpladePooling has to stand right behind a masked language model"),
    ],
)
def test_settings_of_modules(folder, module, match):
    add_modules(folder, MEAN, module)
    save_weights(folder / f"2_{module[0].rpartition('.')[2]}", linear_weight=(8, HIDDEN), linear_bias=(8,))
    refused(folder, match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"processing_kwargs": {"text": {"padding": "max_length"}}}, "'processing_kwargs'"),
        ({"query_length": 32}, "'query_length'"),
        ({"model_args": {"gradient": 1}}, "'gradient'"),
        ({"tokenizer_args": {"truncation_side": "left"}}, "'truncation_side'"),
        ({"transformer_task": "text-generation"}, "'text-generation'"),
        ({"modality_config": {"message": {"method": "forward"}}}, "reads its input as 'message'"),
    ],
)
def test_settings_of_the_transformer(folder, settings, match):
    write_json(add_modules(folder, MEAN) / "sentence_bert_config.json", settings)
    refused(folder, match)


def test_settings_that_change_nothing(folder):
    harmless = {
        "processing_kwargs": {},
        "unpad_inputs": False,
        "model_args": {"attn_implementation": "eager"},
    }
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    harmless |= {"modality_config": {"text": text}, "module_output_name": "token_embeddings"}
    write_json(add_modules(folder, MEAN) / "sentence_bert_config.json", harmless)
    assert declared(folder).max_tokens == 64


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"similarity_fn_name": "jaccard"}, "compares by 'jaccard'"),
        ({"default_prompt_name": "ask"}, "default prompt 'ask'"),
        ({"model_type": "MultiVectorEncoder"}, "is a MultiVectorEncoder"),
        ({"instructions": {}}, "has 'instructions'"),
    ],
)
def test_settings_of_the_folder(folder, config, match):
    write_json(add_modules(folder, MEAN) / "config_sentence_transformers.json", config)
    refused(folder, match)
    write_json(folder / "config_sentence_transformers.json", {"truncate_dim": "8"})
    refused(folder, r"got `str` - at `\$\.truncate_dim`", MismatchError)


def test_what_modules_json_may_not_be(folder):
    add_modules(folder, MEAN)
    modules = json.loads((folder / "modules.json").read_text())
    for change, match, error in (
        (modules[1:], "begins with Pooling", UnsupportedModelError),
        (
            [modules[0], {**modules[1], "path": "../1_Pooling"}],
            "names the file '../1_Pooling'",
            MismatchError,
        ),
        (
            [modules[0], {**modules[1], "kwargs": ["task"]}],
            r"hands the arguments \['task'\]",
            UnsupportedModelError,
        ),
        ([modules[0], {**modules[1], "name": "0"}], "two modules of one name", UnsupportedModelError),
        ([modules[0], {"name": "1"}], "does not hold what it should", MismatchError),
        (modules[:1], "makes no sentence_embedding", UnsupportedModelError),
    ):
        write_json(folder / "modules.json", change)
        refused(folder, match, error)


def test_weights_that_do_not_fit(folder):
    add_modules(folder, MEAN, ("Dense", DENSE))
    refused(folder, "has no model.safetensors", MismatchError)
    save_weights(folder / "2_Dense", linear_weight=(8, HIDDEN))
    refused(folder, "lacks linear.bias", MismatchError)
    save_weights(folder / "2_Dense", linear_weight=(4, HIDDEN), linear_bias=(8,))
    refused(folder, r"linear.weight is \(4, 16\), its config says \(8, 16\)", MismatchError)
    save_file({"linear.weight": np.zeros((8, HIDDEN), np.int8)}, folder / "2_Dense" / "model.safetensors")
    refused(folder, "is I8, expected floats", MismatchError)
    (folder / "2_Dense" / "model.safetensors").unlink()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(folder, "holds more than tensors", MismatchError)
    (folder / "1_Pooling" / "config.json").unlink()
    refused(folder, "config.json is missing", MismatchError)


def test_tokens_of_prompts_are_kept(folder):
    add_modules(folder, MEAN)
    before = structural_ids(resolve_model(folder))
    write_json(
        folder / "config_sentence_transformers.json", {"prompts": {"query": "the latte ", "none": None}}
    )
    source = resolve_model(folder)
    prompt = source.tokenizer().encode("the latte", add_special_tokens=False).ids
    assert set(structural_ids(source)) - set(before) == set(prompt)
    change_json(folder / "config_sentence_transformers.json", prompts={})
    assert len(structural_ids(resolve_model(folder))) == len(before)


@pytest.mark.parametrize("limit", ["x", 0, -1, 6.5])
@pytest.mark.parametrize("nested", [False, True])
def test_a_limit_that_is_no_number(folder, limit, nested):
    add_modules(folder, MEAN)
    config = {"tokenizer_args": {"model_max_length": limit}} if nested else {"max_seq_length": limit}
    write_json(folder / "sentence_bert_config.json", config)
    refused(folder, r"should be a number above 0|at `\$\.(max_seq_length|model_max_length)`", MismatchError)
