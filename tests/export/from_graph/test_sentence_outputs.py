"""Graphs of optimum's own export of a sentence-transformers folder, which has the modules in it."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx (make test-optimum)")

import onnx

from tests.support.models import save_model
from tests.support.sentence_models import (
    HIDDEN,
    TEXTS,
    V,
    add_modules,
    apart,
    assert_close,
    library,
    save_weights,
    trimmed,
    write_json,
)
from trimserve.errors import UnsupportedModelError
from trimserve_export.exporters import tracing
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, pytest.mark.optimum]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder, and the graph that optimum makes of it, with nothing of sentence-transformers beside it."""
    from optimum.exporters.onnx import main_export

    root = tmp_path_factory.mktemp("optimum")
    source = save_model("bert_encoder", root / "model", rows=V)
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True}
    dense = {"in_features": HIDDEN, "out_features": 8, "bias": True}
    add_modules(source, ("Pooling", pooling), ("Dense", dense), ("Normalize", {}))
    save_weights(source / "2_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    with tracing.quiet():
        main_export(
            str(source),
            root / "onnx",
            task="feature-extraction",
            library_name="sentence_transformers",
            do_validation=False,
        )
    outputs = {value.name for value in onnx.load(root / "onnx" / "model.onnx").graph.output}
    assert outputs == {"token_embeddings", "sentence_embedding"}
    return source, root / "onnx"


@pytest.mark.parametrize("task", ["auto", "feature-extraction"])
def test_embeddings_of_the_graph_are_the_librarys(exported, tmp_path, task):
    source, graph = exported
    encoder, expected = trimmed(graph, tmp_path / "trimmed", task=task), library(source).encode(TEXTS)
    assert encoder.dimension == 8
    assert_close(encoder.encode(TEXTS, batch_size=3), expected)
    assert encoder.forward(["the cat"])[0].shape == (4, HIDDEN)
    assert encoder.stats.cold_tokens > 0
    assert verify(tmp_path / "trimmed", progress=False).ok


def test_prompts_beside_the_graph_count_and_its_modules_do_not_count_twice(exported, tmp_path):
    source, graph = exported
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "include_prompt": True}
    add_modules(graph, ("Pooling", pooling))
    config = {"prompts": {"query": "the cat "}, "default_prompt_name": "query"}
    write_json(graph / "config_sentence_transformers.json", config)
    write_json(graph / "sentence_bert_config.json", {"max_seq_length": 7})
    encoder, model = trimmed(graph, tmp_path / "trimmed"), library(source)
    model.max_seq_length = 7
    expected = model.encode(TEXTS, prompt="the cat ")
    assert_close(encoder.encode(TEXTS), expected)
    assert apart(encoder.encode(TEXTS, prompt=""), expected) > 1e-3
    write_json(graph / "1_Pooling" / "config.json", pooling | {"include_prompt": False})
    with pytest.raises(UnsupportedModelError, match="include_prompt"):
        trimmed(graph, tmp_path / "out")
