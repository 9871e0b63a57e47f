"""Checkpoints with a cut tokenizer, as transformers 4 and 5 load them; no exporter needed."""

import json

import pytest

pytest.importorskip("torch")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import save_model
from tests.support.realdata import TOKENIZERS, corpus_slices
from tests.support.tiny_tokenizers import CHAT_TEMPLATE, TEXT
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.trim import trim_checkpoint
from trimserve_export.layouts.closure import close_vocab
from trimserve_export.layouts.tokenizer_cut import write_cut_tokenizer

pytestmark = pytest.mark.export

MODELS = {
    "llama": (
        "sentencepiece_bpe",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "qwen3": ("byte_level_bpe", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}),
    "gpt2": ("byte_level_bpe", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}),
}
TEXTS = ["The cat sat on the mat", "a dog and a cat", "What is the total", "unseen Ωmega 🦊"]


def closed_vocab(source: ModelSource, texts, coverage=0.9) -> VocabMap:
    counted = profile([], source, texts=texts, progress=False)
    return close_vocab(select(counted, coverage=coverage, multiple_of=8), source, counted)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_is_that_of_the_masked_full_model(family, tmp_path):
    kind, settings = MODELS[family]
    source = resolve_model(save_model(family, tmp_path / "model", tokenizer=kind))
    settings = settings | {"chat_template": CHAT_TEMPLATE}
    (source.path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab = closed_vocab(source, [TEXT[:140]])
    (tmp_path / "cut").mkdir()
    trim_checkpoint(source, vocab, tmp_path / "cut", progress=False)
    write_cut_tokenizer(source, vocab, tmp_path / "cut")
    full, cut = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (source.path, tmp_path / "cut")
    )
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (source.path, tmp_path / "cut")]
    assert cut.get_output_embeddings().weight.shape[0] == len(vocab) < vocab.vocab_size
    compared = 0
    for text in TEXTS:
        before, after = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
        assert tokenizers[1].decode(after) == tokenizers[0].decode(before)
        if vocab.to_original(after).tolist() == before:
            assert vocab.to_original(greedy(cut, after)).tolist() == greedy(full, before, vocab)
            compared += 1
    assert compared >= 2


def greedy(model, ids, vocab: VocabMap | None = None, steps: int = 8) -> list[int]:
    """Greedy ids without an end; with a vocab, among its kept ids alone."""
    ids = list(ids)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(steps):
            logits = model(torch.tensor([ids])).logits[0, -1]
            if vocab is not None:
                logits[vocab.cold_ids.astype("int64")] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[start:]


def test_chat_templates_survive(tmp_path):
    kind, settings = MODELS["qwen3"]
    source = resolve_model(save_model("qwen3", tmp_path / "model", tokenizer=kind))
    (source.path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": CHAT_TEMPLATE})
    )
    vocab = closed_vocab(source, [TEXT[:140]])
    (tmp_path / "cut").mkdir()
    write_cut_tokenizer(source, vocab, tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_bytes((source.path / "config.json").read_bytes())
    messages = [{"role": "user", "content": "The cat"}]
    full, cut = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for path in (source.path, tmp_path / "cut")
    )
    assert vocab.to_original(cut).tolist() == full


@pytest.mark.realdata
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_in_transformers(data_dir, tmp_path, name):
    source = resolve_model(data_dir / "tokenizers" / name, weights=False)
    slices = corpus_slices(data_dir, 4_000)
    vocab = closed_vocab(source, slices["banking77-en"], coverage=0.99)
    tokenizer = write_cut_tokenizer(source, vocab, tmp_path)
    if source.read_json("tokenizer_config.json").get("tokenizer_class"):
        loaded = AutoTokenizer.from_pretrained(tmp_path)
    else:  # some folders have tokenizer.json alone
        loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert sorted(loaded.get_vocab().values()) == list(range(len(vocab)))
    for texts in slices.values():
        for line in texts[0].splitlines()[:20]:
            assert loaded(line)["input_ids"] == tokenizer.encode(line).ids
