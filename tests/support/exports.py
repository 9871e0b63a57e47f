"""Exports that tests share: the tiny model of a family, its trimmed folder and the full model's graph.

Needs torch and transformers: use it through the session fixture `exported` of conftest.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import FAMILIES, save_model
from trimserve.files.tensors import map_tensor, read_header, to_float32
from trimserve.folder.names import COLD_NAME
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.vocab.map import VocabMap
from trimserve_export import export, export_full

V = 37
# K = 11; ids 0..5 stay in place because positions of RoBERTa's kind are counted from pad id 5.
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
# A pad id other than the tokenizer's 0 where positions are counted from it.
_PADS = {"roberta": 5, "xlm_roberta": 1, "mpnet": 1, "mpnet_encoder": 1}


@dataclass(frozen=True)
class Exported:
    """One family's model, exported with all rows and with the kept ones."""

    family: str
    source: Path
    folder: TrimmedFolder
    full_graph: Path

    @property
    def task(self) -> str:
        return FAMILIES[self.family].task

    @property
    def vocab(self) -> VocabMap:
        return self.folder.vocab

    @cached_property
    def trimmed(self) -> ort.InferenceSession:
        return open_graph(self.folder.path / "model.onnx")

    @cached_property
    def full(self) -> ort.InferenceSession:
        return open_graph(self.full_graph)

    @cached_property
    def cold(self) -> dict[str, np.ndarray]:
        return read_float32(self.folder.path / COLD_NAME)

    @cached_property
    def torch_model(self) -> transformers.PreTrainedModel:
        model_class = getattr(transformers, FAMILIES[self.family].model_class)
        with torch.inference_mode(False):  # weights made in that mode cannot be changed later
            return model_class.from_pretrained(self.source, dtype=torch.float32).eval()

    def cold_rows(self, cold_ids: np.ndarray, name: str = "embedding") -> np.ndarray:
        """Rows of cold ids; one zero row if there are none, as the graph wants."""
        rows = self.cold[name][np.searchsorted(self.vocab.cold_ids, cold_ids)]
        return rows if len(rows) else np.zeros((1, self.cold[name].shape[1]), np.float32)

    def run_trimmed(self, ids: np.ndarray, **feeds: Any) -> dict[str, np.ndarray]:
        """Run the trimmed graph on token ids, cold ones through slots."""
        slotted = self.vocab.with_slots(ids)
        return run(self.trimmed, slotted.ids, cold_rows=self.cold_rows(slotted.cold_ids), **feeds)

    def run_full(self, ids: np.ndarray, **feeds: Any) -> dict[str, np.ndarray]:
        """Run the full model's graph on token ids."""
        return run(
            self.full, ids, cold_rows=np.zeros((1, self.cold["embedding"].shape[1]), np.float32), **feeds
        )


class Exports:
    """Makes each family's exports once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Exported] = {}

    def __call__(self, family: str) -> Exported:
        if family not in self._made:
            self._made[family] = self._make(family, self._root / family)
        return self._made[family]

    def _make(self, family: str, root: Path) -> Exported:
        pad = {"pad_token_id": _PADS[family]} if family in _PADS else {}
        source = save_model(family, root / "model", rows=V, **pad)
        export(source, make_vocab(KEPT, V), root / "trimmed")
        folder = open_folder(root / "trimmed")
        (root / "full").mkdir()
        exporter = folder.manifest.exporter["name"]
        full = export_full(
            resolve_model(source), root / "full", folder.manifest.task, "fp32", exporter=exporter
        )
        return Exported(family, source, folder, full)


def open_graph(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(
    session: ort.InferenceSession,
    ids: np.ndarray,
    *,
    cold_rows: np.ndarray,
    mask: np.ndarray | None = None,
    logits_to_keep: int = 0,
    past: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Run a servable graph; `ids` (B, T) are compact ids, `past` the present.* outputs of an earlier run."""
    seen = next(iter(past.values())).shape[2] if past else 0
    mask = np.ones((ids.shape[0], seen + ids.shape[1]), np.int64) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, seen:]
    known = {
        "input_ids": ids.astype(np.int64),
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": np.zeros(ids.shape, np.int64),
        "cold_rows": cold_rows,
        "logits_to_keep": np.array(logits_to_keep, np.int64),
    }
    feeds = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            name = value.name.replace("past_key_values", "present")
            feeds[value.name] = past[name] if past else _empty_past(value.shape, ids.shape[0])
        else:
            feeds[value.name] = known[value.name]
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _empty_past(shape: list[Any], batch: int) -> np.ndarray:
    return np.zeros([batch, shape[1], 0, shape[3]], np.float32)


def read_float32(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file as float32, BF16 too."""
    return {
        name: to_float32(np.array(map_tensor(spec)), spec.dtype)
        for name, spec in read_header(path)[0].items()
    }
