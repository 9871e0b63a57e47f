"""Training with the kept rows alone equals training the full model; the block restores what it cut."""

import copy
import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.support.finetuning import (
    COLD,
    KEPT,
    MODELS,
    VOCAB,
    K,
    V,
    assert_same_state,
    make_batch,
    make_model,
    rows_of,
    state_of,
    train_step,
)
from tests.support.folders import make_vocab
from tests.support.rounding import assert_within, gamma, model_bound
from trimserve.errors import (
    MismatchError,
    MissingExtraError,
    UnknownIdError,
    UnsupportedModelError,
    UsageError,
)
from trimserve.finetune import cut_vocab, partial_vocab

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

STEPS = 50


ENCODERS = ("bert", "roberta", "xlm-roberta", "deberta-v2", "distilbert")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0),
}


def assert_same_gradients(partial, full) -> None:
    ours = dict(partial.named_parameters())
    for name, parameter in full.named_parameters():
        expected = parameter.grad
        if parameter is rows_of(full):
            assert torch.count_nonzero(expected[list(COLD)]) == 0
            expected = expected[list(KEPT)]
        assert torch.equal(ours[name].grad, expected), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_training_equals_full_training_bit_for_bit(family, optimizer):
    full, partial = make_model(family), make_model(family)
    of_full = OPTIMIZERS[optimizer](full.parameters())
    with partial_vocab(partial, VOCAB) as compact:
        of_partial = OPTIMIZERS[optimizer](partial.parameters())
        for step in range(STEPS):
            batch = make_batch(step)
            expected = train_step(full, batch, of_full, step)
            found = train_step(partial, compact.remap(batch), of_partial, step)
            assert torch.equal(found, expected), step
            assert_same_gradients(partial, full)
    assert_same_state(partial.state_dict(), full.state_dict())
    assert not torch.equal(rows_of(full), rows_of(make_model(family)))


def test_weight_decay_changes_kept_rows_alike_and_cold_rows_only_in_full_training():
    full, partial, lr, decay = make_model("bert"), make_model("bert"), 0.01, 0.1
    base = rows_of(full).detach().clone()
    of_full = torch.optim.AdamW(full.parameters(), lr=lr, weight_decay=decay)
    with partial_vocab(partial, VOCAB) as compact:
        of_partial = torch.optim.AdamW(partial.parameters(), lr=lr, weight_decay=decay)
        for step in range(10):
            train_step(full, make_batch(step), of_full, step)
            train_step(partial, compact.remap(make_batch(step)), of_partial, step)
    kept, cold = list(KEPT), list(COLD)
    assert torch.equal(rows_of(partial)[kept], rows_of(full)[kept])
    assert torch.equal(rows_of(partial)[cold], base[cold])
    # No gradient ever reached these rows of the full model: it only shrank them.
    shrunk = base[cold] * (1 - lr * decay) ** 10  # ten products of rounded factors
    assert_within(rows_of(full)[cold], shrunk, 2 * gamma(3 * 10) * shrunk.abs().numpy(), rows=0)


