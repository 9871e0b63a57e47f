"""The sketch in exported folders: made by streaming, used by default, refused when it does not fit."""

import dataclasses
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

pytest.importorskip("torch")

import onnx

from tests.support.folders import make_folder
from tests.support.generators import FullSampler, make_pair, open_generator
from tests.support.models import GENERATE, PLAIN_EXPORTER
from trimserve.decoding.sampling import SamplingParams
from trimserve.errors import MismatchError, UsageError
from trimserve.exact.sketch import Sketch
from trimserve.exact.sketch_rows import GROUP_ROWS
from trimserve.folder.manifest import write_manifest
from trimserve.folder.names import SKETCH_FILES, SKETCH_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.cold_rows import ColdRows
from trimserve_export.cold_head import packed
from trimserve_export.cold_head import sketch as exported
from trimserve_export.cold_head.sketch import add_sketch, wants_sketch
from trimserve_export.full_model import export_full
from trimserve_export.pipeline import export

pytestmark = pytest.mark.export

TEXTS = ["the cat sat on the mat", "Grüße, Welt! 🎉", "数学 ábc"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", tokenizer="byte_level_bpe", kept=275, seed=1)


@pytest.fixture(scope="module", params=["int4", "int8"])
def quantized(request, tmp_path_factory):
    """A folder with a quantised head, and a sketch that it does not get by default."""
    root = tmp_path_factory.mktemp(request.param)
    pair = make_pair(
        root, "llama", tokenizer="byte_level_bpe", kept=275, seed=1, quantize=request.param, hidden_size=64
    )
    assert pair.generator.folder.manifest.sketch is None
    add_sketch(root / "trimmed")
    return dataclasses.replace(pair, generator=open_generator(root / "trimmed"))


def test_the_manifest_tells_bytes_and_bound(pair):
    folder = pair.generator.folder
    sketch = folder.manifest.sketch
    assert sketch["bytes"] == sum((folder.path / name).stat().st_size for name in SKETCH_FILES)
    assert 0 < sketch["bound"]["median"] <= sketch["bound"]["largest"] < 0.02


@pytest.fixture(scope="module")
def pair4(pair, tmp_path_factory):
    """The same with a sketch of 4 bits."""
    path = tmp_path_factory.mktemp("int4") / "trimmed"
    shutil.copytree(pair.generator.folder.path, path)
    add_sketch(path, 4)
    return dataclasses.replace(pair, generator=open_generator(path))


def test_four_bits_bound_less(pair4):
    coarse = pair4.generator.folder.manifest.sketch
    assert coarse["bits"] == 4
    assert 0.02 < coarse["bound"]["median"] <= coarse["bound"]["largest"] < 0.2


@pytest.mark.parametrize(("bits", "width_share"), [(4, 0.3), (8, 0.05)])
def test_the_bounds_hold_for_the_folders_own_cold_head(pair, bits, width_share, tmp_path, monkeypatch):
    """Also where the rows are sorted in several runs, and read in several slices a run."""
    monkeypatch.setattr(exported, "_SLICE_ENTRIES", 1)
    monkeypatch.setattr("trimserve.exact.sketch.SORTED_ROWS", 2 * GROUP_ROWS)
    shutil.copytree(pair.generator.folder.path, tmp_path / "trimmed")
    add_sketch(tmp_path / "trimmed", bits)
    folder = open_folder(tmp_path / "trimmed")
    cold = ColdRows(folder)
    sketch = Sketch(folder, cold, ())
    hidden = np.random.default_rng(0).standard_normal((5, cold.width)).astype(np.float32)
    hidden[0, 0] = 100  # an outlier, which takes a second digit
    logits = ColdHead(folder).logits(hidden)
    rows = np.searchsorted(folder.vocab.cold_ids, sketch.ids)
    assert set(rows.tolist()) == set(range(len(cold)))
    product = sketch.product(hidden)
    largest = logits[:, rows].reshape(5, -1, GROUP_ROWS).max(axis=2)
    assert (largest <= product.upper).all()
    width = np.linalg.norm(hidden, axis=1) * np.linalg.norm(cold.head(folder.vocab.cold_ids), axis=1).max()
    assert (product.upper - largest < width_share * width[:, None]).all()
    lower, upper = sketch.score(product, 1, np.arange(rows.size))
    assert ((lower <= logits[1, rows]) & (logits[1, rows] <= upper)).all()


def test_memory_holds_a_run_of_integers_and_slices_of_floats(tmp_path, monkeypatch):
    rows, width = 9_000, 1024  # 37 MB in float32
    values = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    cold_rows = save({"embedding": values}, {"tied": "true"})
    make_folder(tmp_path / "folder", range(11), rows + 11, cold_rows=cold_rows)
    monkeypatch.setattr("trimserve.exact.sketch.RUN_BYTES", 4096 * width)
    packed_bytes = []

    def pack(graph, folder):
        model = onnx.load(graph, load_external_data=False)
        packed_bytes.append(sum(np.prod(tensor.dims) for tensor in model.graph.initializer))
        return original(graph, folder)

    original = packed._pack
    monkeypatch.setattr(packed, "_pack", pack)
    tracemalloc.start()
    add_sketch(tmp_path / "folder")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes
    assert len(packed_bytes) == 3
    assert max(packed_bytes) < 4097 * width
    assert not list((tmp_path / "folder").glob(".*"))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}])
