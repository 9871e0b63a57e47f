"""Trimmed generators for tests, and the full model to hold them against.

Needs torch and the exporter: call `pytest.importorskip("torch")` before importing this module.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import GENERATE, save_model
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.sampling import SamplingParams, choose
from trimserve.folder.opening import open_folder
from trimserve.generation.generator import Generator
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder, Step
from trimserve.runtime.session import open_session
from trimserve.text.codec import Codec
from trimserve_export.full_model import export_full
from trimserve_export.pipeline import export
from trimserve_export.serving.quantize import quantization_of
from trimserve_export.verify.rounding import GraphBound


@dataclass(frozen=True)
class Pair:
    """A trimmed generator, the folder of its full model, and that model's graph and torch form."""

    generator: Generator
    model_path: Path
    full_graph: Path

    @property
    def vocab_size(self) -> int:
        return self.generator.folder.vocab.vocab_size

    def torch_model(self) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32).eval()


def open_generator(path: Path, **options) -> Generator:
    folder = open_folder(path)
    session = open_session(folder.path / "model.onnx")
    return Generator(folder, Decoder(session), Codec(folder), ColdRows(folder), **options)


def make_pair(
    root: Path,
    family: str,
    *,
    kept_ids: Sequence[int] | None = None,
    kept: int | None = None,
    output_ids: Sequence[int] | None = None,
    quantize: str | None = None,
    vocab_bits: int | None = None,
    **options,
) -> Pair:
    """Make, trim and export a tiny model; `kept` adds random ids to the structural ones up to that many."""
    model_path = save_model(family, root / "model", **options)
    source = resolve_model(str(model_path))
    if kept_ids is None:
        structural = structural_ids(source)
        others = np.setdiff1d(np.arange(source.vocab_size), structural)
        picked = np.random.default_rng(1).choice(others, max(0, (kept or 0) - structural.size), replace=False)
        kept_ids = sorted([*structural.tolist(), *picked.tolist()])
    vocab = make_vocab(kept_ids, source.vocab_size, source.tokenizer_sha256)
    if output_ids is not None:
        vocab = dataclasses.replace(vocab, output_ids=np.array(output_ids, np.int32))
    export(source, vocab, root / "trimmed", quantize=quantize, vocab_bits=vocab_bits, progress=False)
    (root / "full").mkdir()
    scheme = quantization_of(quantize, vocab_bits) if quantize else None
    generator = open_generator(root / "trimmed")
    exporter = generator.folder.manifest.exporter["name"]
    full = export_full(source, root / "full", GENERATE, "fp32", scheme, exporter=exporter)
    return Pair(generator, model_path, full)


def greedy_by_torch(model: transformers.PreTrainedModel, ids: np.ndarray, tokens: int) -> list[int]:
    """The full model's greedy ids, by transformers."""
    stops = model.generation_config.eos_token_id
    with torch.no_grad():
        out = model.generate(
            torch.tensor(ids[None].astype(np.int64)),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


class FullSampler:
    """The same sampler on the untrimmed ONNX graph, a token at a time: nothing drafted, nothing checked."""

    def __init__(self, graph: Path, vocab_size: int) -> None:
        self._graph = graph
        self._decoder = Decoder(open_session(graph))
        self._columns = Columns(np.arange(vocab_size, dtype=np.int32), vocab_size)

    def run(
        self, prompt: np.ndarray, params: SamplingParams, tokens: int, stop_ids: frozenset[int]
    ) -> list[int]:
        cache = self._decoder.empty_cache(1)
        step = self._decoder.step(cache, prompt[None].astype(np.int64), self._decoder.no_rows)
        output: list[int] = []
        while len(output) < tokens:
            past = History(prompt, np.array(output, np.int32))
            output.append(choose(step.logits[0, -1], self._columns, params, past))
            if output[-1] in stop_ids or len(output) == tokens:
                break
            step = self._decoder.step(cache, np.array([[output[-1]]], np.int64), self._decoder.no_rows)
        return output

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every position, float32 (T, V)."""
        return self._all(ids).logits[0]

    def rounding(self, ids: np.ndarray, dtype: str = "fp32") -> float:
        """How far another order of the head's sums may move a logit of any position."""
        return GraphBound(self._graph, dtype).of(self._all(ids).hidden)

    def _all(self, ids: np.ndarray) -> Step:
        cache = self._decoder.empty_cache(1)
        return self._decoder.step(cache, ids[None].astype(np.int64), self._decoder.no_rows, keep=0)