def decoder_loss(model, batch, kept: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A full decoder's loss with the softmax over the kept ids alone; `targets` are compact ids."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs).last_hidden_state
    logits = torch.nn.functional.linear(hidden, rows_of(model, "head")[kept])
    return model.loss_function(logits, targets, vocab_size=K)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoder_training_equals_full_training_with_the_softmax_over_the_kept_ids(family):
    full, partial, kept = make_model(family), make_model(family), torch.tensor(KEPT)
    of_full = torch.optim.AdamW(full.parameters(), lr=0.01, weight_decay=0.0)
    with partial_vocab(partial, VOCAB) as compact:
        of_partial = torch.optim.AdamW(partial.parameters(), lr=0.01, weight_decay=0.0)
        for step in range(STEPS):
            batch = make_batch(step, labels="token")
            found = train_step(partial, compact.remap(batch), of_partial, step)
            of_full.zero_grad()
            expected = decoder_loss(full, batch, kept, compact.remap(batch)["labels"])
            expected.backward()
            of_full.step()
            assert torch.equal(found, expected.detach()), step
    assert_same_state(partial.state_dict(), full.state_dict())


@pytest.mark.parametrize("family", ["bert-mlm", "llama", "qwen3", "bart", "marian"])
def test_the_full_softmax_differs_by_the_mass_of_the_cold_ids_alone(family):
    full, partial = make_model(family).eval(), make_model(family).eval()
    batch = make_batch(0, labels="token")
    bound = model_bound(full, lambda model: model(**batch).logits)
    full_out = full(**batch)
    with partial_vocab(partial, VOCAB) as compact:
        out = partial(**compact.remap(batch))
    assert_within(out.logits, full_out.logits[..., list(KEPT)], bound, rows=-1)
    shift = 0 if family in ("bert-mlm", "bart", "marian") else 1
    labels = batch["labels"][:, shift:]
    logits = full_out.logits[:, : labels.shape[1]]
    cold_mass = logits.softmax(-1)[..., list(COLD)].sum(-1)[labels != -100]
    # A loss is a logit less a mean of logits of a kind; three of them are computed.
    assert_within(out.loss, full_out.loss + torch.log1p(-cold_mass).mean(), 3 * 2 * bound, rows=None)
    assert cold_mass.mean() > 6 * bound
    full_out.loss.backward()
    # What our training leaves out: the full softmax also pushes the rows of ids that never occur.
    assert torch.count_nonzero(rows_of(full, "head").grad[list(COLD)]) > 0


@pytest.mark.parametrize("family", MODELS)
def test_an_exception_in_the_block_restores_every_tensor_config_and_number(family):
    model = make_model(family)
    before, config = state_of(model), copy.deepcopy(model.config)
    numbers = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(KeyboardInterrupt), partial_vocab(model, VOCAB) as compact:
        interrupted(model)
    assert_same_state(model.state_dict(), before)
    assert model.config.to_dict() == config.to_dict()
    for name, module in model.named_modules():
        for key in ("num_embeddings", "out_features", "padding_idx", "vocab_size"):
            assert vars(module).get(key) == numbers[name].get(key), (name, key)
    assert not compact.is_cut
    compact.restore()  # a second time does nothing


def interrupted(model) -> None:
    assert rows_of(model).shape[0] == model.config.vocab_size == K
    raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_flags_are_kept(dtype):
    model = make_model("llama").to(dtype)
    rows_of(model).requires_grad_(False)
    rows_of(model, "head").marked = "by its owner"
    before = state_of(model)
    with partial_vocab(model, VOCAB):
        assert rows_of(model).dtype == dtype
        assert not rows_of(model).requires_grad
        assert rows_of(model, "head").requires_grad
        assert rows_of(model, "head").marked == "by its owner"
        rows_of(model, "head").requires_grad_(False)
    assert_same_state(model.state_dict(), before)
    assert not rows_of(model, "head").requires_grad


def test_a_dtype_changed_in_the_block_holds_for_all_rows():
    model = make_model("qwen3")
    before = rows_of(model).detach().clone()
    with partial_vocab(model, VOCAB):
        model.to(torch.bfloat16)
    assert torch.equal(rows_of(model), before.to(torch.bfloat16))
    assert rows_of(model) is rows_of(model, "head")


def test_nan_and_infinity_in_cold_rows_keep_their_bits():
    model = make_model("bert")
    with torch.no_grad():
        rows_of(model)[COLD[0]] = float("nan")
        rows_of(model)[COLD[1]] = float("-inf")
    before = rows_of(model).detach().clone().view(torch.int32)
    with partial_vocab(model, VOCAB):
        pass
    assert torch.equal(rows_of(model).detach().view(torch.int32), before)


def test_functional_pair():
    model = make_model("bart")
    before = state_of(model)
    compact = cut_vocab(model, VOCAB)
    assert len({id(tensor) for tensor in tied(model)}) == 1
    compact.restore()
    assert_same_state(model.state_dict(), before)
    assert len({id(tensor) for tensor in tied(model)}) == 1


def tied(model) -> list[torch.Tensor]:
    parts = (model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens)
    return [part.weight for part in parts] + [model.lm_head.weight]


def test_a_tie_broken_in_the_block_is_restored_as_two_tensors():
    model = make_model("qwen3")
    base = rows_of(model).detach().clone()
    with partial_vocab(model, VOCAB):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    expected = base.clone()
    expected[list(KEPT)] += 1
    assert torch.equal(rows_of(model), base)
    assert torch.equal(rows_of(model, "head"), expected)


def test_embedding_resized_in_the_block_is_an_error():
    model = make_model("bert")
    compact = cut_vocab(model, VOCAB)
    model.resize_token_embeddings(K + 2)
    with pytest.raises(MismatchError, match="should have 11 rows but has 13"):
        compact.restore()


def test_cut_model_can_be_copied_and_pickled(tmp_path):
    model = make_model("qwen3").eval()
    with partial_vocab(model, VOCAB) as compact:
        batch = compact.remap(make_batch(0, labels="token"))
        expected = model(**batch).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**batch).loss, expected)
            other.save_pretrained(tmp_path)
            assert (tmp_path / "vocab_map.safetensors").is_file()


