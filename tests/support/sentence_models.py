"""Tiny sentence-transformers folders, trimmed, and what the library itself gives for them in torch.

Needs torch, transformers and sentence-transformers: import it after `pytest.importorskip`.
"""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.encoder.encoder import Encoder
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.names import SENTENCE_NAME, SENTENCE_TENSORS_NAME
from trimserve.folder.opening import list_files
from trimserve.folder.sentence import write_settings
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.checkpoint.sentence_config import read_declared
from trimserve_export.pipeline import export

V, HIDDEN = 37, 16
OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
TEXTS = [
    "The cat sat on the mat.",
    "",
    "a",
    "latte? 😀 世界 the\n\n  done",
    "the dog " * 12,
    "[SEP] the [MASK] sat",
]
PAIRS = [
    ("the cat", "sat on the mat."),
    ("", "a dog"),
    ("the dog sat on the cat " * 4, "a latte"),
    ("a", "the mat the dog the cat " * 9),
]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change_json(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def add_modules(
    folder: Path, *modules: tuple[str, Mapping[str, Any]], first: str = f"{OLD}.Transformer"
) -> Path:
    """Write modules.json and the configs of the modules behind the first; weights are `save_weights`'."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": first}]
    for index, (kind, config) in enumerate(modules, 1):
        path = f"{index}_{kind.rpartition('.')[2]}"
        kind = kind if "." in kind else f"{OLD}.{kind}"
        listed.append({"idx": index, "name": str(index), "path": path, "type": kind})
        write_json(folder / path / "config.json", config)
    write_json(folder / "modules.json", listed)
    return folder


def save_weights(folder: Path, seed: int = 0, **shapes: Sequence[int]) -> None:
    rng = np.random.default_rng(seed)
    tensors = {name.replace("_", ".", 1): 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    save_file(
        {name: values.astype(np.float32) for name, values in tensors.items()}, folder / "model.safetensors"
    )


def encoder_folder(path: Path, *modules: tuple[str, Mapping[str, Any]], **options: Any) -> Path:
    return add_modules(save_model("bert_encoder", path, rows=V), *modules, **options)


def trimmed(source: Path, target: Path, **options: Any) -> Encoder:
    """Export a folder with its structural ids and every third of the others, and load it."""
    model = resolve_model(source)
    kept = np.union1d(structural_ids(model), np.arange(0, model.vocab_size, 3)).astype(np.int32)
    vocab = make_vocab(kept, model.vocab_size, model.tokenizer_sha256)
    export(source, vocab, target, progress=False, **options)
    encoder = load(target)
    assert isinstance(encoder, Encoder)
    return encoder


def library(source: Path, kind: str = "SentenceTransformer") -> Any:
    """Load a folder in sentence-transformers, on the CPU and in fp32."""
    import sentence_transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(sentence_transformers, kind)(
            str(source), device="cpu", model_kwargs={"torch_dtype": torch.float32}
        )
    return model.eval()


def assert_close(found: np.ndarray, expected: np.ndarray, atol: float = 1e-5) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """How far two results lie apart; far where their shapes differ."""
    return float(np.abs(first - second).max()) if first.shape == second.shape else np.inf


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def redeclared(source: Path, like: Path, target: Path) -> Encoder:
    """The trimmed folder `like` with what `source`, a folder of the same weights, declares."""
    copy(like, target)
    manifest = read_manifest(target)
    found = resolve_model(source)
    declared = read_declared(found, manifest.task, load_config(found.path))
    for name in (SENTENCE_NAME, SENTENCE_TENSORS_NAME):
        (target / name).unlink(missing_ok=True)
    if declared is not None:
        write_settings(target, declared.settings, declared.tensors)
    write_manifest(target, dataclasses.replace(manifest, files=list_files(target)))
    encoder = load(target)
    assert isinstance(encoder, Encoder)
    return encoder
