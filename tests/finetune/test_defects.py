"""The nine defects of the reference implementation of partial embedding matrices, each with its own test.

Found in the code of Williams & Aletras 2025 (Vocabulary-level Memory Efficiency for Language Model
Fine-tuning); what it did is in each docstring.
"""

import copy

import pytest

pytest.importorskip("torch")

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.finetuning import COLD, KEPT, VOCAB, K, V, make_batch, make_model, rows_of
from tests.support.folders import make_vocab
from trimserve.finetune import partial_vocab

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]


def test_defect_1_padding_ids():
    """Padding only existed if the data was padded beforehand, and a pad id that moves was an error."""
    model = make_model("bert")  # its pad id 36 becomes 10
    expected = model.eval()(**make_batch(0)).logits
    with partial_vocab(model, VOCAB) as compact:
        batch = compact.collator(lambda _: make_batch(0))([])  # pads when the batch is made
        assert (batch["input_ids"][0, 4:] == 10).all()
        assert (model.config.pad_token_id, model.get_input_embeddings().padding_idx) == (10, 10)
        assert torch.equal(model(**batch).logits, expected)
        model(**batch).loss.backward()
        assert torch.count_nonzero(rows_of(model).grad[10]) == 0
    assert (model.config.pad_token_id, model.get_input_embeddings().padding_idx) == (36, 36)


@pytest.mark.parametrize("family", ["bert-mlm", "qwen3", "bart"])
def test_defect_2_tied_heads(family):
    """The head kept the old full matrix: no saving, and the tie was silently gone."""
    model = make_model(family)
    with partial_vocab(model, VOCAB) as compact:
        assert rows_of(model, "head") is rows_of(model)
        out = model(**compact.remap(make_batch(0, labels="token")))
        assert out.logits.shape[-1] == K
        out.loss.backward()
        with torch.no_grad():
            rows_of(model).add_(1)
    assert rows_of(model, "head") is rows_of(model)


def test_defect_3_every_entry_of_token_ids_is_translated():
    """Only `input_ids` was translated."""
    model = make_model("bart")
    ids = torch.tensor([[30, 36, 20]])
    labels = torch.tensor([[36, -100, 30]])
    batch = {"input_ids": ids, "decoder_input_ids": ids, "labels": labels, "attention_mask": ids > 0}
    with partial_vocab(model, VOCAB) as compact:
        found = compact.remap(batch)
        assert found["input_ids"].tolist() == found["decoder_input_ids"].tolist() == [[9, 10, 8]]
        assert found["labels"].tolist() == [[10, -100, 9]]
        assert found["attention_mask"] is batch["attention_mask"]
        assert (model.config.decoder_start_token_id, model.generation_config.forced_eos_token_id) == (9, 9)
    with partial_vocab(make_model("bert"), VOCAB) as compact:
        classes = {"labels": torch.tensor([2])}
        assert compact.remap(classes)["labels"].tolist() == [2]  # a class, not a token


def test_defect_4_state_dict_of_a_model_within_another():
    """A hook on `state_dict` ignored the prefix: a KeyError in DistributedDataParallel and wrappers."""
    model = make_model("bert")
    wrapper = torch.nn.ModuleDict({"inner": model})
    with partial_vocab(model, VOCAB):
        state = copy.deepcopy(wrapper.state_dict())
        assert state["inner.bert.embeddings.word_embeddings.weight"].shape[0] == K
        with torch.no_grad():
            rows_of(model).zero_()
        wrapper.load_state_dict(state)
    assert torch.equal(rows_of(model), rows_of(make_model("bert")))


class FullRows(TorchDispatchMode):
    """Notes every tensor with V rows that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and V in tensor.shape:
                self.made.append(func)
        return result


def test_defect_5_no_full_matrix_while_training_and_saving(tmp_path):
    """Each checkpoint put the full matrix on the training device."""
    model = make_model("qwen3")
    with partial_vocab(model, VOCAB) as compact:
        with FullRows() as full:
            optimizer = torch.optim.AdamW(model.parameters())
            model(**compact.remap(make_batch(0, labels="token"))).loss.backward()
            optimizer.step()
            model.state_dict()
            model.save_pretrained(tmp_path)
        assert full.made == []
    with FullRows() as full:
        model(**make_batch(0, labels="token"))
    assert full.made != []  # the watch works


def test_defect_6_frozen_embedding_stays_frozen():
    """The new matrix was trainable whatever the old one was, in the block and after it."""
    model = make_model("bert")
    rows_of(model).requires_grad_(False)
    with partial_vocab(model, VOCAB) as compact:
        assert not rows_of(model).requires_grad
        model(**compact.remap(make_batch(0))).loss.backward()
        assert rows_of(model).grad is None
    assert not rows_of(model).requires_grad


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_defect_7_config_follows(family, tmp_path):
    """`config.vocab_size` stayed as it was: losses had a wrong shape, and checkpoints did not load."""
    model = make_model(family)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    with partial_vocab(model, VOCAB):
        assert {config.vocab_size for config in configs.values()} == {K}
        assert model.config.eos_token_id == 9
        model.save_pretrained(tmp_path)
    assert {config.vocab_size for config in configs.values()} == {V}
    assert model.config.eos_token_id == 30
    loaded = type(model).from_pretrained(tmp_path)
    assert rows_of(loaded).shape[0] == loaded.config.vocab_size == K


def test_defect_8_what_the_caller_passes_is_not_edited():
    """`load_state_dict` cut the matrix in the caller's own dict."""
    model = make_model("bert")
    batch = make_batch(0)
    given = {name: tensor.clone() for name, tensor in batch.items()}
    encoding = transformers.BatchEncoding(dict(batch))
    with partial_vocab(model, VOCAB) as compact:
        compact.remap(batch)
        assert type(compact.remap(encoding)) is transformers.BatchEncoding
        state = model.state_dict()
        before = {name: (id(tensor), tensor.shape) for name, tensor in state.items()}
        model.load_state_dict(state)
        assert {name: (id(tensor), tensor.shape) for name, tensor in state.items()} == before
    for name, tensor in given.items():
        assert torch.equal(batch[name], tensor)
        assert torch.equal(encoding[name], tensor)


def test_defect_9_rows_beyond_the_tokenizer():
    """The matrix was taken to have as many rows as the tokenizer has tokens."""
    rows = V + 5  # ids 37..41 are padding rows that no text has
    model = make_model("qwen3", vocab_size=rows)
    base = rows_of(model).detach().clone()
    with partial_vocab(model, make_vocab((*KEPT, 41), rows)) as compact:
        assert rows_of(model).shape[0] == K + 1
        with torch.no_grad():
            rows_of(model).add_(1)
        assert compact.to_original([11]).tolist() == [41]
    assert rows_of(model).shape[0] == rows
    assert torch.equal(rows_of(model)[[*COLD, 37, 40]], base[[*COLD, 37, 40]])
    assert torch.equal(rows_of(model)[[*KEPT, 41]], base[[*KEPT, 41]] + 1)
