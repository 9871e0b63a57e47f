"""inspect: models and their prize, trimmed folders, ONNX files."""

import dataclasses
import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from tests.support.folders import make_folder
from tests.support.graphs import sketch
from tests.support.models import save_model
from trimserve.cli.main import main
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve_export.inspection import ModelFacts, OnnxFacts, TrimmedFacts, inspect, prize

pytestmark = pytest.mark.export

V, H = 37, 16


def test_untied_model(tmp_path):
    facts = inspect(save_model("llama", tmp_path / "model", rows=V), kept=11)
    assert isinstance(facts, ModelFacts)
    assert (facts.vocab_size, facts.hidden_size, facts.tied) == (V, H, False)
    assert [(t.name, t.role, t.shape, t.bytes) for t in facts.vocab_tensors] == [
        ("model.embed_tokens.weight", "embedding", (V, H), V * H * 4),
        ("lm_head.weight", "head", (V, H), V * H * 4),
    ]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    total = sum(tensor.nbytes for tensor in weights.values())
    matrix, body = V * H * 4, total - 2 * V * H * 4
    assert facts.weight_bytes == total
    assert facts.prize.vocab_share == pytest.approx(2 * matrix / total)
    assert facts.prize.bytes_removed == round(2 * matrix * (1 - 11 / V))
    # A token reads one row of the embedding, but all of the head.
    assert facts.prize.decode_ratio == pytest.approx((body + matrix) / (body + matrix * 11 / V))


def test_tied_model_with_a_stored_copy(tmp_path):
    source = save_model("qwen3", tmp_path / "model", rows=41, dtype=torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    facts = inspect(source)
    assert {tensor.name: tensor.role for tensor in facts.vocab_tensors} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "copy",
    }
    assert facts.tied
    assert facts.weight_bytes == sum(t.nbytes for name, t in weights.items() if name != "lm_head.weight")
    assert (facts.vocab_size, facts.tokenizer_size) == (41, V)
    assert facts.prize.kept == 41  # K never exceeds V
    assert facts.prize.decode_ratio == 1


def test_encoder_has_no_decode_ratio(tmp_path):
    facts = inspect(save_model("bert_encoder", tmp_path / "model", rows=V), kept=11)
    assert facts.prize.decode_ratio is None
    assert 0 < facts.prize.vocab_share < 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "bert", "bert_encoder", "roberta"])
def test_headers_tell_what_the_class_tells(tmp_path, monkeypatch, family):
    """As where torch is not installed; but nothing there knows whether the model can be exported."""
    source = save_model(family, tmp_path / "model", rows=41)
    by_class = inspect(source, kept=11)
    monkeypatch.setattr("trimserve_export.inspection._HEAVY", ("no_such_package",))
    by_headers = inspect(source, kept=11)
    assert by_headers.told_by == "headers"

    def plain(facts):
        tensors = sorted(facts.vocab_tensors, key=lambda tensor: tensor.name)
        return dataclasses.replace(facts, vocab_tensors=tuple(tensors), told_by="")

    assert plain(by_headers) == plain(by_class)


def test_headers_alone_need_no_torch(tmp_path):
    save_model("llama", tmp_path / "model", rows=V)
    script = (
        "import sys; from trimserve_export import inspection; inspection._HEAVY = ('no_such_package',);"
        "from trimserve.cli.main import main; code = main(['inspect', sys.argv[1]]);"
        "assert not {'torch', 'transformers', 'onnx_ir'} & sys.modules.keys(); sys.exit(code)"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "model")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.embed_tokens.weight" in done.stdout
    assert "By names and shapes in the files" in done.stdout


def test_prize_of_a_model_that_is_all_vocab():
    assert prize((), 100, 10, 5, tied=False).vocab_share == 0


def test_trimmed_folder_is_read_without_torch(tmp_path):
    make_folder(tmp_path / "out", [1, 2, 30], V)
    facts = inspect(tmp_path / "out")
    assert isinstance(facts, TrimmedFacts)
    assert (facts.kept, facts.vocab_size, facts.cold_bytes, facts.verified) == (3, V, 0, None)
    script = (
        "import sys; from trimserve.cli.main import main;"
        "code = main(['inspect', sys.argv[1], '--format', 'json']);"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["kind"] == "trimmed"


def write_graph(path):
    made = sketch("plain", "matmul")
    ir.save(made.model(), path)
    return path.stat().st_size


def test_onnx_files(tmp_path):
    size = write_graph(tmp_path / "model.onnx")
    (tmp_path / "model.onnx_data").write_bytes(b"123")
    for path in (tmp_path, tmp_path / "model.onnx"):
        facts = inspect(path)
        assert isinstance(facts, OnnxFacts)
        assert facts.bytes == size + 3


def test_paths_that_are_nothing_known(tmp_path):
    with pytest.raises(UsageError, match="has no weights"):
        inspect(tmp_path)
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        inspect("no/such/folder/here")


def test_pickled_weights_are_refused(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="is a pickle"):
        inspect(source)


def test_command_prints_a_table_or_json(tmp_path, capsys):
    source = save_model("llama", tmp_path / "model", rows=V)
    assert main(["inspect", str(source), "--kept", "11"]) == 0
    text = capsys.readouterr().out
    assert "model.embed_tokens.weight" in text
    assert "at K = 11" in text
    assert main(["inspect", str(source), "--kept", "11", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "model"
    assert document["prize"]["kept"] == 11
    assert document["vocab_tensors"][1]["role"] == "head"


def test_command_on_a_trimmed_folder_and_an_onnx_file(tmp_path, capsys):
    make_folder(tmp_path / "out", [1, 2, 30], V)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "3 of 37 (8.11 %)" in capsys.readouterr().out
    write_graph(tmp_path / "model.onnx")
    assert main(["inspect", str(tmp_path / "model.onnx")]) == 0
    assert "trims it as it is" in capsys.readouterr().out


def test_command_refuses_nonsense(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "has no weights" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--kept", "0"]) == 2
