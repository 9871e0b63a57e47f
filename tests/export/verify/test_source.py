"""The check `source`: true of what export makes, and false where one setting is not the source's."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch

from tests.support.folders import make_vocab
from tests.support.models import FAMILIES, PLAIN_EXPORTER, save_model
from trimserve.cli.main import main
from trimserve.errors import MissingExtraError
from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.opening import list_files, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export import export
from trimserve_export.checkpoint.stored import StoredVocab
from trimserve_export.exporters.choice import is_installed
from trimserve_export.exporters.exporter import GraphJob, load_exporter
from trimserve_export.verify import Check, verify
from trimserve_export.verify.context import Context
from trimserve_export.verify.source import lengths, original
from trimserve_export.verify.source.check import check_source
from trimserve_export.verify.texts import HOSTILE

pytestmark = pytest.mark.export

LIMIT = 16
TEXTS = ["the cat sat on the mat", "where is my parcel? it was charged twice"]


def make(path: Path, family: str, kind: str = "byte_level_bpe", **config) -> tuple[Path, Path]:
    """A model and its trimmed folder, which lacks every other id."""
    model = save_model(family, path / "model", tokenizer=kind, **config)
    return model, trim(model, path / "trimmed", task=FAMILIES[family].task)


def trim(model: Path, target: Path, **options) -> Path:
    source = resolve_model(model)
    kept = np.union1d(structural_ids(source), np.arange(0, source.vocab_size, 2)).astype(np.int32)
    return export(model, make_vocab(kept.tolist(), source.vocab_size), target, progress=False, **options).path


def check(trimmed: Path, model: Path, *texts: str) -> Check:
    """The check alone, without the full export that the others need."""
    nothing = StoredVocab({}, {}, tied=False)
    chosen = (*texts, *TEXTS, *HOSTILE)
    return check_source(Context(open_folder(trimmed), resolve_model(model), nothing, None, chosen))


def check_of_verify(trimmed: Path, model: Path) -> Check:
    result = verify(trimmed, model, texts=TEXTS, store=False, progress=False)
    return next(found for found in result.checks if found.name == "source")


def rehash(folder: Path, **changes) -> None:
    """Make the manifest agree with the files, so that no hash tells that they were changed."""
    manifest = dataclasses.replace(read_manifest(folder), files=list_files(folder), **changes)
    write_manifest(folder, manifest)


def change_json(path: Path, **values) -> None:
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | values), "utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and trimmed folders that no test may change, each made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def get(family: str, **config) -> tuple[Path, Path]:
        if family not in known:
            known[family] = make(tmp_path_factory.mktemp(family), family, **config)
        return known[family]

    return get


@pytest.fixture
def generator(made, tmp_path) -> tuple[Path, Path]:
    """A decoder whose frequencies change at 16 tokens, and a copy of its trimmed folder."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    model, trimmed = made("qwen3", max_position_embeddings=LIMIT, rope_scaling=rope)
    return model, Path(shutil.copytree(trimmed, tmp_path / "trimmed"))


@pytest.mark.optimum
def test_a_generator_is_compared_in_transformers(generator):
    model, trimmed = generator
    found = check(trimmed, model)
    assert found.ok, found.detail
    assert found.detail.startswith("as transformers")
    for part in ("token ids of", "texts of 15, 16, 17, 63, 64 tokens", "generated ids equal in exact mode"):
        assert part in found.detail
    assert "rounding bound" in found.detail
    assert 0 < found.max_abs_diff < 1e-4


