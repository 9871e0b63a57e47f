"""`trimserve run` with prompts, pairs, rankings and sparse vectors."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.models import save_model
from tests.support.sentence_models import HIDDEN, V, add_modules, encoder_folder, trimmed, write_json
from trimserve.cli.main import main

pytestmark = pytest.mark.export


@pytest.fixture
def run(capsys):
    def call(*words) -> tuple[int, str, str]:
        code = main(["run", *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_json(run):
    def call(*words) -> dict:
        code, out, err = run(*words, "--format", "json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedder")
    source = encoder_folder(
        root / "model", ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": "cls"})
    )
    prompts = {"prompts": {"query": "the cat ", "passage": "a dog "}, "similarity_fn_name": "dot"}
    write_json(source / "config_sentence_transformers.json", prompts)
    return trimmed(source, root / "trimmed")


def test_prompts_and_search(run, run_json, embedder, tmp_path):
    folder = embedder.folder.path
    found = run_json(folder, "the mat", "--prompt-name", "passage")["embeddings"]
    np.testing.assert_array_equal(np.float32(found), embedder.encode(["the mat"], prompt_name="passage"))
    found = run_json(folder, "the mat", "--prompt", "a ")["embeddings"]
    np.testing.assert_array_equal(np.float32(found), embedder.encode(["the mat"], prompt="a "))
    assert "there is no prompt 'x'" in run(folder, "a", "--prompt-name", "x")[2]
    (tmp_path / "corpus.txt").write_text("the mat\nlatte\n")
    found = run_json(folder, "dog", "--corpus", tmp_path / "corpus.txt")
    expected = embedder.encode_query(["dog"]) @ embedder.encode_document(["the mat", "latte"]).T
    assert found["similarity"] == "dot"
    assert [hit["dot"] for hit in found["hits"][0]] == pytest.approx(
        sorted(expected[0].tolist())[::-1], abs=1e-5
    )


def test_pairs_and_rankings(run, run_json, tmp_path):
    source = save_model("bert_classifier", tmp_path / "model", rows=V, num_labels=1)
    encoder = trimmed(source, tmp_path / "trimmed")
    pairs = [("the cat", "sat on"), ("a dog", "the mat")]
    found = run_json(tmp_path / "trimmed", json.dumps(pairs[0]), "\t".join(pairs[1]), "--pairs")
    np.testing.assert_array_equal(np.float32(found["scores"]), encoder.predict(pairs))
    assert found["pairs"] == [list(pair) for pair in pairs]
    code, _, err = run(tmp_path / "trimmed", "the cat", "--pairs")
    assert (code, "'the cat' is no pair" in err) == (2, True)
    found = run_json(tmp_path / "trimmed", "sat on", "the mat", "a", "--query", "the dog", "--top", 2)
    assert found["ranking"] == encoder.rank(
        "the dog", ["sat on", "the mat", "a"], top_k=2, return_documents=True
    )
    assert "the dog" in run(tmp_path / "trimmed", "sat on", "--query", "the dog")[1].splitlines()[0]
    assert run(tmp_path / "trimmed", "a", "--prompt", "b")[0] == 2


def test_sparse_vectors(run, run_json, tmp_path):
    splade = ("sentence_transformers.sparse_encoder.models.SpladePooling", {})
    first = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    encoder = trimmed(
        add_modules(save_model("bert", tmp_path / "model", rows=V), splade, first=first), tmp_path / "out"
    )
    (found,) = run_json(tmp_path / "out", "the cat")["sparse"]
    (vector,) = encoder.encode_sparse("the cat")
    assert found["ids"] == vector.ids.tolist()
    np.testing.assert_array_equal(np.float32(found["weights"]), vector.weights)
    assert run(tmp_path / "out", "the cat")[1].splitlines()[2].split()[2] == str(len(vector.ids))
