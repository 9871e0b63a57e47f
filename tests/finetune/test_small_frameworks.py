"""Trainer, DistributedDataParallel, PEFT and partial_vocab with reversible layers and sampled gradients."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import transformers

from tests.finetune.test_frameworks import adamw, trainer
from tests.support.finetuning import VOCAB, assert_same_state, make_batch, state_of, train_step
from tests.support.reversing import assert_same_gradients, batch_of, gradients, make, use_adapters
from trimserve.finetune import partial_vocab, reversible, sampled_gradients
from trimserve_export.coupled.adapters import WEIGHTS_NAME

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def trained_by_trainer(model, folder, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """The state after a few steps of two accumulated batches each."""
    made = trainer(model, folder, None)
    made.data_collator = transformers.DataCollatorWithPadding(made.processing_class)
    torch.manual_seed(0)
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return state_of(model)


@pytest.mark.parametrize("variant", [1, 3])
def test_trainer_accumulates_and_resumes_with_reversible_layers(variant, tmp_path):
    states = {}
    for recompute in (True, False):
        torch.manual_seed(1)
        model = make("bert")
        with reversible(model, variant=variant, rank=3) as meft:
            meft.recompute = recompute
            states[recompute] = trained_by_trainer(model, tmp_path / str(recompute))
            meft.save(tmp_path / f"adapters-{recompute}")
    assert_same_state(states[True], states[False])
    assert any(bool(values.any()) for name, values in states[True].items() if "up.weight" in name)

    # A checkpoint in the middle is a coupled one, and training goes on from it as if it had not ended.
    middle = tmp_path / "True" / "checkpoint-2"
    entry = json.loads((middle / "config.json").read_text())["trimserve_coupling"]
    assert (entry["variant"], entry["rank"]) == (variant, 3)
    torch.manual_seed(2)
    model = make("bert")
    with reversible(model, variant=variant, rank=3) as meft:
        assert_same_state(trained_by_trainer(model, tmp_path / "resumed", middle), states[True])
        meft.save(tmp_path / "adapters-resumed")
    files = [tmp_path / f"adapters-{name}" / WEIGHTS_NAME for name in ("True", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_trainer_with_sampled_gradients(tmp_path):
    plain = trained_by_trainer(make("bert"), tmp_path / "plain")
    model = make("bert")
    with sampled_gradients(model, keep=1.0):
        assert_same_state(trained_by_trainer(model, tmp_path / "all"), plain)
    model = make("bert")
    with sampled_gradients(model, keep=0.3) as wta:
        sampled = trained_by_trainer(model, tmp_path / "some")
        cache = vars(next(iter(wta.modules.values())))["forward"]._sampler.cache
        # Each of the texts that were seen has its own place in each layer, without help by the data loader.
        assert (cache._norms > 0).sum(1).tolist() == [16] * len(wta.modules)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(sampled[name], plain[name])
    assert all(values.isfinite().all() for values in sampled.values())


@pytest.mark.parametrize("kind", ["reversible", "sampled", "both"])
def test_accumulated_gradients_are_the_sum_of_the_batches(kind):
    model, batches = make("bert"), [batch_of("bert", step) for step in range(3)]
    keep = 1.0 if kind == "reversible" else 0.5

    def accumulate(*, at_once: bool) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        with sampled_gradients(model, keep=keep):  # draws from the beginning
            model.zero_grad()
            for step, batch in enumerate(batches):
                if not at_once:
                    model.zero_grad()
                torch.manual_seed(step)
                model(**batch).loss.backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        found = parameter.grad.clone()
                        total[name] = found if at_once else total.get(name, 0) + found
        return total

    if kind == "sampled":
        assert_same_gradients(accumulate(at_once=True), accumulate(at_once=False))
        return
    with reversible(model, rank=3, freeze=False) as meft:
        use_adapters(meft)
        assert_same_gradients(accumulate(at_once=True), accumulate(at_once=False))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_in_reversible_layers(family):
    peft = pytest.importorskip("peft")
    model, batch = make(family), batch_of(family)
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        with sampled_gradients(adapted, keep=0.4) as wta:
            sampled = gradients(adapted, batch)
        found = gradients(adapted, batch)
        meft.recompute = False
        expected = gradients(adapted, batch)
        assert any("lora_A" in name for name in wta.modules)
    assert all("lora" in name or name == "loss" for name in found)
    assert_same_gradients(found, expected)
    for name, gradient in expected.items():
        if "lora_B" in name:
            assert_same_gradients({name: sampled[name]}, {name: gradient})
    name = next(name for name in expected if "lora_A" in name)
    assert not torch.equal(sampled[name], expected[name])


METHODS = {
    "MEFT 1": lambda model: reversible(model, variant=1, rank=3),
    "MEFT 3, all": lambda model: reversible(model, variant=3, rank=3, freeze=False),
    "WTA-CRS": lambda model: sampled_gradients(model, keep=0.3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_partial_vocab_changes_no_number(family, method):
    """The losses, and at the end each weight, as with the whole vocab: bit for bit."""
    batches, found = [make_batch(step) for step in range(STEPS)], []
    for cuts in (False, True):
        model = make(family)
        torch.manual_seed(0)  # adapters are drawn
        cut = partial_vocab(model, VOCAB) if cuts else contextlib.nullcontext()
        with cut as compact, METHODS[method](model):
            optimizer = adamw(model)
            losses = [
                train_step(model, batch if compact is None else compact.remap(batch), optimizer, step)
                for step, batch in enumerate(batches * 2)
            ]
            adapters = {name: values for name, values in state_of(model).items() if ".adapters." in name}
        found.append((torch.stack(losses), state_of(model) | adapters))
    assert torch.equal(found[0][0], found[1][0])
    assert len(set(found[0][0].tolist())) > STEPS
    assert_same_state(found[0][1], found[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reversible", "sampled"])
def test_two_processes_of_distributed_data_parallel(kind, tmp_path):
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "INIT": f"file://{tmp_path / 'meeting'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "small_ddp_worker.py"), kind, str(tmp_path)]
    workers = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    errors = [worker.communicate(timeout=400)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    ours, others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_state(ours, others)
