"""The matrix: family x exporter x quantisation x layout, each trimmed and compared with the full model.

`python -m bench.matrix` writes the outcomes that docs/matrix.md shows; test_matrix.py holds them against what
it finds. Needs torch: call `pytest.importorskip("torch")` before importing this module.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.support.models import FAMILIES, save_model
from tests.support.translators import save_translator
from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError
from trimserve.files.hashes import sha256_file
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK, has_vocab_head
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.model.structural import structural_ids
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import open_session
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export import full_model as reference
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.exporters import choice
from trimserve_export.exporters.exporter import EXPORTERS, Exporter, GraphJob, load_exporter
from trimserve_export.from_graph.trimmed import serve_full
from trimserve_export.full_model import export_full
from trimserve_export.layouts.closure import close_vocab
from trimserve_export.layouts.writing import write_layout_graph
from trimserve_export.pipeline import export
from trimserve_export.serving.quantize import quantization_of
from trimserve_export.verify.plain_run import GraphModel, Model, Seq2SeqModel

QUANTISATIONS = ("fp32", "int4", "int8")
LAYOUTS = ("runtime", "tokenizer", "graph")
V = 352
# Of K, as `select` makes it one of 128: MatMulNBits rounds the columns of an incomplete tile differently.
_MULTIPLE = 32
_TOKENS = 12
# Heads of 16 numbers, which the builder's attention wants.
_SIZES = {"hidden_size": 32, "num_attention_heads": 2}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": _SIZES,
    "llama_tied": _SIZES,
    "gemma3": _SIZES | {"head_dim": 16},
    "gpt2": {"n_embd": 32},
    "bert": {},
    "bert_encoder": {},
    "t5": {},
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    family: str
    exporter: str
    quantisation: str
    layout: str

    @property
    def quantize(self) -> str | None:
        return None if self.quantisation == "fp32" else self.quantisation

    def __str__(self) -> str:
        return "-".join((self.family, self.exporter, self.quantisation, self.layout))


CELLS = tuple(Cell(*names) for names in product(MODELS, EXPORTERS, QUANTISATIONS, LAYOUTS))
# Folders of other tools' graphs among the real data: name -> (graph, V).
FOLDERS = {
    "llama-32k-fp16-extdata": ("model.onnx", 32000),
    "tiny-random-gpt2-fp32": ("past.onnx", 1000),
    "tiny-random-lfm2-fp32": ("decoder.onnx", 1000),
}
# transformers' exporter takes ten seconds a model.
_TRACED_IN_CI = ("llama_tied", "gemma3", "bert")


def is_quick(cell: Cell) -> bool:
    """Whether a cell belongs to the tests that run by default."""
    return cell.family == "llama_tied" and (cell.exporter != "transformers" or cell.quantisation == "fp32")


def is_in_ci(cell: Cell) -> bool:
    """Whether a cell is tested at all; the others are run by `python -m bench.matrix` alone."""
    return cell.exporter != "transformers" or cell.family in _TRACED_IN_CI


@dataclass(frozen=True)
class Made:
    """A family's tiny model, and a vocab that every layout takes as it is."""

    source: ModelSource
    task: str
    vocab: VocabMap


