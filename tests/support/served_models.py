"""Served models of every kind: how each is made, and what is asked of it.

Needs torch and the exporter: import it after `pytest.importorskip("torch")`.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.folders import make_vocab
from tests.support.model_calls import (
    Call,
    embedding_calls,
    generator_answers,
    generator_calls,
    mask_answers,
    mask_calls,
    pair_calls,
    sentence_answers,
    tagger_calls,
    translator_answers,
)
from tests.support.models import HIDDEN, save_model
from tests.support.sentence_models import add_modules, save_weights, write_json
from tests.support.translators import save_translator
from trimserve.encoder.encoder import Encoder
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.pipeline import export

_ROWS = 37
_TEMPLATE = "{% for m in messages %}the {{ m['content'] }} WORD {% endfor %}"
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
_BYTES = {"tokenizer": "byte_level_bpe"}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        model: makes one, from a path and a seed; another seed makes one that answers otherwise.
        calls: every way to ask it; None where another kind has the same.
        answers: a few calls that read every file of a folder; None where another kind's folder has the same
            files.
        exporter: of its folder.
        options: of its export.
        seed: the usual one.
    """

    model: Callable[[Path, int], Path]
    calls: Callable[[], Mapping[str, Call]] | None = None
    answers: Callable[[Any], list[Any]] | None = None
    exporter: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def export(self, root: Path, seed: int | None = None) -> Path:
        """Make the trimmed folder."""
        root.mkdir(parents=True, exist_ok=True)
        source = resolve_model(self.model(root / "model", self.seed if seed is None else seed))
        structural = structural_ids(source)
        others = np.setdiff1d(np.arange(source.vocab_size), structural)
        kept = np.union1d(structural, others[::3])
        vocab = make_vocab(kept.tolist(), source.vocab_size, source.tokenizer_sha256)
        export(source, vocab, root / "trimmed", exporter=self.exporter, progress=False, **self.options)
        return root / "trimmed"


def _with_template(root: Path, seed: int) -> Path:
    source = save_model("llama", root, rows=_ROWS, seed=seed)
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
        save_model("bert_encoder", root, rows=_ROWS, seed=seed), pooling, ("Dense", dense), ("Normalize", {})
    )
    save_weights(root / "2_Dense", seed, linear_weight=(8, HIDDEN), linear_bias=(8,))
    words = ("the ", "a cat ")[seed % 2]
    write_json(root / "config_sentence_transformers.json", {"prompts": {"query": words}})
    return root


def _model(family: str, **options: Any) -> Callable[[Path, int], Path]:
    return lambda path, seed: save_model(family, path, seed=seed, **options)


KINDS: dict[str, Kind] = {
    "untied": Kind(_model("llama", **_BYTES), generator_calls, seed=1),
    "tied": Kind(_model("llama_tied", **_BYTES), generator_calls, seed=1),
    "int4": Kind(
        _model("qwen3", **_BYTES, **_WIDE | {"head_dim": 32}),
        generator_calls,
        options={"quantize": "int4"},
        seed=1,
    ),
    "no_cold": Kind(
        _model("gpt2", **_BYTES),
        functools.partial(generator_calls, exact=False),
        options={"cold": False},
        seed=1,
    ),
    "seq2seq": Kind(
        lambda path, seed: save_translator("t5", path, seed=seed),
        functools.partial(generator_calls, pairs=True),
        translator_answers,
    ),
    "embeddings": Kind(_model("bert_encoder", rows=_ROWS), embedding_calls),
    "pairs": Kind(_model("bert_classifier", rows=_ROWS, num_labels=1), pair_calls),
    "tagger": Kind(_model("bert_tagger", rows=_ROWS), tagger_calls),
    "masks": Kind(_model("bert", rows=_ROWS), mask_calls, mask_answers),
    # Past and present share their buffers: a graph of onnxruntime-genai's builder.
    "shared_kv": Kind(
        _model("llama_tied", **_BYTES, **_WIDE | {"num_key_value_heads": 1}),
        functools.partial(generator_calls, beams=False),
        exporter="genai",
        seed=1,
    ),
    "chat": Kind(_with_template, answers=generator_answers),
    "chat_int4": Kind(_with_template, answers=generator_answers, options={"quantize": "int4"}),
    "sentence": Kind(_with_modules, answers=sentence_answers),
}
# Those of each library's calls that are made without transformers 5.
USUAL = tuple(name for name, kind in KINDS.items() if kind.calls and kind.exporter == "auto")
# One of each combination of files that a folder can have.
FILES = ("chat", "masks", "seq2seq", "sentence")


def open_model(folder: Path, threads: int = 1) -> Encoder | Generator:
    """A model that nobody has used yet."""
    return load(folder, threads=threads)


def told(kind: str, model: Encoder | Generator) -> str:
    """The short answers of a model, as text that can be compared."""
    ask = KINDS[kind].answers
    assert ask is not None
    return repr(ask(model))


def answers(kind: str, folder: Path) -> str:
    """Load a folder and ask it; see `told`."""
    return told(kind, open_model(folder))
