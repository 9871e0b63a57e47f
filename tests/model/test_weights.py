"""Folders without readable weights: the message names what is there instead, and what to do."""

import json

import pytest

from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.tensors import exhaust, write_tensors
from trimserve.model.source import ModelSource

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000000\n"


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            exhaust(write_tensors(path, {}))
        else:
            path.write_bytes(b"{}")
    return ModelSource("a-model", None, folder)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["pytorch_model.bin"], r"pytorch_model\.bin is a pickle"),
        (["consolidated.00.pth"], r"consolidated\.00\.pth is a pickle"),
        (["last.ckpt"], r"last\.ckpt is a pickle"),
        (["model-q4_k_m.gguf"], r"is GGUF.*pass -m .*model-q4_k_m\.gguf, the file itself"),
        (["tf_model.h5"], "a TensorFlow model"),
        (["model.ckpt.index"], "a TensorFlow model"),
        (["flax_model.msgpack"], "a Flax checkpoint"),
        (["__0_0.distcp"], "accelerate merge-weights"),
        (["openvino_model.xml"], "of another library"),
        (["weights.safetensors"], r"has weights\.safetensors but neither.*rename it to model\.safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], r"index\.json as well"),
        (["config.json"], r"has no weights: expected model\.safetensors"),
    ],
)
def test_what_a_folder_has_instead(tmp_path, names, match):
    with pytest.raises((UnsupportedModelError, UsageError), match=match) as error:
        _ = fill(tmp_path, *names).weight_files
    assert str(error.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["model/model.safetensors"], r"they are in model: pass .*/model\.$"),
        (
            ["checkpoint-500/model.safetensors", "checkpoint-900/model.safetensors"],
            r"in checkpoint-900 .also in",
        ),
        (["onnx/fp16/model.onnx"], r"they are in onnx/fp16: pass"),
        (
            ["training_args.bin", "checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors"],
            "in checkpoint-5:",
        ),
        (["original/consolidated.pth"], r"they are in original: pass"),
        (["a/x.bin", "b/model.safetensors.index.json"], "they are in b: pass"),
        (
            ["m/model.safetensors", "config.json", "tokenizer.json"],
            r"with config\.json and tokenizer\.json of .*copied",
        ),
    ],
)
def test_weights_in_a_subfolder_are_found(tmp_path, names, match):
    with pytest.raises(UsageError, match=match):
        _ = fill(tmp_path, *names).weight_files


def test_shards_that_are_missing(tmp_path):
    source = fill(tmp_path, "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(
        UsageError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json lists"
    ):
        _ = source.weight_files


@pytest.mark.parametrize(
    ("content", "match"), [(POINTER, "is a Git LFS pointer.*git lfs pull"), (b"", "is empty")]
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_by_name_alone(tmp_path, name, content, match):
    source = fill(tmp_path, "model.safetensors", "config.json", "tokenizer.json")
    (tmp_path / name).write_bytes(content)
    read = {
        "model.safetensors": lambda: source.headers,
        "config.json": lambda: source.config,
        "tokenizer.json": source.tokenizer,
    }[name]
    with pytest.raises(MismatchError, match=f"{name} {match}"):
        read()
