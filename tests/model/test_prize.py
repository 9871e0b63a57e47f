"""The prize by the headers alone, against `inspect`, which asks the model's class."""

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from tests.support.models import save_model
from trimserve.model.prize import read_weight_bytes
from trimserve.model.resolve import resolve_model
from trimserve_export.inspection import inspect

pytestmark = pytest.mark.export

KEPT = 11


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi", "opt", "bert", "roberta"])
def test_it_equals_what_inspect_finds(tmp_path, family):
    check(save_model(family, tmp_path / "model", rows=41))


@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "marian"])
def test_an_encoder_is_read_once_a_text(tmp_path, family):
    from tests.support.translators import save_translator

    check(save_translator(family, tmp_path / "model"))


def test_a_tied_head_that_is_stored_again_counts_once(tmp_path):
    folder = save_model("qwen3", tmp_path / "model", rows=41)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check(folder)


def check(folder):
    found, facts = read_weight_bytes(resolve_model(folder)), inspect(folder, kept=KEPT)
    assert found.total == facts.weight_bytes
    assert found.total - found.at(KEPT) == facts.prize.bytes_removed
    assert found.decode_ratio(KEPT) == pytest.approx(facts.prize.decode_ratio)
    assert found.decode_ratio(1_000) == pytest.approx(1 if facts.prize.decode_ratio else None)


def test_without_weights_there_is_none(model_folders):
    assert read_weight_bytes(resolve_model(model_folders["wordpiece"])) is None
