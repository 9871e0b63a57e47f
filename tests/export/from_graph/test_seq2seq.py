"""Encoder-decoders as optimum-onnx exports them: four graphs, one of them two decoders merged under an If."""

import numpy as np
import pytest

pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx (make test-optimum)")

import onnx_ir as ir
import transformers
from optimum.exporters.onnx import onnx_export_from_model

from tests.support.exports import open_graph
from tests.support.folders import make_vocab
from trimserve_export.exporters.optimum import quiet
from trimserve_export.trimming import load_graph, trim_graph

pytestmark = [pytest.mark.export, pytest.mark.optimum]

V = 37
KEPT = (0, 1, 2, 5, 7, 8, 20, 29, 30, 35, 36)
CONFIGS = {
    "t5": transformers.T5Config(
        vocab_size=V, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    ),
    "bart": transformers.BartConfig(
        vocab_size=V,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def graphs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = transformers.AutoModelForSeq2SeqLM.from_config(CONFIGS[request.param]).eval()
    with quiet():
        onnx_export_from_model(model, folder, task="text2text-generation-with-past", do_validation=False)
    return folder


def run(path, ids: np.ndarray, *, cached: bool) -> dict[str, np.ndarray]:
    session = open_graph(path)
    random = np.random.default_rng(3)
    feeds = {"input_ids": ids, "use_cache_branch": np.array([cached])}
    for value in session.get_inputs():
        sizes = {"batch_size": 1, "past_decoder_sequence_length": 4}
        shape = [size if isinstance(size, int) else sizes.get(size, 6) for size in value.shape]
        feeds.setdefault(
            value.name,
            np.ones(shape, np.int64) if "mask" in value.name else random.standard_normal(shape, np.float32),
        )
    if "encoder_model" in path.name:
        feeds["attention_mask"] = np.ones_like(ids)
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("encoder_model", False),
        ("decoder_model", False),
        ("decoder_with_past_model", True),
        ("decoder_model_merged", False),
        ("decoder_model_merged", True),
    ],
)
def test_outputs_equal_the_full_graphs(graphs, tmp_path, name, cached):
    path = graphs / f"{name}.onnx"
    model = load_graph(path, turned=False)
    trim_graph(model, make_vocab(KEPT, V), has_head="decoder" in name)
    ir.save(model, tmp_path / path.name)
    compact = np.random.default_rng(1).integers(0, len(KEPT), (1, 1 if cached else 6))
    full = run(path, np.array(KEPT)[compact], cached=cached)
    found = run(tmp_path / path.name, compact, cached=cached)
    for output, expected in full.items():
        wanted = expected[..., KEPT] if output == "logits" else expected
        np.testing.assert_array_equal(found[output], wanted)
