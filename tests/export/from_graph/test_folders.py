"""Folders with several graphs: variants of precision, encoder-decoders; and links instead of copies."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir

from tests.export.from_graph.test_trimmed import IDS, KEPT, V
from tests.export.from_graph.test_trimmed import VOCAB as SKETCH_VOCAB
from tests.support.folders import make_vocab
from tests.support.graph_folders import accept_files, save_graph, shift_rows, vocab_of
from tests.support.graphs import run, save, sketch
from tests.support.translators import KEPT as KEPT_WORDS
from tests.support.translators import TASK
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import read_manifest
from trimserve.folder.opening import open_folder
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve_export import export
from trimserve_export.from_graph.trimmed import trim_to_folder
from trimserve_export.trimming.parts import find_parts, one_variant
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, pytest.mark.optimum]

TEXTS = ["the cat sat on the mat", "dog", "lo"]


def shared(path: Path) -> bool:
    return path.stat().st_nlink > 1


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> ModelSource:
    """A decoder whose weights lie in two files, behind links as in a hub's cache."""
    root = tmp_path_factory.mktemp("decoder")
    source = save_graph(root, "llama", "int4", tokenizer="byte_level_bpe", hidden_size=64)
    model = ir.load(source.graph)
    ir.external_data.load_to_model(model)
    cache = root / "cache"
    cache.mkdir()
    ir.save(model, cache / "model.onnx", external_data="w.bin", max_shard_size_bytes=40_000)
    snapshot = root / "snapshot"
    snapshot.mkdir()
    for file in cache.iterdir():
        (snapshot / file.name).symlink_to(file)
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        shutil.copy(source.path / name, snapshot / name)
    assert len(list(cache.iterdir())) > 2
    return resolve_model(snapshot)


@pytest.mark.parametrize("layout", ["runtime", "tokenizer", "graph"])
def test_linked_folders_hold_the_same_model(decoder, tmp_path, layout):
    before = {file.name: sha256_file(file) for file in decoder.path.iterdir()}
    vocab = vocab_of(decoder)
    for name, link in (("copied", False), ("linked", True)):
        export(decoder, vocab, tmp_path / name, layout=layout, link=link)
    linked = [name for name in read_manifest(tmp_path / "linked").files if shared(tmp_path / "linked" / name)]
    assert linked
    assert all(".onnx_data" in name for name in linked)
    assert {file.name: sha256_file(file) for file in decoder.path.iterdir()} == before
    result = verify(tmp_path / "linked", texts=TEXTS)
    assert result.ok, result.to_dict()
    if layout == "runtime":
        ids = [load(tmp_path / name).generate(TEXTS, max_new_tokens=12) for name in ("copied", "linked")]
        assert [list(r.ids) for r in ids[0]] == [list(r.ids) for r in ids[1]]


