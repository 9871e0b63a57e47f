"""What cannot be trimmed is refused by export and inspect before any work; names of wrappers come off."""

import json
import shutil

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.folders import make_vocab
from tests.support.graphs import sketch
from tests.support.models import save_model
from trimserve.cli.main import main
from trimserve.files.hashes import sha256_file
from trimserve.model.resolve import resolve_model
from trimserve.vocab.file import save_vocab
from trimserve_export.source.whole import whole_source

pytestmark = pytest.mark.export

V = 37


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("clean") / "model", rows=V, max_shard_size="5KB")


def as_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_quantised(folder):
    change_config(folder, quantization_config={"quant_method": "hqq", "bits": 4})


def as_vision(folder):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}), "utf-8"
    )


def without_type(folder):
    change_config(folder, model_type=None)


def as_subfolder(folder):
    (folder / "last").mkdir()
    (folder / "model.safetensors").rename(folder / "last" / "model.safetensors")


def as_fixed_graph(folder):
    import onnx_ir as ir

    (folder / "model.safetensors").unlink()
    ir.save(sketch("plain", "matmul").model(inputs="int64[1, 8] input_ids"), folder / "model.onnx")


def as_adapter_without_base(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}), "utf-8")


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | entries), "utf-8")


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (as_pickle, 1, "is a pickle"),
        (as_quantised, 1, "is quantised by HQQ (4 bits)"),
        (as_vision, 1, "has no vocab_size"),
        (without_type, 1, "config.json has no model_type"),
        (as_subfolder, 2, "they are in last: pass"),
        (as_fixed_graph, 1, "takes one shape of input alone"),
        (as_adapter_without_base, 2, "-m BASE --adapter"),
    ],
)
def test_refused_by_both_commands_before_any_work(tmp_path, capsys, change, code, match):
    model = save_model("bert", tmp_path / "model", rows=V)
    change(model)
    capsys.readouterr()
    # There is no such corpus: the model is refused before it is looked for.
    export = ["export", "-m", str(model), "-o", str(tmp_path / "out"), "--corpus", "no-such-corpus.txt"]
    for arguments in (export, ["inspect", str(model)]):
        assert main(arguments) == code
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert match in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def wrapped(clean, folder, rename):
    shutil.copytree(clean, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    for name in set(index["weight_map"].values()):
        tensors = {rename(key): tensor for key, tensor in load_file(folder / name).items()}
        save_file(tensors, folder / name, {"format": "pt"})
    index["weight_map"] = {rename(key): name for key, name in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}".replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "parallel", "mixed"],
)
def test_names_of_wrappers_are_taken_off(clean, tmp_path, capsys, rename):
    model = wrapped(clean, tmp_path / "model", rename)
    kept = list(range(0, V, 2))
    save_vocab(make_vocab(kept, V, sha256_file(model / "tokenizer.json")), tmp_path / "v")
    arguments = ["-m", str(model), "-o", str(tmp_path / "out"), "--vocab", str(tmp_path / "v")]
    assert main(["export", *arguments, "--to", "safetensors"]) == 0, capsys.readouterr().err
    assert main(["inspect", str(model), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["vocab_tensors"][0]["role"] == "embedding"
    expected = AutoModelForCausalLM.from_pretrained(clean)
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in expected.state_dict().items():
        rows = tensor[kept] if len(tensor) == V else tensor
        assert torch.equal(found.state_dict()[name], rows), name
    # What verify loads has the names that transformers knows, and is recorded by the user's own files.
    with whole_source(resolve_model(model), renamed=True) as whole:
        again = AutoModelForCausalLM.from_pretrained(whole.path)
        assert {path.parent for path in whole.recorded_files} == {model}
        assert all(torch.equal(*pair) for pair in zip(again.parameters(), expected.parameters(), strict=True))
    assert main(["verify", str(tmp_path / "out")]) == 0, capsys.readouterr().out