@dataclass(frozen=True)
class Workbench:
    """Models, full graphs and what exporters made of a checkpoint, each once."""

    root: Path
    _models: dict[str, Made] = field(default_factory=dict)
    _full: dict[Cell, Path] = field(default_factory=dict)
    _exporters: dict[str, "_Remembering"] = field(default_factory=dict)

    def outcome(self, cell: Cell) -> str:
        """Trim, export and compare one combination.

        Returns:
            ``"ok"``, ``"refused: REASON"``, or ``"not available: REASON"`` where the exporter has no export
            of the model.
        """
        made = self.model(cell.family)
        try:
            load_exporter(cell.exporter).check_model(load_config(made.source.path), made.task)
        except UnsupportedModelError as error:
            return f"not available: {error}"
        try:
            folder = self._trimmed(cell, made)
        except UnsupportedModelError as error:
            return f"refused: {error}"
        full = self.full_model(cell)
        compare(folder, full)
        if made.task == GENERATION_TASK and cell.layout == "runtime":
            compare_generation(folder, full)
        return "ok"

    def full_model(self, cell: Cell) -> Model:
        """The untrimmed model that a cell is compared with."""
        return _open(self._full_folder(cell, self.model(cell.family)), {}, VocabMap.everything(V))

    def model(self, family: str) -> Made:
        """A family's model."""
        if family not in self._models:
            self._models[family] = _make(family, self.root / family)
        return self._models[family]

    def _trimmed(self, cell: Cell, made: Made) -> TrimmedFolder:
        with self._remembering(choice):
            result = export(
                made.source,
                made.vocab,
                self.root / str(cell),
                exporter=cell.exporter,
                quantize=cell.quantize,
                layout=cell.layout,
                task=made.task,
                progress=False,
            )
        return open_folder(result.path)

    @contextlib.contextmanager
    def _remembering(self, module: ModuleType) -> Iterator[None]:
        """Let a module that loads exporters load those that trace a checkpoint once."""
        module.load_exporter = self._exporter
        try:
            yield
        finally:
            module.load_exporter = load_exporter

    def _exporter(self, name: str) -> "_Remembering":
        if name not in self._exporters:
            self._exporters[name] = _Remembering(load_exporter(name), self.root / f"made-by-{name}")
        return self._exporters[name]

    def _full_folder(self, cell: Cell, made: Made) -> Path:
        """The untrimmed model, exported and quantised alike, with nothing else done to its graph.

        In the runtime's layout encoders have the serving passes, too: without these ONNX Runtime fuses the
        embedding with the first normalisation, and rounds differently. Decoders of transformers' exporter
        have them because they are fused there.
        """
        served = cell.layout == "runtime" and (
            made.task != GENERATION_TASK or cell.exporter == "transformers"
        )
        key = Cell(cell.family, cell.exporter, cell.quantisation, "served" if served else "full")
        if key not in self._full:
            self._full[key] = self.root / str(key)
            self._full[key].mkdir()
            self._export_full(cell, made, self._full[key], served=served)
        return self._full[key]

    def _export_full(self, cell: Cell, made: Made, target: Path, *, served: bool) -> None:
        scheme = quantization_of(cell.quantize) if cell.quantize is not None else None
        if served:
            with self._remembering(reference):
                export_full(made.source, target, made.task, "fp32", scheme, exporter=cell.exporter)
            return
        exporter = self._exporter(cell.exporter)
        job = GraphJob(made.task)
        graph = exporter.export_checkpoint(made.source.path, target / "exported", job)
        write_layout_graph(
            graph,
            target,
            VocabMap.everything(V),
            drop_in=False,
            has_head=has_vocab_head(made.task),
            scheme=scheme,
        )


class _Remembering:
    """An exporter that traces the same checkpoint once: layouts and quantisation come after it."""

    def __init__(self, exporter: Exporter, root: Path) -> None:
        self.QUANTIZES = exporter.QUANTIZES
        self.check_model = exporter.check_model
        self.check_job = exporter.check_job
        self.versions = exporter.versions
        self._exporter = exporter
        self._root = root
        self._made: dict[tuple[str, GraphJob], tuple[Path, Path]] = {}

    def export_checkpoint(self, folder: Path, output: Path, job: GraphJob) -> Path:
        if not self.QUANTIZES:
            job = GraphJob(job.task, job.dtype)
        key = "".join(sha256_file(path) for path in sorted(folder.glob("*.safetensors"))), job
        if key not in self._made:
            kept = self._root / str(len(self._made))
            graph = self._exporter.export_checkpoint(folder, kept, job)
            self._made[key] = kept, graph.relative_to(kept)
        kept, graph = self._made[key]
        shutil.copytree(kept, output, dirs_exist_ok=True)
        return output / graph


def _make(family: str, path: Path) -> Made:
    if family in FAMILIES:
        save_model(family, path, tokenizer="byte_level_bpe", rows=V, **MODELS[family])
        task = FAMILIES[family].task
    else:
        save_translator(family, path, tokenizer="byte_level_bpe", rows=V, **MODELS[family])
        task = TEXT2TEXT_TASK
    source = resolve_model(path)
    named = np.array(sorted(source.tokenizer().get_vocab().values()), np.int32)
    structural = structural_ids(source)
    others = np.setdiff1d(named, structural)
    kept = np.union1d(structural, others[: -len(structural) % _MULTIPLE]).astype(np.int32)
    rule = {"options": {"multiple_of": _MULTIPLE}}
    chosen = VocabMap(kept, np.full(len(kept), Reason.EXPLICIT, np.uint8), V, source.tokenizer_sha256, rule)
    closed = close_vocab(chosen, source, None)
    assert len(closed) % _MULTIPLE == 0, len(closed)
    assert closed.cold_ids.size, "nothing is cold"
    return Made(source, task, closed)


def _open(path: Path, graphs: Mapping[str, str], vocab: VocabMap, cold: ColdRows | None = None) -> Model:
    """The model of a folder; of a plain one the graph, or the encoder-decoder's two."""
    if not graphs:
        split = (path / "encoder_model.onnx").is_file()
        graphs = {part: f"{part}_model.onnx" for part in ("encoder", "decoder")} if split else {}
    models = {part: GraphModel(open_session(path / name), vocab, cold) for part, name in graphs.items()}
    if "encoder" in models:
        return Seq2SeqModel(models["encoder"], models["decoder"], start_id=0)
    return models.get("model") or GraphModel(open_session(path / "model.onnx"), vocab, cold)


