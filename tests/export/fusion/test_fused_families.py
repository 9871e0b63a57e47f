"""Fused decoders of several families: nodes a layer, transformers' tokens, and the untrimmed graph's."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.generators import FullSampler, greedy_by_torch, open_generator
from tests.support.models import GENERATE, needs_transformers_5, save_model
from trimserve.decoding.sampling import SamplingParams
from trimserve.files.hashes import sha256_file
from trimserve.model.resolve import resolve_model
from trimserve_export.exporters import transformers as exporter
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.full_model import export_full
from trimserve_export.fusion import fuse, masks, operator
from trimserve_export.graphs.reading import read_exported
from trimserve_export.pipeline import export
from trimserve_export.serving.quantize import quantization_of

pytestmark = [
    pytest.mark.export,
    needs_transformers_5,
]

KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
TOKENS = 14
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
}
# Beyond a window of 8, and unequal.
LENGTHS = (3, 9, 25)


@dataclass(frozen=True)
class Case:
    """A family and what its fused graph must be.

    Attributes:
        sizes: of its config.
        most: nodes of a layer.
    """

    sizes: dict
    most: int


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
QUICK = {"llama": Case(SIZES, 10)}
SLOW = {
    "llama_tied": Case(SIZES | {"rope_parameters": ROPE}, 10),
    # Norms of queries and keys take seven nodes, those behind attention and MLP two more.
    "qwen3": Case(SIZES | {"rope_parameters": YARN}, 17),
    "gemma3": Case(SIZES, 19),
    "gemma2": Case(SIZES, 12),
    "granite": Case(SIZES | {"rope_parameters": LINEAR}, 12),
    "gpt2": Case({"n_embd": 32}, 16),
    "opt": Case(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "dropout": 0.0,
        },
        18,
    ),
    "phi": Case({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}, 14),
    # A rotary share of 0.25: 16 of 64 numbers; heads of queries, keys and values side by side.
    "gpt_neox": Case({"hidden_size": 128, "num_attention_heads": 2}, 16),
}


@pytest.fixture(scope="module", autouse=True)
def traced(tmp_path_factory):
    """The exporter, which traces each checkpoint once."""
    root, real, made = tmp_path_factory.mktemp("traced"), exporter.export_checkpoint, {}

    def remembered(folder, output, job):
        key = "".join(sha256_file(path) for path in sorted(folder.glob("*.safetensors"))), job.dtype
        if key not in made:
            made[key] = real(folder, root / str(len(made)), job)
        shutil.copytree(made[key].parent, output, dirs_exist_ok=True)
        return output / made[key].name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export_checkpoint", remembered)
        yield


def fusion_of(graph):
    return json.loads(ir.load(graph).metadata_props[fuse.FUSION_KEY])


def layer_nodes(graph):
    """The most nodes between two attentions."""
    places = [
        place for place, node in enumerate(ir.load(graph).graph) if node.op_type == "GroupQueryAttention"
    ]
    return max(np.diff(places))


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(6, 36, length).astype(np.int32) for length in LENGTHS]


def check(family, case, path, dtype, quantize):
    source = resolve_model(save_model(family, path / "model", **case.sizes))
    vocab = make_vocab(KEPT, source.vocab_size, source.tokenizer_sha256)
    settings = {"exporter": "transformers", "dtype": dtype, "quantize": quantize, "progress": False}
    folder = export(source, vocab, path / "trimmed", **settings).path
    found = fusion_of(folder / "model.onnx")
    assert found["fused"], found
    # Quantising adds what its blocks' minima need.
    assert quantize is not None or layer_nodes(folder / "model.onnx") <= case.most
    assert "position_ids" not in [v.name for v in ir.load(folder / "model.onnx").graph.inputs] or family in (
        "gpt2",
        "opt",
    )
    assert open_generator(folder).folder.manifest.fusion == found
    (path / "full").mkdir()
    scheme = quantization_of(quantize, None) if quantize else None
    full = export_full(source, path / "full", GENERATE, dtype, scheme, exporter="transformers")
    assert fusion_of(full)["fused"]
    generator = open_generator(folder)
    # One by one and as a batch: the same tokens, and those of the untrimmed fused graph.
    whole = [
        list(map(int, found.ids)) for found in generator._generate(prompts(), {"max_new_tokens": TOKENS})
    ]
    for prompt, ids in zip(prompts(), whole, strict=True):
        (alone,) = generator._generate([prompt], {"max_new_tokens": TOKENS})
        assert list(map(int, alone.ids)) == ids
        params = SamplingParams(temperature=0.0)
        assert FullSampler(full, source.vocab_size).run(prompt, params, TOKENS, generator.stop_ids) == ids
        if quantize is None and dtype == "fp32":
            assert greedy_by_torch(torch_model(path), prompt, TOKENS) == ids


def torch_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32).eval()


@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", None), ("fp32", "int4"), ("fp16", None)])
@pytest.mark.parametrize("family", QUICK)
def test_a_fused_decoder_gives_transformers_tokens(family, dtype, quantize, tmp_path):
    check(family, QUICK[family], tmp_path, dtype, quantize)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", None), ("fp32", "int4"), ("fp16", None)])
@pytest.mark.parametrize("family", SLOW)
def test_fused_decoders_of_other_families(family, dtype, quantize, tmp_path):
    check(family, SLOW[family], tmp_path, dtype, quantize)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Gemma 3's graph as the exporter writes it: with windows, norms of queries and keys, two rotary sets."""
    root = tmp_path_factory.mktemp("gemma3")
    save_model("gemma3", root / "model", **SIZES)
    return exporter.export_checkpoint(root / "model", root / "graph", GraphJob(GENERATE))


def test_what_is_understood_wrongly_does_not_pass(graph, monkeypatch):
    """A wrong window and a wrong scale are seen by the numbers of a layer."""
    assert "GroupQueryAttention" in Counter(
        node.op_type for node in fuse.fuse_decoder(read_exported(graph)).graph
    )
    windows = masks.Windows.of
    with monkeypatch.context() as patch:
        patch.setattr(masks.Windows, "of", lambda self, found: (windows(self, found) or 9) - 1)
        stays(graph, "gives other numbers")
    with monkeypatch.context() as patch:
        patch.setattr(operator.Attention, "scale", 0.3)
        stays(graph, "gives other numbers")


def test_what_does_not_fuse_stays_and_says_why(graph):
    model = read_exported(graph)
    del model.metadata_props[fuse.POSITIONS_KEY]
    before = len(list(model.graph))
    made = fuse.fuse_decoder(model)
    found = json.loads(made.metadata_props[fuse.FUSION_KEY])
    assert not found["fused"]
    assert len(list(made.graph)) == before
    assert "how long its texts may be" in found["reason"]


def stays(graph, reason):
    found = json.loads(fuse.fuse_decoder(read_exported(Path(graph))).metadata_props[fuse.FUSION_KEY])
    assert not found["fused"]
    assert reason in found["reason"]