def test_certified_ids_are_the_full_models(pair, params):
    generator = open_generator(pair.generator.folder.path)
    sampler = FullSampler(pair.full_graph, pair.vocab_size)
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        (found,) = generator.generate(text, max_new_tokens=24, **params)
        assert list(found.ids) == sampler.run(ids, SamplingParams(**params), 24, generator.stop_ids)
        (plain,) = generator.generate(text, max_new_tokens=24, certify=False, **params)
        assert plain.ids == found.ids
    assert generator.stats.cold_reads.certified > (0 if "top_p" in params else 20)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}])
def test_four_bits_certify_the_full_models_ids(pair4, params):
    generator = open_generator(pair4.generator.folder.path)
    sampler = FullSampler(pair4.full_graph, pair4.vocab_size)
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        (found,) = generator.generate(text, max_new_tokens=24, **params)
        assert list(found.ids) == sampler.run(ids, SamplingParams(**params), 24, generator.stop_ids)
    assert generator.stats.cold_reads.certified > 10


def test_drafting_ahead_while_a_thread_checks(pair):
    """The way of a decoder on a device."""
    generator = open_generator(pair.generator.folder.path, overlap=True)
    expected = [result.ids for result in pair.generator.generate(TEXTS, max_new_tokens=30, certify=False)]
    assert [result.ids for result in generator.generate(TEXTS, max_new_tokens=30)] == expected
    assert generator.stats.cold_reads.certified > 0


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}])
def test_a_sketch_of_quantised_rows(quantized, params):
    generator = quantized.generator
    sampler = FullSampler(quantized.full_graph, quantized.vocab_size)
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        (found,) = generator.generate(text, max_new_tokens=24, **params)
        assert list(found.ids) == sampler.run(ids, SamplingParams(**params), 24, generator.stop_ids)
    assert generator.stats.cold_reads.certified > 10


def test_a_sketch_of_float16_rows(pair, tmp_path):
    """Certified ids are those of the full model in float16, and every logit is within its bounds."""
    vocab = pair.generator.folder.vocab
    export(pair.model_path, vocab, tmp_path / "trimmed", dtype="fp16", progress=False)
    (tmp_path / "full").mkdir()
    source = resolve_model(str(pair.model_path))
    full = export_full(source, tmp_path / "full", GENERATE, "fp16", exporter=PLAIN_EXPORTER)
    generator = open_generator(tmp_path / "trimmed")
    sampler = FullSampler(full, pair.vocab_size)
    for text in TEXTS:
        ids = generator.codec.encode([text])[0]
        (found,) = generator.generate(text, max_new_tokens=24)
        assert list(found.ids) == sampler.run(ids, SamplingParams(), 24, generator.stop_ids)
    assert generator.stats.cold_reads.certified > 10
    cold = ColdRows(generator.folder)
    sketch = Sketch(generator.folder, cold, generator._decoder.after_head)
    hidden = np.random.default_rng(0).standard_normal((9, cold.width)).astype(np.float16)
    logits = ColdHead(generator.folder).logits(hidden)
    places = np.searchsorted(generator.folder.vocab.cold_ids, sketch.ids)
    largest = logits[:, places].astype(np.float64).reshape(9, -1, GROUP_ROWS).max(axis=2)
    assert (largest <= sketch.product(hidden).upper).all()


def test_a_quantised_kernel_stays_within_its_bounds(quantized):
    """Rounded activations, sums by blocks, the kernel's own zero points."""
    folder = quantized.generator.folder
    cold = ColdRows(folder)
    sketch = Sketch(folder, cold, ())
    hidden = np.random.default_rng(0).standard_normal((40, cold.width)).astype(np.float32)
    hidden[:20, ::7] *= 20
    logits = ColdHead(folder).logits(hidden)[:, np.searchsorted(folder.vocab.cold_ids, sketch.ids)]
    product = sketch.product(hidden)
    assert (logits.reshape(40, -1, GROUP_ROWS).max(axis=2) <= product.upper).all()
    for step in range(40):
        lower, upper = sketch.score(product, step, np.arange(sketch.ids.size))
        assert ((lower <= logits[step]) & (logits[step] <= upper)).all()


def test_what_an_export_gets(pair):
    manifest = pair.generator.folder.manifest
    assert wants_sketch(manifest, None)
    assert wants_sketch(manifest, "int4")
    assert not wants_sketch(manifest, "none")
    assert not wants_sketch(dataclasses.replace(manifest, quantization={"bits": 4}), None)
    assert not wants_sketch(dataclasses.replace(manifest, files={}), None)
    with pytest.raises(UsageError, match="leave --sketch out"):
        wants_sketch(dataclasses.replace(manifest, layout="tokenizer"), "int4")


@pytest.mark.parametrize("made", ["pair", "pair4"])
def test_a_sketch_that_does_not_fit_is_refused(made, request, tmp_path):
    pair = request.getfixturevalue(made)
    path = tmp_path / "changed"
    shutil.copytree(pair.generator.folder.path, path)
    arrays = load_file(path / SKETCH_NAME)
    save_file(arrays | {"scales": arrays["scales"][:-1]}, path / SKETCH_NAME)
    manifest = open_folder(pair.generator.folder.path).manifest
    write_manifest(path, dataclasses.replace(manifest, files=list_files(path)))
    folder = open_folder(path)
    with pytest.raises(MismatchError, match=r"does not fit|'scales' should be"):
        Sketch(folder, ColdRows(folder), ())


def test_a_sketch_of_unknown_bits_is_refused(pair):
    manifest = pair.generator.folder.manifest
    later = dataclasses.replace(manifest, sketch={**manifest.sketch, "bits": 2})
    folder = dataclasses.replace(pair.generator.folder, manifest=later)
    with pytest.raises(MismatchError, match="2 bits, expected 4 or 8"):
        Sketch(folder, ColdRows(folder), ())
