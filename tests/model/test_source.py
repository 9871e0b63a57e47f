import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.tiny_tokenizers import save_model_folder
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.folder.manifest import Source
from trimserve.model.resolve import resolve_model, resolve_source
from trimserve.model.source import ModelSource
from trimserve.text.tokenizer import load_tokenizer

V, H = 37, 8


def write_weights(path, tensors, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    save_file({key: np.zeros(shape, np.float16) for key, shape in tensors.items()}, path / name)


def test_folder_is_taken_as_it_is(model_folder):
    source = resolve_model(model_folder)
    assert (source.name, source.revision, source.path) == (str(model_folder), None, model_folder)
    assert resolve_model(source) is source


def test_vocab_size_counts_padding_rows_of_the_config(model_folders):
    source = resolve_model(model_folders["byte_level_bpe"])
    assert source.vocab_size == source.tokenizer().get_vocab_size() + 7


@pytest.mark.parametrize("nested", ["text_config", "decoder"])
def test_vocab_size_of_a_composite_config(tmp_path, nested):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", nested: {"vocab_size": V}}))
    assert resolve_model(tmp_path).vocab_size == V


def test_vocab_size_from_the_weights_then_from_the_tokenizer(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path)
    (folder / "config.json").unlink()
    assert resolve_model(folder).vocab_size == 37
    write_weights(folder, {"model.norm.weight": (H,), "model.embed_tokens.weight": (41, H)})
    assert resolve_model(folder).vocab_size == 41


def test_a_local_folder_has_no_revisions(model_folders):
    with pytest.raises(UsageError, match="leave --revision out"):
        resolve_model(model_folders["wordpiece"], revision="main")


@pytest.mark.usefixtures("hub")
def test_what_a_folder_was_made_from_may_lie_elsewhere(model_folders):
    made_from = Source("owner/model", "v1", {})
    assert resolve_source(made_from).revision == "v1"
    assert resolve_source(made_from, revision="v2").revision == "v2"
    local = resolve_source(made_from, model_folders["wordpiece"])
    assert (local.path, local.revision) == (model_folders["wordpiece"], None)


def test_tokenizer_neither_cuts_nor_pads(model_folders):
    # The saved WordPiece tokenizer cuts and pads to 8 tokens, as all-MiniLM's does to 128.
    tokenizer = resolve_model(model_folders["wordpiece"]).tokenizer()
    assert len(tokenizer.encode("the cat").ids) == 4
    assert len(tokenizer.encode("the cat " * 20).ids) == 42


def test_widths_and_row_bytes_come_from_headers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": V}))
    write_weights(
        tmp_path,
        {"wte.weight": (V, H), "lm_head.weight": (V, H), "mlp.weight": (24, H), "norm.weight": (11,)},
    )
    source = resolve_model(tmp_path)
    assert source.linear_widths() == {H, 24}
    assert source.row_bytes() == 2 * H * 2  # two matrices of float16


def test_a_tied_head_stored_twice_costs_one_row(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": V, "tie_word_embeddings": True}))
    write_weights(tmp_path, {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H)})
    assert resolve_model(tmp_path).row_bytes() == H * 2


def test_without_weights_widths_come_from_the_config(tmp_path):
    config = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 24, "head_dim": 4}
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = resolve_model(tmp_path)
    assert source.linear_widths() == {8, 24, 4, 12}
    assert source.row_bytes() == 0


def test_shards_are_those_of_the_index(tmp_path):
    write_weights(tmp_path, {"a.weight": (V, H)}, "model-00002-of-00002.safetensors")
    write_weights(tmp_path, {"b.weight": (4, H)}, "model-00001-of-00002.safetensors")
    write_weights(tmp_path, {"c.weight": (4, H)}, "consolidated.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a.weight": names[1], "b.weight": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in resolve_model(tmp_path).weight_files] == names
    (tmp_path / names[0]).unlink()
    with pytest.raises(UsageError, match=names[0]):
        _ = resolve_model(tmp_path).weight_files


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", ""])
def test_index_cannot_lead_out_of_the_folder(tmp_path, name):
    index = {"weight_map": {"a.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MismatchError, match="plain name"):
        _ = resolve_model(tmp_path).weight_files


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        _ = resolve_model(tmp_path).weight_files


def test_missing_weights_and_tokenizer_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        _ = resolve_model(tmp_path).weight_files
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        _ = resolve_model(tmp_path).tokenizer_sha256


@pytest.mark.parametrize("content", ["{", "[1]", "\ufeff{}x"])
def test_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(MismatchError, match=r"config\.json"):
        _ = resolve_model(tmp_path).config


def test_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(MismatchError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "a b"])
def test_a_name_that_is_no_folder_and_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        resolve_model(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is a file"):
        resolve_model(tmp_path / "tokenizer.json")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for huggingface_hub that records what is asked of it."""
    module = types.ModuleType("huggingface_hub")
    module.calls = []
    module.answer = None

    def snapshot_download(name, *, revision, allow_patterns):
        module.calls.append((name, revision, allow_patterns))
        if isinstance(module.answer, Exception):
            raise module.answer
        return str(module.answer)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hub_id_is_fetched_without_pickle_or_code(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.answer = tmp_path
    source = resolve_model("owner/model", revision="v1", weights=False)
    assert source == ModelSource("owner/model", "v1", tmp_path)
    resolve_model("gpt2")
    (_, revision, small), (_, _, whole) = hub.calls
    assert revision == "v1"
    assert "*.safetensors" in whole
    assert "*.safetensors" not in small
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in whole)


def test_unreachable_hub_is_one_sentence(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.answer = OSError("Cannot reach the hub\nsecond line")
    with pytest.raises(UsageError, match=r"owner/model.*Cannot reach the hub\)") as caught:
        resolve_model("owner/model")
    assert "\n" not in str(caught.value)


@pytest.mark.realdata
def test_real_checkpoint(data_dir):
    source = resolve_model(data_dir / "models" / "multidomain-qwen2")
    assert source.vocab_size == 151_936
    assert source.row_bytes() == 256 * 2  # bfloat16, tied
    assert source.linear_widths() == {128, 256, 768}


@pytest.mark.parametrize(
    "model",
    [
        {"decoder": {"filename": "/etc/passwd"}},
        {"decoder": {"filename": "../model.onnx"}},
        {"encoder": {"filename": "..\\model.onnx"}},
        {"decoder": {"pipeline": [{"part": {"filename": "a/../../b.onnx"}}]}},
    ],
)
def test_files_that_genai_config_names_stay_in_the_folder(tmp_path, model):
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(MismatchError, match=r"genai_config\.json names the file .* not a plain name"):
        _ = resolve_model(tmp_path).graph


def test_modules_and_index_stay_in_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", str(tmp_path / "secret"), "link"):
        (folder / "modules.json").write_text(json.dumps([{"path": path, "type": "a.Transformer"}]))
        with pytest.raises(MismatchError, match=r"not a plain name|a link out of the folder"):
            resolve_model(folder)
    (folder / "modules.json").unlink()
    (tmp_path / "secret" / "w.safetensors").write_bytes(b"")
    (folder / "w.safetensors").symlink_to(tmp_path / "secret" / "w.safetensors")
    index = {"weight_map": {"a": "w.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # A link to a file is that file.
    assert resolve_model(folder).weight_files == (folder / "w.safetensors",)
