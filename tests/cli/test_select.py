"""select on the command line: names, floors, dry runs."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.rounding import FLOAT64, gamma
from tests.support.tiny_tokenizers import save_model_folder
from trimserve.cli.main import main
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profiling import profile
from trimserve.text.dead_ids import dead_ids
from trimserve.vocab.file import load_vocab


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied generator's folder of 1,000 x 8 rows, most of them padding, and two profiles of it."""
    root = tmp_path_factory.mktemp("select")
    model = save_model_folder(
        "byte_level_bpe", root / "model", vocab_size=1000, architectures=["LlamaForCausalLM"]
    )
    matrices = {"model.embed_tokens.weight": (1000, 8), "model.norm.weight": (500,)}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in matrices.items()}, model / "model.safetensors"
    )
    profile((), model, texts=["the cat sat on the mat."] * 5).save(root / "cats")
    profile((), model, texts=["the dog sat on the latte!"]).save(root / "dogs")
    return root


@pytest.fixture
def call(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments):
        code = main(["select", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_dry_run_says_what_the_choice_costs_and_writes_nothing(folder, call):
    before = sorted(folder.iterdir())
    code, out, _ = call("cats", "--top-k", "310", "--dry-run", "--format", "json")
    assert code == 0
    found = json.loads(out)
    share = found["kept"] / 1000
    assert share == 0.32
    assert found["path"] is None
    assert found["weight_bytes_before"] == 4 * 8_500
    assert found["weight_bytes_after"] == 4 * (320 * 8 + 500)
    assert found["decode_ratio"] == pytest.approx(8_500 / (8_000 * share + 500))
    assert found["cold_per_thousand"] == pytest.approx(1000 * (1 - found["coverage"]))
    assert found["cold_per_thousand_expected"] >= found["cold_per_thousand"] - 1000 * gamma(320, FLOAT64)
    assert found["dead_ids"] == dead_ids(resolve_model("model").tokenizer()).size
    assert "dry run" in call("cats", "--dry-run")[1]
    assert sorted(folder.iterdir()) == before


def test_names_and_floors(folder, call):
    arguments = ["--coverage", 0, "--floor", "d=1", "-o", "v", "--format", "json"]
    for profiles in (["c=cats", "d=dogs"], ["cats", "--profile", "d=dogs"]):
        code, out, err = call(*profiles, *arguments)
        assert (code, err) == (0, "")
        assert json.loads(out)["profiles"]["d"] == 1
        assert load_vocab(folder / "v").rule["options"]["floors"] == {"d": 1.0}
    assert call("cats", "cats", "-o", "v")[0] == 0  # without names, twice the same file is no error
    assert call("d=cats", "d=dogs", "-o", "v")[::2] == (
        2,
        "trimserve: two profiles are called d: give dogs another name.\n",
    )
    assert "no profile" in call("-o", "v")[2]
    assert "name it with -o" in call("cats")[2]
    assert "names no profile" in call("cats", "--floor", "d=1", "-o", "v")[2]
    code, _, err = call("cats", "--floor", "0.9", "-o", "v")
    assert (code, "should be a share with a profile's name" in err) == (2, True)


def test_without_the_model_the_rest_is_predicted(folder, call):
    (folder / "model").rename(folder / "away")
    try:
        found = json.loads(call("cats", "--dry-run", "--format", "json")[1])
        assert (found["weight_bytes_after"], found["decode_ratio"], found["dead_ids"]) == (None, None, None)
        assert found["cold_per_thousand_expected"] >= 0
        assert json.loads(call("cats", "--dry-run", "-m", "away", "--format", "json")[1])["decode_ratio"] >= 1
    finally:
        (folder / "away").rename(folder / "model")
