"""Exact mode on a trained model and real text: every id equals the full model's, in torch.

The full model is run once over prompt and output: if its argmax at every position is the next id, the output
is its greedy output, by induction.
"""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.generators import open_generator
from tests.support.rounding import model_bound
from trimserve.generation.generator import Generator
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve_export.pipeline import export

pytestmark = [pytest.mark.export, pytest.mark.realdata]

TOKENS = 64
PROMPTS = 200


@pytest.fixture(scope="module")
def model_dir(data_dir):
    return data_dir / "models" / "multidomain-qwen2"


@pytest.fixture(scope="module")
def full_model(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gsm8k(data_dir, model_dir):
    return profile([data_dir / "corpora" / "gsm8k-en" / "text.txt"], model_dir, progress=False)


def prompts_of(data_dir: Path, count: int) -> list[str]:
    """The same number of prompts from every corpus, spread over it, of unequal length."""
    files = sorted(data_dir.glob("corpora/*/*.txt"))
    files = [file for file in files if file.name != "SOURCE.txt"]
    corpora = sorted({file.parent for file in files})
    prompts: list[str] = []
    for number, corpus in enumerate(corpora):
        each = count // len(corpora) + (number < count % len(corpora))
        text = "".join(file.read_text("utf-8") for file in files if file.parent == corpus)
        for place in range(each):
            start = text.find("\n", len(text) * place // each) + 1
            prompts.append(text[start : start + 20 + 17 * (place % 9)])
    return prompts


def first_difference(model, prompt: np.ndarray, output: np.ndarray) -> tuple[int, float, float] | None:
    """Where the full model's greedy id is another: the place, the gap of the two logits, and the bound."""
    ids = torch.tensor(np.concatenate([prompt, output])[None].astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    wrong = np.flatnonzero(logits.argmax(-1).numpy() != output)
    if wrong.size == 0:
        return None
    place = int(wrong[0])
    row, seen = logits[place], ids[:, : len(prompt) + place]
    two = torch.stack([row.argmax(), torch.tensor(output[place])])
    bound = 2 * model_bound(model, lambda changed: changed(seen).logits[0, -1, two], draws=3)
    return place, float(row.max() - row[output[place]]), bound


def assert_greedy_of_full(model, generator: Generator, prompts: list[str]) -> tuple[int, int]:
    """Compare all prompts; returns rejected drafts and ties within rounding."""
    rejected = ties = 0
    encoded = generator.codec.encode(prompts)
    for start in range(0, len(prompts), 20):
        results = generator.generate(prompts[start : start + 20], max_new_tokens=TOKENS)
        for ids, result in zip(encoded[start : start + 20], results, strict=True):
            rejected += result.rejected
            found = first_difference(model, ids, np.array(result.ids, np.int32))
            if found is not None:
                place, gap, bound = found
                assert gap <= bound, (
                    f"token {place}: the logits are {gap} apart, more than rounding ({bound})"
                )
                ties += 1
            assert result.stopped == "eos" or len(result.ids) == TOKENS
    return rejected, ties


@pytest.mark.parametrize(
    ("coverage", "prompts"),
    [
        (0.99, 26),
        pytest.param(0.99, PROMPTS, marks=pytest.mark.slow),
        pytest.param(0.9, PROMPTS, marks=pytest.mark.slow),
    ],
)
def test_greedy_ids_on_every_corpus_equal_the_full_models(
    coverage, prompts, data_dir, model_dir, full_model, gsm8k, tmp_path
):
    export(model_dir, select(gsm8k, coverage=coverage), tmp_path / "out", progress=False)
    generator = open_generator(tmp_path / "out")
    rejected, ties = assert_greedy_of_full(full_model, generator, prompts_of(data_dir, prompts))
    assert rejected > prompts / 2, "hardly a cold token was produced: this says nothing about the check"
    assert ties <= max(1, prompts // 50)


@pytest.mark.slow
def test_with_128_kept_ids_nearly_every_token_is_cold_and_still_right(
    data_dir, model_dir, full_model, tmp_path
):
    """Hostile: the first token, the eos and most others are cold."""
    source = resolve_model(str(model_dir))
    vocab = make_vocab(list(range(128)), source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "out", progress=False)
    generator = open_generator(tmp_path / "out")
    rejected, ties = assert_greedy_of_full(full_model, generator, prompts_of(data_dir, 26))
    assert rejected > 300
    assert ties <= 1
