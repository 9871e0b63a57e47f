"""Trainer, accelerate, PEFT, torch.compile, DistributedDataParallel and optimizers on a cut model."""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import transformers
from safetensors.torch import load_file

from tests.support.finetuning import (
    COLD,
    KEPT,
    VOCAB,
    K,
    assert_same_state,
    make_batch,
    make_model,
    rows_of,
    state_of,
    train_step,
)
from tests.support.models import save_model
from tests.support.rounding import assert_within, model_bound
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.finetune import cut_vocab, partial_vocab
from trimserve.finetune.restoring import restore
from trimserve_export.finetune.loss import CutLoss

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

STEPS = 4
ROOT = Path(__file__).resolve().parents[2]


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)


def examples(labels: str = "class") -> list[dict]:
    """Features as a dataset gives them, one text each, unpadded."""
    made = []
    for step in range(8):
        batch = make_batch(step, labels=labels, texts=2)
        for row in range(2):
            length = int(batch["attention_mask"][row].sum())
            made.append({name: values[row].tolist() for name, values in batch.items() if values.ndim > 1})
            made[-1] = {name: values[:length] for name, values in made[-1].items()}
            if labels == "class":
                made[-1]["labels"] = int(batch["labels"][row])
    return made


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose pad token is the last id, as it is in Llama's and Qwen's kind."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(37)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w36", eos_token="w30")


def trainer(model, folder, collator, **options) -> transformers.Trainer:
    pytest.importorskip("accelerate")
    settings = {"max_steps": STEPS, "save_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.01, **settings | options
    )
    return transformers.Trainer(
        model, arguments, collator, train_dataset=examples(), processing_class=tokenizer()
    )


def decoder_classifier():
    """A decoder that looks for its pad id in the text, which Trainer writes into the config."""
    llama, _ = make_model("llama"), torch.manual_seed(0)
    config = copy.deepcopy(llama.config)
    config.num_labels = 3
    config.pad_token_id = None
    model = transformers.LlamaForSequenceClassification(config)
    model.model.load_state_dict(llama.model.state_dict())
    return model.train()


@pytest.mark.parametrize("make", [lambda: make_model("bert"), decoder_classifier], ids=["bert", "llama"])
def test_trainer_with_accumulation_and_checkpointing(tmp_path, make):
    full, partial = make(), make()
    padding = transformers.DataCollatorWithPadding(tokenizer())
    options = {"gradient_checkpointing": True, "per_device_train_batch_size": 2}
    trainer(full, tmp_path / "full", padding, **options).train()
    with partial_vocab(partial, VOCAB) as compact:
        trainer(partial, tmp_path / "partial", compact.collator(padding), **options).train()
        assert partial.config.pad_token_id == 10
    assert_same_state(partial.state_dict(), full.state_dict())
    assert partial.config.pad_token_id == full.config.pad_token_id == 36
    saved = tmp_path / "partial" / f"checkpoint-{STEPS}"
    assert json.loads((saved / "config.json").read_text())["vocab_size"] == K
    assert json.loads((saved / "config.json").read_text())["pad_token_id"] == 10
    assert (saved / "vocab_map.safetensors").is_file()


def test_trainer_resumes_from_a_compact_checkpoint(tmp_path):
    straight, resumed = make_model("bert"), make_model("bert")
    padding = transformers.DataCollatorWithPadding(tokenizer())
    with partial_vocab(straight, VOCAB) as compact:
        trainer(straight, tmp_path, compact.collator(padding)).train()
    with partial_vocab(resumed, VOCAB) as compact:
        made = trainer(resumed, tmp_path, compact.collator(padding))
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(resumed.state_dict(), straight.state_dict())


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    full, partial = make_model("bert"), make_model("bert")
    of_full = adamw(full)
    for step in range(STEPS):
        train_step(full, make_batch(step), of_full, step)
    accelerator = accelerate.Accelerator(cpu=True)
    with partial_vocab(partial, VOCAB) as compact:
        model, optimizer = accelerator.prepare(partial, adamw(partial))
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.manual_seed(step)
            accelerator.backward(model(**compact.remap(make_batch(step))).loss)
            optimizer.step()
        accelerator.unwrap_model(model).save_pretrained(tmp_path)
    assert_same_state(partial.state_dict(), full.state_dict())
    assert json.loads((tmp_path / "finetune.json").read_text())["kept"] == K


