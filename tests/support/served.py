"""Trimmed folders of every kind that is served, and answers that read every file of them.

Needs torch and transformers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.folders import make_vocab
from tests.support.models import HIDDEN, save_model
from tests.support.sentence_models import add_modules, save_weights, write_json
from tests.support.translators import save_translator
from trimserve import load
from trimserve.model.resolve import resolve_model
from trimserve_export import export

V = 37
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
TEXTS = ["the cat sat on the mat", "a dog latte", "the dog the cat sat"]
_TEMPLATE = "{% for m in messages %}the {{ m['content'] }} WORD {% endfor %}"


def _generator(model: Any) -> list[Any]:
    messages = [{"role": "user", "content": "cat sat"}]
    return [
        [result.ids for result in model.generate(TEXTS, max_new_tokens=8)],
        model.generate(TEXTS[0], max_new_tokens=8, temperature=0.8, top_k=5, seed=3)[0].ids,
        model.chat(messages, max_new_tokens=5).text,
        [list(map(float, score.log_probs)) for score in model.score(TEXTS)],
    ]


def _translator(model: Any) -> list[Any]:
    return [
        [result.ids for result in model.generate(TEXTS, max_new_tokens=8)],
        [list(map(float, score.log_probs)) for score in model.score(TEXTS, TEXTS)],
    ]


def _masked(model: Any) -> list[Any]:
    filled = model.fill_mask(["the [MASK] sat", "a [MASK]"], top_k=3)
    return [np.asarray(model.forward(TEXTS)[0]).tolist(), repr(filled)]


def _sentence(model: Any) -> list[Any]:
    plain = model.encode(TEXTS)
    return [plain.tolist(), model.encode_query(TEXTS).tolist(), model.similarity(plain, plain).tolist()]


def _llama(root: Path, seed: int, family: str = "llama") -> Path:
    source = save_model(family, root, rows=V, seed=seed)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    template = _TEMPLATE.replace("WORD", ("mat", "latte")[seed % 2])
    path.write_text(json.dumps(config | {"chat_template": template}))
    return source


def _with_modules(root: Path, seed: int) -> Path:
    pooling = ("Pooling", {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True})
    dense = {
        "in_features": HIDDEN,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    add_modules(
        save_model("bert_encoder", root, rows=V, seed=seed), pooling, ("Dense", dense), ("Normalize", {})
    )
    save_weights(root / "2_Dense", seed, linear_weight=(8, HIDDEN), linear_bias=(8,))
    words = ("the ", "a cat ")[seed % 2]
    write_json(root / "config_sentence_transformers.json", {"prompts": {"query": words}})
    return root


@dataclass(frozen=True)
class Kind:
    """A kind of folder: how its model is made, from a path and a seed, and what it is asked."""

    model: Callable[[Path, int], Path]
    answers: Callable[[Any], list[Any]]


KINDS = {
    "generator": Kind(_llama, _generator),
    "encoder": Kind(lambda root, seed: save_model("bert", root, rows=V, seed=seed), _masked),
    "translator": Kind(lambda root, seed: save_translator("t5", root, seed=seed), _translator),
    "sentence": Kind(_with_modules, _sentence),
}


def make(kind: str, root: Path, seed: int = 0, **options: Any) -> Path:
    """Make a model of a kind and trim it."""
    root.mkdir(parents=True, exist_ok=True)
    source = resolve_model(KINDS[kind].model(root / "model", seed))
    vocab = make_vocab(KEPT, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, root / "trimmed", progress=False, **options)
    return root / "trimmed"


def answers(kind: str, path: Path) -> str:
    """Load a folder and ask it; what it says, as text that can be compared."""
    return repr(KINDS[kind].answers(load(path, threads=1)))
