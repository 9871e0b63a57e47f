"""Names that checkpoints store tensors by."""

import pytest

from trimserve.model.tensor_names import language_names


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("language_model.model.layers.0.norm.weight", "model.layers.0.norm.weight"),  # Gemma 3, Mistral 3
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.0.norm.weight", "model.layers.0.norm.weight"),  # Qwen3.5, Gemma 3n
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_a_language_model(stored, own):
    others = ["model.visual.norm.weight", "vision_tower.lm_head_norm.weight", "multi_modal_projector.weight"]
    names = ["language_model.model.embed_tokens.weight", stored, *others]
    assert language_names(names) == {names[0]: "model.embed_tokens.weight", stored: own}


def test_a_checkpoint_of_the_language_model_alone_stays_as_it_is():
    names = ["model.norm.weight", "lm_head.weight"]
    assert language_names(names) == dict(zip(names, names, strict=True))
