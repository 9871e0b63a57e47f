"""Checkpoints of reversible models, as exporters load them."""

import json

import pytest

pytest.importorskip("torch")

import torch
import transformers

from tests.support.models import save_model
from tests.support.reversing import use_adapters
from trimserve.finetune import reversible
from trimserve_export.checkpoint.tasks import load_model

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]


def test_checkpoint_is_the_inference_form(tmp_path):
    base = save_model("bert_classifier", tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()
    ids = torch.arange(5, 25)[None]
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "coupled")
    entry = json.loads((tmp_path / "coupled" / "config.json").read_text())["trimserve_coupling"]
    assert entry == {"variant": 1, "scales": [0.1, 1.0], "rank": 3}
    loaded = load_model(tmp_path / "coupled", "text-classification", "fp32")
    # Plain floats against the grid of 2^-30, and the sums of a few small layers.
    assert float((loaded(input_ids=ids).logits - expected).abs().max()) < 1e-5
    assert float((model(input_ids=ids).logits - expected).abs().max()) > 1e-3
