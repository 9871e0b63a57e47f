"""Adapters are merged as peft merges them; the merged model is what export trims and verify takes."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
import transformers
from safetensors.torch import load_file

from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.cli.main import main
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import read_manifest
from trimserve.model.resolve import resolve_model
from trimserve.vocab.file import save_vocab
from trimserve_export.source.whole import whole_source

pytestmark = pytest.mark.export

V = 37
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("base") / "model", rows=V, dtype=torch.bfloat16)


def save_adapter(base, path, *, model_class="AutoModelForCausalLM", rows=None, config=None, **options):
    """Train nothing: an adapter of random weights, saved by peft; returns what peft's own merge gives."""
    loaded = getattr(transformers, model_class).from_pretrained(base, dtype="auto")
    if rows is not None:
        loaded.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(loaded, config or peft.LoraConfig(**LORA | options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(path)
    return path


def merged_by_peft(base, path, *, model_class="AutoModelForCausalLM", rows=None):
    loaded = getattr(transformers, model_class).from_pretrained(base, dtype="auto")
    if rows is not None:
        loaded.resize_token_embeddings(rows, mean_resizing=False)
    return peft.PeftModel.from_pretrained(loaded, path).merge_and_unload()


def merged_here(base, path, *, model_class="AutoModelForCausalLM"):
    with whole_source(resolve_model(base), adapter=path) as whole:
        return getattr(transformers, model_class).from_pretrained(whole.path, dtype="auto"), whole.config


def assert_same(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, None),
        ({"use_dora": True}, None),
        ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, None),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, V + 3),
    ],
    ids=["lora", "dora", "trained tokens", "added tokens"],
)
def test_merged_as_peft_merges(base, tmp_path, options, rows):
    path = save_adapter(base, tmp_path / "adapter", rows=rows, **options)
    found, config = merged_here(base, path)
    assert_same(found, merged_by_peft(base, path, rows=rows))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    pairs = zip(found.parameters(), plain.parameters(), strict=True)
    assert not all(torch.equal(ours, unadapted) for ours, unadapted in pairs)  # the adapter does something
    if rows is None:
        assert config == json.loads((base / "config.json").read_text())  # the original, byte for byte
    else:
        assert config["vocab_size"] == rows


def test_a_head_of_its_own_unties_a_tied_model(tmp_path):
    base = save_model("llama_tied", tmp_path / "model", rows=V)
    path = save_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    found, _ = merged_here(base, path)
    expected = merged_by_peft(base, path)
    assert not torch.equal(expected.lm_head.weight, expected.model.embed_tokens.weight)
    assert_same(found, expected)


def test_a_classifier_of_the_adapter(tmp_path):
    base = save_model("bert", tmp_path / "model", rows=V)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    path = save_adapter(
        base, tmp_path / "adapter", model_class="AutoModelForSequenceClassification", config=config
    )
    found, _ = merged_here(base, path, model_class="AutoModelForSequenceClassification")
    expected = merged_by_peft(base, path, model_class="AutoModelForSequenceClassification")
    assert torch.equal(found.classifier.weight, expected.classifier.weight)
    query = [model.bert.encoder.layer[0].attention.self.query.weight for model in (found, expected)]
    assert torch.equal(*query)


def test_exported_verified_and_found_again(base, tmp_path, capsys):
    adapter = save_adapter(base, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    save_vocab(make_vocab(range(11), V, sha256_file(base / "tokenizer.json")), tmp_path / "v")
    ways = {"a": [base, "--adapter", adapter], "b": [adapter, "--to", "safetensors"]}
    for name, model in ways.items():
        arguments = ["export", "-m", *model, "-o", tmp_path / name, "--vocab", tmp_path / "v"]
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        source = read_manifest(tmp_path / name).source
        hashes = [
            base / "model.safetensors",
            adapter / "adapter_model.safetensors",
            adapter / "adapter_config.json",
        ]
        assert source.files == {path.name: sha256_file(path) for path in hashes}
        assert main(["verify", str(tmp_path / name)]) == 0, capsys.readouterr().out
    with whole_source(resolve_model(base), adapter=adapter) as whole:
        merged = load_file(whole.path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(merged, load_file(base / "model.safetensors")["lm_head.weight"])
    # Another adapter under the same name is not what the folder was made from.
    save_adapter(base, adapter, r=4)
    assert main(["verify", str(tmp_path / "a")]) == 3
    assert main(["inspect", str(adapter), "--format", "json"]) == 0


def test_a_tokenizer_of_its_own_replaces_the_whole_of_the_base_s(base, tmp_path):
    model = Path(shutil.copytree(base, tmp_path / "base"))
    (model / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["the"]}))
    (model / "chat_template.jinja").write_text("the base's")
    adapter = save_adapter(model, tmp_path / "adapter")
    own = (model / "tokenizer.json").read_text().replace('"lowercase":true', '"lowercase":false')
    with whole_source(resolve_model(model), adapter=adapter) as whole:
        assert "the" in whole.read_json("special_tokens_map.json")["additional_special_tokens"]
        assert (whole.path / "chat_template.jinja").is_file()
    (adapter / "tokenizer.json").write_text(own)
    with whole_source(resolve_model(model), adapter=adapter) as whole:
        assert (whole.path / "tokenizer.json").read_text() == own
        assert not (whole.path / "special_tokens_map.json").exists()
        assert not (whole.path / "chat_template.jinja").exists()


def test_profiling_an_adapter_without_a_tokenizer_names_the_base(base, tmp_path, capsys):
    adapter = save_adapter(base, tmp_path / "adapter")
    (tmp_path / "corpus.txt").write_text("the cat\n")
    words = ["profile", tmp_path / "corpus.txt", "-m", adapter, "-o", tmp_path / "p.safetensors"]
    assert main([str(word) for word in words]) == 2
    assert f"is an adapter without a tokenizer: pass -m {base}" in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    path = save_adapter(base, tmp_path / "prompt", config=prompt)
    with (
        pytest.raises(UnsupportedModelError, match="PROMPT_TUNING adapter"),
        whole_source(resolve_model(path)),
    ):
        pass
    lora = save_adapter(base, tmp_path / "lora")
    other = save_model("llama", tmp_path / "other", rows=V, intermediate_size=40)
    with (
        pytest.raises(MismatchError, match="cannot be merged"),
        whole_source(resolve_model(other), adapter=lora),
    ):
        pass
    wide = save_model("llama", tmp_path / "deep", rows=V, num_hidden_layers=3)
    with (
        pytest.raises(MismatchError, match="missing adapter keys"),
        whole_source(resolve_model(wide), adapter=lora),
    ):
        pass
    with (
        pytest.raises(UsageError, match="an adapter itself"),
        whole_source(resolve_model(lora), adapter=lora),
    ):
        pass
    with pytest.raises(UsageError, match="is no adapter"), whole_source(resolve_model(base), adapter=base):
        pass
    config = other / "adapter_config.json"
    config.write_text("{}")
    shutil.copyfile(lora / "adapter_model.safetensors", other / "adapter_model.safetensors")
    with (
        pytest.raises(MismatchError, match="has no peft_type"),
        whole_source(resolve_model(base), adapter=other),
    ):
        pass
    with pytest.raises(UsageError, match="holds a model and an adapter"), whole_source(resolve_model(other)):
        pass
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "no-such/model"))
    with (
        pytest.raises(UsageError, match=r"adapter of no-such/model.*-m BASE --adapter"),
        whole_source(resolve_model(lora)),
    ):
        pass
