"""What is changed of transformers' code before a trace computes the same in torch."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import needs_transformers_5
from tests.support.rounding import assert_within, model_bound

pytestmark = [pytest.mark.export, needs_transformers_5]
TEXT = torch.tensor([[5, 60, 7, 300, 9, 33, 20, 2, 15, 8, 100, 41, 3, 77, 90, 210, 64, 31, 12, 6]])


@pytest.fixture(scope="module")
def decoder():
    """Make a tiny decoder, with attention in plain torch."""
    import transformers

    from tests.support.decoders import DECODERS, settings_of
    from tests.support.models import with_random_weights

    def make(name: str):
        model_class = getattr(transformers, DECODERS[name][0])
        config = model_class.config_class(**settings_of(DECODERS[name][1]), attn_implementation="eager")
        return with_random_weights(model_class(config), seed=1)

    return make


class Complex(TorchDispatchMode):
    """Counts the operators that give complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count += any(torch.is_tensor(leaf) and leaf.is_complex() for leaf in tree_leaves(made))
        return made


def logits(model, ids=TEXT, mask=None) -> np.ndarray:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0].numpy()


@pytest.mark.parametrize("name", ["llama4", "deepseek_v2"])
def test_rotations_are_the_same_in_real_numbers(decoder, name):
    from trimserve_export.exporters.real_rotation import real_rotation

    model = decoder(name)
    expected, bound = logits(model), model_bound(model, logits, draws=2)
    with Complex() as counted:
        logits(model)
    assert counted.count
    with real_rotation(model), Complex() as real:
        assert_within(logits(model), expected, bound, rows=0)
    assert not real.count
    np.testing.assert_array_equal(logits(model), expected)  # all is as before


def test_llama_4_scales_a_padded_text_as_it_does_alone(decoder):
    from trimserve_export.exporters.real_rotation import real_rotation

    # Padding moves the text across the place from which queries are scaled.
    model = decoder("llama4")
    expected, bound = logits(model), model_bound(model, logits, draws=2)
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.int64), TEXT], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 12).long()[None]
    assert np.abs(logits(model, padded, mask)[12:] - expected).max() > 10 * bound
    with real_rotation(model):
        assert_within(logits(model, padded, mask)[12:], expected, bound, rows=0)


def test_gemma_3n_keeps_what_lies_above_the_same_quantile(decoder):
    from trimserve_export.exporters.sparsity import sparse_by_constant

    model = decoder("gemma3n")
    layers = [layer.mlp for layer in model.model.layers if layer.mlp.activation_sparsity > 0]
    assert layers
    rows = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        expected = layer._gaussian_topk(rows)
        with sparse_by_constant(model):
            found = layer._gaussian_topk(rows)
        assert 0 < (found > 0).float().mean() < 0.2
        # A mean and a deviation of 48 numbers, each within 50 roundings of numbers up to the largest.
        assert_within(found, expected, 50 * 2.0**-24 * float(rows.abs().max()) * 3, rows=0)
        assert layer._gaussian_topk.__func__ is type(layer)._gaussian_topk
