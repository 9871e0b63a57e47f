"""When numbers count as the original's: within its roundings, as far as the model amplifies them."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from trimserve_export.checkpoint.rounding import relative_rounding
from trimserve_export.verify.source.original import Original
from trimserve_export.verify.source.sides import Differs, Numbers

pytestmark = pytest.mark.export
IDS = [3, 1, 4, 1, 5]


class Amplifier(torch.nn.Module):
    """Changes of its embeddings come out a hundred times as large, beside outputs of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 16)
        with torch.no_grad():
            self.table.weight.copy_(1 + 0.01 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
        text = SimpleNamespace(hidden_size=16, num_hidden_layers=2)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids, **_):
        return {"last_hidden_state": 100 * (self.table(input_ids) - 1)}


@pytest.fixture
def original(tmp_path):
    made = Original(tmp_path, "feature-extraction")
    made.__dict__["model"] = Amplifier()
    return made


@pytest.mark.parametrize(("times", "fits"), [(0.5, True), (30, True), (3000, False)])
def test_what_a_model_amplifies_is_within_its_bound(original, times, fits):
    expected = original.outputs(IDS)
    size = times * relative_rounding(original.model.config) * float(np.abs(expected).max())
    numbers = Numbers(original)
    if not fits:
        with pytest.raises(Differs, match="the bound is"):
            numbers.add(expected, expected + np.float32(size), "numbers", lambda: original.outputs(IDS))
        return
    numbers.add(expected, expected + np.float32(size), "numbers", lambda: original.outputs(IDS))
    assert numbers.largest <= numbers.bound
    np.testing.assert_array_equal(original.outputs(IDS), expected)  # all is as before
    if times > 1:
        with pytest.raises(Differs, match="the bound is"):
            numbers.add(expected, expected + np.float32(size), "numbers")