def test_another_generation_setting_is_found(generator, capsys):
    model, trimmed = generator
    first = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    kept = open_folder(trimmed).vocab.kept_ids.tolist()
    change_json(trimmed / "generation_config.json", suppress_tokens=kept[: len(kept) // 2])
    rehash(trimmed)
    assert first > len(kept)
    found = check(trimmed, model)
    assert found.ok is False
    assert "generate() gives" in found.detail
    assert main(["verify", str(trimmed), "-m", str(model), "--format", "json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert "source" in [entry["name"] for entry in document["checks"] if entry["ok"] is False]


@pytest.mark.optimum
def test_frequencies_that_change_at_another_length_are_found(generator):
    model, trimmed = generator
    graph = ir.load(trimmed / "model.onnx")
    changed = 0
    for node in graph.graph.all_nodes():
        values = [value for value in node.inputs if value is not None] if node.op_type == "Greater" else []
        for value in values:
            constant = ir.convenience.get_const_tensor(value)
            if constant is not None and constant.size == 1 and int(constant.numpy()) == LIMIT:
                new = ir.Tensor(np.full_like(constant.numpy(), 1000))
                if value.producer() is None:
                    value.const_value = new
                else:
                    value.producer().attributes["value"] = ir.AttrTensor("value", new)
                changed += 1
    assert changed
    ir.save(graph, trimmed / "model.onnx")
    rehash(trimmed)
    found = check(trimmed, model)
    assert found.ok is False
    assert "differ by" in found.detail
    assert "the bound is" in found.detail


@pytest.mark.optimum
def test_another_tokenizer_is_found(generator):
    """Every other comparison goes through the folder's own tokenizer, on both sides."""
    model, trimmed = generator
    path = [*trimmed.glob("tokenizer.effective.json"), trimmed / "tokenizer.json"][0]
    content = json.loads(path.read_text("utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content), "utf-8")
    rehash(trimmed, tokenizer_sha256=sha256_file(path))
    found = check(trimmed, model, "The Cat")
    assert found.ok is False
    assert "token ids of 'The Cat'" in found.detail


def test_a_length_that_costs_too_much_is_said(generator, monkeypatch):
    model, trimmed = generator
    monkeypatch.setattr(lengths, "_LEAST_TOKENS", 20)
    monkeypatch.setattr(lengths, "_WORK", 1)
    assert "texts of 63, 64 tokens NOT run, above 20 here" in check(trimmed, model).detail


def test_without_cold_rows_the_beginning_that_can_be_produced_is_compared(made, tmp_path):
    model, _ = made("qwen3")
    trimmed = trim(model, tmp_path / "out", cold=False)
    found = check(trimmed, model)
    assert found.ok, found.detail
    assert "in compact mode" in found.detail


def test_rounded_weights_are_measured_in_nats(made, tmp_path):
    model, _ = made("qwen3")
    found = check_of_verify(trim(model, tmp_path / "out", quantize="int8"), model)
    assert found.ok, found.detail
    assert "weights of 8 bits give a mean of" in found.detail
    assert "nats a token (KL from fp32)" in found.detail
    assert "measured, not judged" in found.detail


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["graph", "tokenizer"])
def test_other_layouts_are_compared_by_the_full_graph(made, tmp_path, layout):
    model, _ = made("qwen3")
    found = check_of_verify(trim(model, tmp_path / "out", layout=layout), model)
    assert found.ok, found.detail
    assert "numbers of" in found.detail


def test_a_graph_without_a_checkpoint_is_not_comparable(made, tmp_path, capsys):
    model, _ = made("qwen3")
    source = tmp_path / "source"
    load_exporter(PLAIN_EXPORTER).export_checkpoint(model, source, GraphJob(FAMILIES["qwen3"].task))
    for path in model.glob("*.json"):
        shutil.copyfile(path, source / path.name)
    trimmed = trim(source, tmp_path / "out")
    result = verify(trimmed, source, texts=TEXTS, store=False)
    (found,) = (found for found in result.checks if found.name == "source")
    assert found.ok is None
    assert found.detail.startswith("not comparable: no checkpoint")
    assert result.not_compared == ("source",)
    code = main(["verify", str(trimmed), "-m", str(source)])
    assert code == (0 if result.ok else 3)
    assert "not compared" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sentence(tmp_path_factory) -> tuple[Path, Path]:
    """A sentence-transformers folder and its trimmed one."""
    pytest.importorskip("sentence_transformers")
    root = tmp_path_factory.mktemp("sentence")
    model = save_model("bert_encoder", root / "model")
    # A tokenizer that tells "The" from "the", so that lower-casing before it counts.
    change_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    normalizer = json.loads((model / "tokenizer.json").read_text("utf-8"))["normalizer"]
    change_json(model / "tokenizer.json", normalizer=normalizer | {"lowercase": False})
    types = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(types)
    ]
    (model / "modules.json").write_text(json.dumps(modules), "utf-8")
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    change_json(model / "1_Pooling" / "config.json", **pooling)
    change_json(model / "sentence_bert_config.json", max_seq_length=32)
    return model, trim(model, root / "trimmed")


@pytest.mark.optimum
def test_embeddings_are_compared_in_sentence_transformers(sentence):
    model, trimmed = sentence
    found = check(trimmed, model)
    assert found.ok, found.detail
    assert found.detail.startswith("as sentence-transformers")
    assert "texts of 31, 32, 33" in found.detail


@pytest.mark.optimum
def test_another_pooling_is_found(sentence, tmp_path):
    model, trimmed = sentence
    trimmed = Path(shutil.copytree(trimmed, tmp_path / "trimmed"))
    settings = trimmed / "sentence_modules.json"
    if settings.is_file():
        content = json.loads(settings.read_text("utf-8"))
        content["modules"][0]["modes"] = ["max"]
        settings.write_text(json.dumps(content), "utf-8")
        rehash(trimmed)
    else:
        pooling = dataclasses.replace(read_manifest(trimmed).pooling, mode="max")
        rehash(trimmed, pooling=pooling)
    found = check(trimmed, model)
    assert found.ok is False
    assert "the embeddings of" in found.detail
    assert "bound" in found.detail


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompts", {"query": "sat: "}),
        pytest.param("default_prompt_name", "query", marks=pytest.mark.slow),
        pytest.param("max_tokens", 20, marks=pytest.mark.slow),
        pytest.param("truncate_dim", 8, marks=pytest.mark.slow),
    ],
)
def test_another_setting_of_sentence_transformers_is_found(sentence, tmp_path, setting, value):
    model, trimmed = sentence
    settings = trimmed / "sentence_modules.json"
    if not settings.is_file():
        pytest.skip("the folder has no settings of sentence-transformers")
    model = Path(shutil.copytree(model, tmp_path / "model"))
    declared = {"prompts": {"query": "the cat: "}, "default_prompt_name": None}
    change_json(model / "config_sentence_transformers.json", **declared)
    trimmed = trim(model, tmp_path / "trimmed")
    assert check(trimmed, model).ok
    change_json(trimmed / settings.name, **{setting: value})
    rehash(trimmed)
    assert check(trimmed, model).ok is False


@pytest.mark.optimum
def test_sentence_transformers_missing_is_one_line_that_names_pip(sentence, monkeypatch, capsys):
    model, trimmed = sentence
    monkeypatch.setattr(original, "_has_sentence_library", lambda: False)
    with pytest.raises(MissingExtraError, match="pip install sentence-transformers"):
        verify(trimmed, model, store=False)
    assert main(["verify", str(trimmed), "-m", str(model)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_half_precision_is_measured(made, tmp_path):
    if is_installed("genai"):
        pytest.skip("its builder makes fp32 for the CPU")
    model, _ = made("bert_encoder", kind="wordpiece")
    found = check_of_verify(trim(model, tmp_path / "out", dtype="fp16"), model)
    assert found.ok, found.detail
    assert "fp16 weights give a mean of" in found.detail
    assert "cosine of states" in found.detail


def test_the_bound_is_far_below_what_a_wrong_setting_does():
    """For a 32-layer model of today's widths it is below a hundredth of the largest logit."""
    from types import SimpleNamespace

    from trimserve_export.checkpoint.rounding import rounding_bound

    config = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    whole = SimpleNamespace(get_text_config=lambda: config)
    bound = rounding_bound(whole, torch.full((3, 4), 20.0).numpy())
    assert 1e-3 < bound / 20 < 1e-2