def compare(folder: TrimmedFolder, full: Model) -> None:
    """Every output on random ids: kept logits and all else equal bit for bit, the other logits -inf."""
    vocab, layout = folder.vocab, folder.manifest.layout
    cold = ColdRows(folder) if layout == "runtime" and folder.has_cold else None
    known = vocab if layout == "runtime" else VocabMap.everything(V if layout == "graph" else len(vocab))
    trimmed = _open(folder.path, folder.manifest.graphs, known, cold)
    for ids in _sequences(vocab, with_cold=layout != "tokenizer"):
        expected = full.run(ids)
        found = trimmed.run(vocab.to_compact(ids) if layout == "tokenizer" else ids)
        for name in expected:
            wanted, got = expected[name], found[name]
            if name == "logits" and wanted.shape[-1] == V:
                wanted = wanted[..., vocab.kept_ids]
                if layout == "graph":
                    assert np.isneginf(got[..., vocab.cold_ids]).all()
                    got = got[..., vocab.kept_ids]
            assert np.array_equal(got, wanted), f"{name} differs by {np.abs(got - wanted).max()}"


def _sequences(vocab: VocabMap, *, with_cold: bool) -> Iterator[Ids]:
    random = np.random.default_rng(0)
    yield random.choice(vocab.kept_ids, _TOKENS).astype(np.int32)
    if with_cold:
        yield random.permutation(np.concatenate([vocab.kept_ids[:_TOKENS], vocab.cold_ids[:2]]))


def compare_generation(folder: TrimmedFolder, full: GraphModel) -> None:
    """Exact mode gives the tokens that the full graph gives one after the other."""
    model = load(folder.path)
    (generated,) = model.generate("the cat sat", mode="exact", max_new_tokens=_TOKENS)
    ids = model.codec.encode(["the cat sat"])[0]
    past: dict[str, Any] = {}
    expected: list[int] = []
    while len(expected) < len(generated.ids):
        past = full.run(ids, past)
        expected.append(int(past["logits"][0, -1].argmax()))
        ids = np.array(expected[-1:], np.int32)
    assert list(generated.ids) == expected


def folder_outcome(name: str, data: Path, layout: str, root: Path) -> str:
    """Trim a folder of another tool's graph and compare.

    Args:
        name: one of `FOLDERS`.
        data: the folder of `FOLDERS`.
        layout: one of `LAYOUTS`.
        root: an empty folder to work in.

    Returns:
        See `Workbench.outcome`.
    """
    graph, rows = FOLDERS[name]
    source = resolve_model(_with_tokenizer(data / name, root / "model", rows) / graph)
    structural = structural_ids(source)
    others = np.setdiff1d(np.arange(rows), structural)[:: rows // 100]
    kept = np.union1d(structural, others)
    kept = np.union1d(kept, np.setdiff1d(np.arange(rows), kept)[: -len(kept) % _MULTIPLE]).astype(np.int32)
    reason = np.full(len(kept), Reason.EXPLICIT, np.uint8)
    vocab = VocabMap(kept, reason, rows, source.tokenizer_sha256, {"options": {"multiple_of": 32}})
    try:
        folder = open_folder(export(source, vocab, root / "out", layout=layout, progress=False).path)
    except UnsupportedModelError as error:
        return f"refused: {str(error).removeprefix(f'{source.graph}: ')}"
    kept = folder.vocab.kept_ids
    places = np.random.default_rng(0).integers(0, len(kept), (1, _TOKENS))
    full = data / name / graph
    if folder.manifest.dtype == "fp16" and layout != "tokenizer":
        # On a CPU fp16 is rounded where ONNX Runtime casts, which new nodes move.
        full = serve_full(source, root / "full", task=folder.manifest.task)
    expected = _run(full, kept[places])
    found = _run(folder.path / "model.onnx", kept[places] if layout == "graph" else places)
    columns = kept if layout == "graph" else np.arange(len(kept))
    assert np.array_equal(found["logits"][..., columns], expected["logits"][..., kept])
    return "ok"


def _with_tokenizer(source: Path, target: Path, rows: int) -> Path:
    """Links to a folder's files; where it has no tokenizer, one with a word an id."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    if not (target / "tokenizer.json").exists():
        words = {f"w{id_}": id_ for id_ in range(rows)}
        Tokenizer(WordLevel(words, unk_token="w0")).save(str(target / "tokenizer.json"))
    return target


_NUMBERS = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def _run(path: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Run a decoder of any tool on an empty cache."""
    session = open_session(path.resolve())
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "logits_to_keep": np.array(0),
    }
    feeds = {}
    for value in session.get_inputs():
        sizes = [
            size if isinstance(size, int) else int("batch" in size or "slots" in size) for size in value.shape
        ]
        feeds[value.name] = known.get(value.name, np.zeros(sizes)).astype(_NUMBERS[value.type])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