def test_a_changed_source_is_noticed_by_the_linked_folder(decoder, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(decoder.path, copy)
    export(copy, vocab_of(decoder), tmp_path / "linked", link=True)
    linked = tmp_path / "linked"
    name = next(name for name in read_manifest(linked).files if shared(linked / name))
    with (linked / name).open("r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(MismatchError, match="has changed"):
        open_folder(linked)


def test_links_to_another_file_system_are_refused(decoder, tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError, match="one file system"):
        export(decoder, vocab_of(decoder), tmp_path / "linked", link=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def variants(tmp_path) -> ModelSource:
    """A folder for transformers.js: three graphs of one model, one of them with its weights beside it."""
    root = tmp_path / "model"
    (root / "onnx").mkdir(parents=True)
    for name, head in (("model", "matmul"), ("model_q4", "nbits_4"), ("model_int8", "integer_by_token")):
        data = {"external_data": "model_q4.onnx_data", "size_threshold_bytes": 64} if "q4" in name else {}
        ir.save(sketch("plain", head).model(), root / "onnx" / f"{name}.onnx", **data)
    (root / "config.json").write_text(json.dumps({"vocab_size": V}))
    (root / "tokenizer.json").write_text("{}")
    return resolve_model(root)


@pytest.mark.parametrize("layout", ["runtime", "tokenizer", "graph"])
def test_each_graph_is_parsed_once(variants, tmp_path, monkeypatch, layout):
    (tmp_path / "out").mkdir()
    load_file, parsed = ir.load, []
    monkeypatch.setattr(ir, "load", lambda path: parsed.append(Path(path)) or load_file(path))
    trim_to_folder(variants, SKETCH_VOCAB, tmp_path / "out", task="fill-mask", layout=layout)
    sources = [path.name for path in parsed if path.is_relative_to(variants.path)]
    assert sorted(sources) == sorted(set(sources))
    assert len(sources) == (1 if layout == "runtime" else 3)


@pytest.mark.parametrize(("layout", "cold"), [("tokenizer", False), ("graph", False), ("graph", True)])
def test_all_variants_are_trimmed(variants, tmp_path, layout, cold):
    out = tmp_path / "out"
    out.mkdir()
    made = trim_to_folder(variants, SKETCH_VOCAB, out, task="fill-mask", layout=layout, cold=cold)
    assert made.graphs == {
        "model": "onnx/model.onnx",
        "model_int8": "onnx/model_int8.onnx",
        "model_q4": "onnx/model_q4.onnx",
    }
    assert set(made.weights) == {f"model{name}.onnx" for name in ("", "_q4", "_int8")} | {
        "model_q4.onnx_data"
    }
    ids = IDS if cold else np.array([KEPT])
    for name in made.graphs.values():
        (full,) = run(variants.path / name, {"input_ids": ids})
        fed = ids if layout == "graph" else np.arange(len(KEPT))[None]
        (found,) = run(out / name, {"input_ids": fed})
        kept = found[..., KEPT] if layout == "graph" else found
        np.testing.assert_array_equal(kept, full[..., KEPT])
    # As before, weights lie beside the graph or in it; transformers.js finds data by these names alone.
    data = {"onnx/model_q4.onnx_data"}
    if cold:
        data |= {"onnx/model.onnx_data", "onnx/model_int8.onnx_data", "onnx/model_q4.onnx_data_1"}
    assert {f"onnx/{file.name}" for file in (out / "onnx").iterdir()} == {*made.graphs.values(), *data}


def test_one_variant_is_taken(variants, tmp_path):
    one = ModelSource(variants.name, None, variants.path, variant="q4")
    assert [part.role for part in find_parts(one)] == ["model_q4"]
    (tmp_path / "out").mkdir()
    made = trim_to_folder(one, SKETCH_VOCAB, tmp_path / "out", task="fill-mask")
    assert made.graphs == {"model": "model.onnx"}
    assert made.exporter["variant"] == "q4"
    with pytest.raises(UsageError, match="no variant 'q8': it has fp32, int8, q4"):
        find_parts(ModelSource(variants.name, None, variants.path, variant="q8"))
    assert list(one_variant(find_parts(variants))) == ["model"]
    (variants.path / "onnx" / "model.onnx").unlink()
    rest = find_parts(ModelSource(variants.name, None, variants.path))
    with pytest.raises(UsageError, match="variants int8, q4, and this layout takes one: pass --variant"):
        one_variant(rest)


def test_one_file_among_variants(variants):
    named = resolve_model(variants.path / "onnx" / "model_q4.onnx")
    assert [part.path.name for part in find_parts(named)] == ["model_q4.onnx"]


def test_checkpoints_have_neither_links_nor_variants(translators, tmp_path):
    source = resolve_model(translators("t5").source)
    vocab = make_vocab(KEPT_WORDS, source.vocab_size, source.tokenizer_sha256)
    for option in ({"link": True}, {"variant": "q4"}):
        with pytest.raises(UsageError, match="no ONNX graph to trim"):
            export(source, vocab, tmp_path / "out", **option)


@pytest.fixture(scope="module", params=["t5", "bart"])
def seq2seq(request, translators):
    """An encoder-decoder as optimum-onnx leaves it, and the same made from its checkpoint."""
    pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx (make test-optimum)")
    made = translators(request.param)
    return made, made.onnx


@pytest.mark.parametrize("merged", [False, True])
def test_encoder_decoders_give_the_full_models_tokens(seq2seq, tmp_path, merged):
    made, folder = seq2seq
    if merged:  # as in folders for transformers.js
        (tmp_path / "model" / "onnx").mkdir(parents=True)
        for file in folder.iterdir():
            if file.stem in ("encoder_model", "decoder_model_merged"):
                shutil.copy(file, tmp_path / "model" / "onnx")
            elif file.suffix == ".json":
                shutil.copy(file, tmp_path / "model")
        folder = tmp_path / "model"
    source = resolve_model(folder)
    vocab = make_vocab(KEPT_WORDS, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "trimmed", link=merged)
    model = load(tmp_path / "trimmed")
    results = [model.generate(text, max_new_tokens=20)[0] for text in TEXTS]
    assert [list(result.ids) for result in results] == [made.by_torch(text, 20) for text in TEXTS]
    assert made.is_cold(np.concatenate([result.ids for result in results])).any()
    result = verify(tmp_path / "trimmed", texts=TEXTS)
    assert result.ok, result.to_dict()


def test_encoder_decoders_for_a_cut_tokenizer(seq2seq, tmp_path):
    _, folder = seq2seq
    source = resolve_model(folder)
    vocab = make_vocab(KEPT_WORDS, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "trimmed", layout="tokenizer")
    manifest = read_manifest(tmp_path / "trimmed")
    names = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
    assert manifest.task == TASK
    assert manifest.graphs == {name: f"{name}.onnx" for name in names}
    result = verify(tmp_path / "trimmed", texts=TEXTS)
    assert result.ok, result.to_dict()


def test_encoder_decoders_as_drop_ins(seq2seq, tmp_path):
    _, folder = seq2seq
    source = resolve_model(folder)
    vocab = make_vocab(KEPT_WORDS, source.vocab_size, source.tokenizer_sha256)
    with pytest.raises(UnsupportedModelError, match=r"decoder_model_merged\.onnx"):
        export(source, vocab, tmp_path / "merged", layout="graph")
    plain = tmp_path / "model"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("decoder_model_merged*"))
    export(plain, vocab, tmp_path / "trimmed", layout="graph")
    assert {"encoder_model.onnx", "encoder_model.cold_rows.safetensors"} < set(
        read_manifest(tmp_path / "trimmed").files
    )
    result = verify(tmp_path / "trimmed", texts=TEXTS)
    assert result.ok, result.to_dict()


def test_verify_looks_at_every_graph(seq2seq, tmp_path):
    _, folder = seq2seq
    source = resolve_model(folder)
    vocab = make_vocab(KEPT_WORDS, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "trimmed", layout="tokenizer")
    path = tmp_path / "trimmed" / "decoder_model_merged.onnx"
    model = ir.load(path)
    kept = open_folder(tmp_path / "trimmed").vocab
    tables = [value.const_value for value in model.graph.initializers.values()]
    table = next(tensor for tensor in tables if tuple(tensor.shape)[:1] == (len(kept),))
    shift_rows(path.with_name(f"{path.name}_data"), table.offset or 0, table.nbytes // len(kept), len(kept))
    accept_files(tmp_path / "trimmed")
    assert set(verify(tmp_path / "trimmed", texts=TEXTS).failed) >= {"kept-rows", "layout-outputs"}


def test_save_keeps_sketches_in_one_folder(tmp_path):
    """Two bare graphs in one folder: the usual name is the model, the other is left alone by the runtime."""
    folder = save(sketch("plain", "matmul"), tmp_path / "model")
    (folder / "other.onnx").write_bytes(b"")
    (tmp_path / "out").mkdir()
    made = trim_to_folder(resolve_model(folder), SKETCH_VOCAB, tmp_path / "out", task="fill-mask")
    assert made.graphs == {"model": "model.onnx"}
