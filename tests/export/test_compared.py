"""`--exporter auto` takes the builder's graph where it gives transformers' numbers, and says what it took."""

import json

import pytest

pytest.importorskip("torch")

from tests.support.decoders import V, compare, make_pair, save_decoder
from trimserve.cli.main import main
from trimserve.folder.manifest import read_manifest
from trimserve_export.card import CARD_NAME
from trimserve_export.checkpoint.lengths import limits_of
from trimserve_export.exporters import genai_mends
from trimserve_export.exporters.choice import is_installed
from trimserve_export.verify import verify

pytestmark = [
    pytest.mark.export,
    pytest.mark.skipif(not is_installed("genai"), reason="needs transformers 5 and onnxruntime-genai"),
]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """Layers that look 8 positions back, which the builder by itself forgets."""
    return save_decoder("mistral", tmp_path_factory.mktemp("mistral") / "model")


@pytest.fixture
def without_windows(monkeypatch):
    monkeypatch.setattr(genai_mends, "_mend_windows", lambda *_: None)


def test_a_right_graph_of_the_builder_is_taken(mistral, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n", "utf-8")
    words = [
        "export",
        "-m",
        str(mistral),
        "--corpus",
        str(tmp_path / "text.txt"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--format", "json"]) == 0
    said = capsys.readouterr()
    chosen = json.loads(said.out)["exporter"]
    assert chosen["name"] == "genai"
    assert "as transformers in torch for texts of 24 and 33 tokens" in chosen["reason"]
    assert f"exported with genai: {chosen['reason']}" in said.err.splitlines()
    exporter = read_manifest(tmp_path / "out").exporter
    assert exporter["reason"] == chosen["reason"]
    assert chosen["reason"] in (tmp_path / "out" / CARD_NAME).read_text("utf-8")


@pytest.mark.usefixtures("without_windows")
def test_a_wrong_graph_of_the_builder_is_not_taken(mistral, tmp_path):
    pair = make_pair(mistral, tmp_path / "out", "auto")
    exporter = read_manifest(pair.folder).exporter
    assert exporter["name"] == "transformers"
    assert "genai was not taken: its logits of a text of 24 tokens are off by" in exporter["reason"]
    compare(pair, count=4)


@pytest.mark.usefixtures("without_windows")
def test_verify_sees_a_wrong_graph_that_was_asked_for(mistral, tmp_path):
    pair = make_pair(mistral, tmp_path / "out", "genai")
    result = verify(pair.folder, pair.source, store=False)
    assert result.failed == ("source",)


def test_limits_are_those_of_every_set_of_frequencies():
    config = {
        "sliding_window": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "full_attention": {"original_max_position_embeddings": 16},
            "sliding_attention": {"rope_type": "default"},
        },
        "vocab_size": V,
    }
    assert limits_of([config]) == [8, 16, 64]