def with_lora(model, targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, lora_dropout=0.0))


def test_lora_on_top():
    full, partial = make_model("llama"), make_model("llama")
    on_full = with_lora(full, ["q_proj", "v_proj"])
    with partial_vocab(partial, VOCAB) as compact:
        on_partial = with_lora(partial, ["q_proj", "v_proj"])
        optimizer = adamw(on_partial)
        for step in range(STEPS):
            train_step(on_partial, compact.remap(make_batch(step, labels="token")), optimizer, step)
        assert not rows_of(partial).requires_grad
    assert not rows_of(partial).requires_grad
    ids = torch.arange(37)[None]
    adapters = {name: value for name, value in on_partial.state_dict().items() if "lora_" in name}
    assert all(torch.count_nonzero(value) for value in adapters.values())  # B begins at zero
    on_full.load_state_dict(adapters, strict=False)
    assert torch.equal(on_partial(input_ids=ids).logits, on_full(input_ids=ids).logits)


def test_lora_on_the_embedding_is_merged_before_the_rows_come_back():
    model = make_model("llama")
    base = rows_of(model).detach().clone()
    compact = cut_vocab(model, VOCAB)
    adapted = with_lora(model, ["embed_tokens", "q_proj"])
    optimizer = adamw(adapted)
    train_step(adapted, compact.remap(make_batch(0, labels="token")), optimizer, 0)
    train_step(adapted, compact.remap(make_batch(1, labels="token")), optimizer, 1)
    with pytest.raises(UsageError, match="merge_and_unload"):
        compact.restore()
    adapted.merge_and_unload()
    compact.restore()
    assert torch.equal(rows_of(model)[list(COLD)], base[list(COLD)])
    assert not torch.equal(rows_of(model)[list(KEPT)], base[list(KEPT)])


def test_compiled_model_recompiles_for_the_rows_it_has():
    full, partial = make_model("qwen3").eval(), make_model("qwen3").eval()
    batch = make_batch(0, labels="token")
    compiled = torch.compile(partial, backend="eager")
    expected = compiled(**batch).logits
    with partial_vocab(partial, VOCAB) as compact:
        cut = compiled(**compact.remap(batch))
        cut.loss.backward()
        assert cut.logits.shape[-1] == rows_of(partial).grad.shape[0] == K
        bound = model_bound(full, lambda model: model(**batch).logits)
        assert_within(cut.logits, expected[..., list(KEPT)], bound, rows=-1)
    assert_within(compiled(**batch).logits, full(**batch).logits, bound, rows=-1)


def test_state_of_an_optimizer_made_before_is_cut_and_given_back():
    full, partial = make_model("bert"), make_model("bert")
    of_full, of_partial = adamw(full), adamw(partial)
    everything = make_batch(0) | {"input_ids": torch.arange(37)[None].repeat(4, 1)[:, :28]}
    everything["attention_mask"] = torch.ones_like(everything["input_ids"])
    for model, optimizer in ((full, of_full), (partial, of_partial)):
        train_step(model, everything, optimizer, 0)
        optimizer.zero_grad()
    at_entry = rows_of(partial).detach().clone()
    cold_state = copy.deepcopy(of_partial.state[rows_of(partial)])
    with partial_vocab(partial, VOCAB, optimizers=[of_partial]) as compact:
        for step in range(STEPS):
            train_step(full, make_batch(step), of_full, step)
            train_step(partial, compact.remap(make_batch(step)), of_partial, step)
        assert of_partial.state[rows_of(partial)]["exp_avg"].shape[0] == K
    kept, cold = list(KEPT), list(COLD)
    assert torch.equal(rows_of(partial)[kept], rows_of(full)[kept])
    # The moments that the cold rows came with would have moved them on; here they wait with them.
    assert torch.equal(rows_of(partial)[cold], at_entry[cold])
    for key, value in of_partial.state[rows_of(partial)].items():
        if key == "step":
            assert value == of_full.state[rows_of(full)][key]
            continue
        assert torch.equal(value[kept], of_full.state[rows_of(full)][key][kept])
        assert torch.equal(value[cold], cold_state[key][cold])
        assert torch.count_nonzero(value[cold]) > 0


