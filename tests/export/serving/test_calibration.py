"""Rounding by the texts of a domain: moments, equality with the full model, and what is said of quality."""

import json
import logging
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch
import transformers

from tests.support.exports import open_graph, run
from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.cli.main import main
from trimserve.errors import MismatchError, UsageError
from trimserve.files.held import HeldFile
from trimserve.files.tensors import ArrayTensor, exhaust, write_tensors
from trimserve.folder.names import CALIBRATION_NAME
from trimserve.folder.opening import open_folder
from trimserve.model.resolve import resolve_model
from trimserve_export.pipeline import export
from trimserve_export.serving.block_search import search_blocks
from trimserve_export.serving.calibration import Calibration
from trimserve_export.serving.quality import Quality, measure_quality
from trimserve_export.verify import verify

pytestmark = pytest.mark.export

TEXTS = [
    f"the cat {number} sat on the mat and the dog lay by it, all day long\n" * 10 for number in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(
        "llama_tied", tmp_path_factory.mktemp("model"), tokenizer="byte_level_bpe", hidden_size=64
    )


@pytest.fixture(scope="module")
def vocab(model):
    source = resolve_model(model)
    return make_vocab(list(range(0, source.vocab_size, 2)), source.vocab_size, source.tokenizer_sha256)


@pytest.fixture(scope="module")
def folder(model, vocab, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "out"
    export(model, vocab, path, quantize="int4", calibration=TEXTS, progress=False)
    return open_folder(path)


def test_moments_are_the_mean_squares_of_what_torch_multiplies(model, folder, vocab):
    """Of a projection's input, in torch, over the same kept ids."""
    source = resolve_model(model)
    longest = folder.manifest.lengths.longest
    chosen = Calibration.of_texts(TEXTS, source.tokenizer(), vocab, longest=longest)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums, count = [], 0
    layers = torch_model.model.layers
    layers[0].mlp.down_proj.register_forward_hook(
        lambda _, fed, __: sums.append((fed[0].detach().double().reshape(-1, fed[0].shape[-1]) ** 2).sum(0))
    )
    with torch.no_grad():
        for ids in chosen.texts:
            torch_model(torch.tensor(vocab.to_original(ids)[None].astype(np.int64)))
            count += len(ids)
    expected = (torch.stack(sums).sum(0) / count).numpy()
    stored = Calibration.stored(folder.opened(CALIBRATION_NAME)).moments.values()
    same_shape = [one for one in stored if one.shape == expected.shape]
    # Squares and their sums have a few roundings a layer; other products' moments are nothing like these.
    assert sum((np.abs(one - expected) <= 1e-4 * expected).all() for one in same_shape) == 1


def test_the_full_model_is_rounded_alike(model, folder):
    """Hidden states and logits equal those of the untrimmed model, calibrated by what the folder stores."""
    result = verify(folder.path, model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]


def test_other_texts_make_other_integers_and_verify_sees_them(model, vocab, folder, tmp_path):
    export(model, vocab, tmp_path / "plain", quantize="int4", progress=False)
    ids = np.arange(12)[None]
    feeds = {"cold_rows": np.zeros((1, 64), np.float32)}
    found = [
        run(open_graph(path / "model.onnx"), ids, **feeds)["hidden_states"]
        for path in (folder.path, tmp_path / "plain")
    ]
    assert not np.array_equal(*found)
    assert CALIBRATION_NAME not in open_folder(tmp_path / "plain").manifest.files


@pytest.mark.parametrize(
    "moments",
    [np.ones(5, np.float32), np.ones((64, 1), np.float32), np.ones(64, np.int64), np.zeros(0, np.float32)],
)
def test_moments_of_another_model_are_refused(folder, tmp_path, moments):
    names = Calibration.stored(folder.opened(CALIBRATION_NAME)).moments
    exhaust(write_tensors(tmp_path / "c.safetensors", {name: ArrayTensor(moments) for name in names}))
    with pytest.raises(MismatchError, match="xport the folder again"):
        search_blocks(
            np.zeros((2, 64), np.float32),
            next(iter(Calibration.stored(HeldFile(tmp_path / "c.safetensors")).moments.values())),
        )


@pytest.mark.parametrize(
    "change", [{"after": "x"}, {"texts": -1}, {"surprise": 1}, {"measure": "luck"}, {"tokens": None}]
)
def test_quality_of_another_kind_is_refused(folder, change):
    with pytest.raises(MismatchError, match="the manifest's quality"):
        Quality.from_dict(folder.manifest.quality | change)


@pytest.mark.parametrize("options", [{}, {"quantize": "int4", "device": "cuda", "exporter": "genai"}])
def test_texts_that_nothing_is_rounded_by_are_refused(model, vocab, tmp_path, options):
    with pytest.raises(UsageError, match="calibration says"):
        export(model, vocab, tmp_path / "x", calibration=TEXTS, progress=False, **options)


def test_what_quantising_cost_is_said_everywhere(folder):
    quality = Quality.from_dict(folder.manifest.quality)
    assert quality.measure == "nats a token"
    assert 0 < abs(quality.after - quality.before) < 1
    assert f"({quality.after - quality.before:+.4f})" in (folder.path / "README.md").read_text("utf-8")


def test_the_command_calibrates_on_the_corpus(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(TEXTS), "utf-8")
    words = ["export", "-m", str(model), "--corpus", str(tmp_path / "text.txt"), "--quantize", "int4"]
    assert main([*words, "-o", str(tmp_path / "out"), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quality"]["measure"] == "nats a token"
    assert CALIBRATION_NAME in document["files"]
    assert main([*words, "-o", str(tmp_path / "none"), "--no-calibration"]) == 0
    assert CALIBRATION_NAME not in open_folder(tmp_path / "none").manifest.files
    assert main([*words, "-o", str(tmp_path / "x"), "--calibrate", "a.txt", "--no-calibration"]) == 2


def test_encoders_say_how_alike_vectors_are(tmp_path):
    model = save_model("bert_encoder", tmp_path / "model", tokenizer="byte_level_bpe", hidden_size=64)
    size = resolve_model(model).vocab_size
    export(model, make_vocab(range(size), size), tmp_path / "out", quantize="int8", calibration=TEXTS * 3)
    quality = Quality.from_dict(open_folder(tmp_path / "out").manifest.quality)
    assert quality.measure == "cosine"
    assert 0.9 < quality.after <= 1


def test_nats_and_neighbours_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 11, 9) for _ in range(30)]
    logits = {id(ids): rng.standard_normal((2, 9, 11)).astype(np.float32) for ids in texts}
    found = measure_quality(texts, lambda ids: list(logits[id(ids)]), has_head=True, causal=True)
    expected = [
        -np.mean([torch.tensor(logits[id(i)][s, :-1]).log_softmax(-1)[range(8), i[1:]].mean() for i in texts])
        for s in (0, 1)
    ]
    assert np.abs(np.array([found.before, found.after]) - expected).max() < 2e-5
    same = measure_quality(texts, lambda ids: [logits[id(ids)][0]] * 2, has_head=False, causal=False)
    assert (same.after, same.top_10) == (1.0, 1.0)
    other = measure_quality(texts, lambda ids: list(logits[id(ids)]), has_head=False, causal=False)
    assert other.after < 0.5
    assert other.top_10 < 0.8


def test_a_model_that_rounding_harms_is_warned_of(model, vocab, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("trimserve_export.serving.quality.LARGEST_RISE", -1.0)
    with caplog.at_level(logging.WARNING):
        export(model, vocab, tmp_path / "out", quantize="int4", vocab_bits=4, calibration=TEXTS)
    assert "leave --vocab-bits 4 out" in caplog.text


def _on_a_lattice(weights: torch.Tensor) -> torch.Tensor:
    """Each block of 32 in sixteen equal steps from its smallest to its largest number, as Q4_1 has it."""
    blocks = weights.reshape(-1, 32)
    low, high = blocks.min(dim=1, keepdim=True).values, blocks.max(dim=1, keepdim=True).values
    low, step = low.half().float(), ((high - low) / 15).half().float()
    return (((blocks - low) / step).round().clamp(0, 15) * step + low).reshape(weights.shape)


def test_a_model_of_q4_1_weights_comes_out_as_it_went_in(model, vocab, tmp_path):
    """What is left is how the kernel rounds activations, as it does with 8 bits, too."""
    lattice = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for layer in lattice.model.layers:
            for part in layer.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight.copy_(_on_a_lattice(part.weight))
    shutil.copytree(model, tmp_path / "model")
    lattice.save_pretrained(tmp_path / "model")
    source = resolve_model(tmp_path / "model")
    rows = make_vocab(vocab.kept_ids, source.vocab_size, source.tokenizer_sha256)
    for bits in ("int4", "int8"):
        export(source, rows, tmp_path / bits, quantize=bits, calibration=TEXTS, progress=False)
    graph = ir.load(tmp_path / "int4" / "model.onnx").graph
    assert sum(node.op_type == "ReduceSum" and "quantize" in node.name for node in graph) >= 4
    ids = np.arange(40)[None]
    exported = export(source, rows, tmp_path / "fp32", progress=False).path
    fp32, int4, int8 = (
        run(open_graph(path / "model.onnx"), ids, cold_rows=np.zeros((1, 64), np.float32))["hidden_states"]
        for path in (exported, tmp_path / "int4", tmp_path / "int8")
    )
    assert np.abs(int4 - fp32).max() < 2 * np.abs(int8 - fp32).max()
    assert verify(tmp_path / "int4", tmp_path / "model", store=False).ok
