"""The language model of a multimodal checkpoint as a checkpoint of its own."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

from tests.support.models import needs_transformers_5
from trimserve.errors import UnsupportedModelError
from trimserve.model.resolve import resolve_model
from trimserve_export.source.whole import whole_source

pytestmark = [pytest.mark.export, needs_transformers_5]


@pytest.fixture
def mistral3(tmp_path):
    from tests.support.decoders import save_multimodal

    return save_multimodal("mistral3", tmp_path / "model")


def tie_in_config(folder, tied: bool) -> None:
    """Mistral 3's checkpoints leave the outer flag out, and transformers 5 then takes it for true."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))


def head_is_table(folder) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (table,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {head: tensors[table]}, path)


def test_it_has_the_text_config_and_the_tensors_of_the_text_part(mistral3):
    with whole_source(resolve_model(mistral3)) as source:
        assert source.composite == mistral3
        assert source.config["architectures"] == ["MistralForCausalLM"]
        assert (source.config["model_type"], source.config["sliding_window"]) == ("mistral", 8)
        assert (source.config["eos_token_id"], source.vocab_size) == (2, 384)
        names = set(source.tensors)
        tokenizer = source.tokenizer_sha256
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names
    assert not any("vision" in name or "projector" in name for name in names)
    assert tokenizer == resolve_model(mistral3).tokenizer_sha256


def test_a_renamed_one_is_stored_by_those_names(mistral3):
    with whole_source(resolve_model(mistral3), renamed=True) as source:
        stored = load_file(source.path / "model.safetensors")
        assert stored.keys() == source.tensors.keys()
    whole = load_file(mistral3 / "model.safetensors")
    (table,) = (name for name in whole if name.endswith("embed_tokens.weight"))
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], whole[table])


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path):
    from tests.support.decoders import save_multimodal

    folder = save_multimodal("mistral3", tmp_path / "untied", tie_word_embeddings=False)
    tied = []
    for flag in (False, True):
        tie_in_config(folder, flag)
        with whole_source(resolve_model(folder)) as source:
            tied.append(source.config["tie_word_embeddings"])
    head_is_table(folder)
    with whole_source(resolve_model(folder)) as source:
        tied.append(source.config["tie_word_embeddings"])
    assert tied == [False, False, True]


def test_a_model_without_a_text_class_is_refused(mistral3):
    config = {
        "model_type": "blip",
        "architectures": ["BlipForConditionalGeneration"],
        "text_config": {"vocab_size": 384},
    }
    (mistral3 / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(
            UnsupportedModelError, match="language model of this 'blip' model is a 'blip_text_model'"
        ),
        whole_source(resolve_model(mistral3)),
    ):
        pass