def test_optimizer_made_in_the_block_goes_on_after_it():
    full, partial = make_model("bert"), make_model("bert")
    of_full = adamw(full)
    with partial_vocab(partial, VOCAB) as compact:
        of_partial = adamw(partial)
        compact.attach(of_partial)
        for step in range(STEPS):
            train_step(full, make_batch(step), of_full, step)
            train_step(partial, compact.remap(make_batch(step)), of_partial, step)
    for step in range(STEPS):
        expected = train_step(full, make_batch(step), of_full, step)
        assert torch.equal(train_step(partial, make_batch(step), of_partial, step), expected)
    assert_same_state(partial.state_dict(), full.state_dict())


@pytest.fixture
def package(monkeypatch):
    """cut-cross-entropy as it is called, computed plainly; its own kernel needs a GPU."""
    calls = []

    def linear_cross_entropy(e, c, targets, *, softcap, reduction, shift):
        calls.append(reduction)
        assert shift is True
        logits = e[:, :-1] @ c.T
        logits = logits if softcap is None else (logits / softcap).tanh() * softcap
        flat = targets[:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction=reduction)

    stub = types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", stub)
    return calls


def loss_bound(model, batch, **options) -> float:
    bound = model_bound(model, lambda model: model(**batch, **options).loss)
    assert bound < 0.01  # of losses of a few nats
    return bound


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cut_cross_entropy_takes_the_place_of_logits(package, family):
    model, plain = make_model(family), make_model(family)
    with partial_vocab(model, VOCAB) as compact, partial_vocab(plain, VOCAB):
        batch = compact.remap(make_batch(0, labels="token"))
        assert torch.equal(model(**batch).loss, plain(**batch).loss)
        assert package == []  # no CUDA device
        loss = CutLoss(model, any_device=True)
        loss.install()
        found = model(**batch)
        assert (found.logits, package) == (None, ["mean"])
        assert_within(found.loss, plain(**batch).loss, loss_bound(plain, batch), rows=None)
        summed = model(**batch, num_items_in_batch=5).loss
        expected = plain(**batch, num_items_in_batch=5)
        assert_within(summed, expected.loss, loss_bound(plain, batch, num_items_in_batch=5), rows=None)
        assert model.eval()(**batch).logits.shape[-1] == K
        loss.remove()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("family", ["bert-mlm", "granite"])
def test_cut_cross_entropy_is_not_used_where_logits_are_not_the_product(package, family, tmp_path):
    if family == "granite":  # scales its logits
        model = transformers.GraniteForCausalLM.from_pretrained(save_model(family, tmp_path / family))
    else:
        model = make_model(family)
    with pytest.raises(UnsupportedModelError, match=r"no decoder|not the product"):
        CutLoss(model)
    assert package == []


@pytest.mark.slow
def test_two_processes_of_distributed_data_parallel(tmp_path):
    base = save_model("llama", tmp_path / "base", rows=37)
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "INIT": f"file://{tmp_path / 'meeting'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "ddp_worker.py"),
        str(base),
        str(tmp_path / "compact"),
    ]
    workers = [
        subprocess.Popen(command, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    made = restore(tmp_path / "compact", base, tmp_path / "full", progress=False)
    assert_same_state(
        load_file(made.path / "model.safetensors"), load_file(tmp_path / "compact.full.safetensors")
    )


def test_state_is_what_it_was_after_all_of_this():
    # The hook and the stand-ins leave nothing behind on a model.
    model = make_model("qwen3")
    before, attributes = state_of(model), set(model.__dict__)
    with partial_vocab(model, VOCAB):
        pass
    assert_same_state(model.state_dict(), before)
    assert set(model.__dict__) == attributes
    assert not model._forward_pre_hooks