def test_full_rows_stand_in_a_file_until_the_block_ends(tmp_path):
    model = make_model("llama")
    with partial_vocab(model, VOCAB, folder=tmp_path):
        sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
        assert len(sizes) == 2
        assert min(sizes) > 4 * len(COLD) * 8
    assert list(tmp_path.iterdir()) == []


def test_generated_ids_come_back_as_token_ids():
    model = make_model("qwen3").eval()
    prompt = torch.tensor([[2, 7, 20]])
    with partial_vocab(model, VOCAB) as compact:
        batch = compact.remap({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
        made = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        found = compact.to_original(made.numpy())
        assert model.generation_config.eos_token_id == [9, 10]
    logits = model(torch.tensor(found[:, :-1].astype(np.int64))).logits[0, 2:]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, list(KEPT)] = logits[:, list(KEPT)]
    assert masked.argmax(-1).tolist() == found[0, 3:].tolist()
    assert model.generation_config.eos_token_id == [30, 36]


def test_token_ids_assigned_in_the_block_are_translated():
    model = make_model("qwen3")
    with partial_vocab(model, VOCAB) as compact:
        model.config.pad_token_id = 36
        model(**compact.remap(make_batch(0, labels="token")))
        assert model.config.pad_token_id == 10
        model.config.pad_token_id = COLD[0]
        with pytest.raises(UnknownIdError, match="does not keep"):
            model(**compact.remap(make_batch(0, labels="token")))
    assert model.config.pad_token_id == COLD[0]


def test_remap_keeps_the_type_of_what_it_translates():
    model = make_model("bert")
    with partial_vocab(model, VOCAB) as compact:
        for ids in (
            [[1, 36], [7]],
            np.array([[1, 36]], np.int32),
            torch.tensor([[1, 36]], dtype=torch.int32),
        ):
            found = compact.remap({"input_ids": ids, "labels": ids})
            assert type(found["input_ids"]) is type(ids)
            assert getattr(found["input_ids"], "dtype", None) == getattr(ids, "dtype", None)
            assert list(map(int, found["input_ids"][0])) == [1, 10]
            assert found["labels"] is ids  # classes, not tokens


@pytest.mark.parametrize("bad", [COLD[0], V, -1])
def test_an_id_outside_the_vocab_names_its_text(bad):
    model = make_model("bert")
    ids = torch.tensor([[1, 2], [3, bad]])
    with (
        partial_vocab(model, VOCAB) as compact,
        pytest.raises(UnknownIdError, match=f"token id {bad} in input_ids of text 1 of the batch"),
    ):
        compact.remap({"input_ids": ids})


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[finetune\]'"):
        cut_vocab(make_model("bert"), VOCAB)


def test_refused_before_anything_changes():
    model = make_model("llama")
    before = state_of(model)
    with pytest.raises(MismatchError, match="37 rows but the vocab was selected for 38"):
        cut_vocab(model, make_vocab(KEPT, 38))
    with pytest.raises(UsageError, match="pass the model itself"):
        cut_vocab(torch.nn.Sequential(model), VOCAB)
    with pytest.raises(UnsupportedModelError, match="positions of this model are counted from its pad id 5"):
        cut_vocab(make_model("xlm-roberta"), make_vocab((1, 5, 9), V))
    with partial_vocab(model, VOCAB), pytest.raises(UsageError, match="cut already"):
        cut_vocab(model, VOCAB)
    model(**make_batch(0, labels="token")).loss.backward()
    with pytest.raises(UsageError, match="holds a gradient"):
        cut_vocab(model, VOCAB)
    model.zero_grad()
    adafactor = torch.optim.Adafactor(model.parameters())
    train_step(model, make_batch(0, labels="token"), adafactor, 0)
    model.zero_grad()
    before = state_of(model)
    with pytest.raises(UsageError, match="Adafactor's state 'row_var'"):
        cut_vocab(model, VOCAB, optimizers=[adafactor])
    assert_same_state(model.state_dict(), before)
    assert model.config.vocab_size == V
