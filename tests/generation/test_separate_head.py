"""A head with fewer rows than the embedding: the tokens and probabilities are the full model's."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import trimserve
from tests.support.exports import KEPT, V
from tests.support.folders import make_vocab
from tests.support.generators import FullSampler, greedy_by_torch, make_pair, open_generator
from tests.support.graph_folders import save_graph
from tests.support.models import GENERATE, save_model
from tests.support.rounding import assert_within
from trimserve.cli.main import main
from trimserve.decoding.sampling import SamplingParams
from trimserve.decoding.scoring import log_sum_exp
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.tensors import read_header
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.names import COLD_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.vocab.file import load_vocab, save_vocab
from trimserve_export import export
from trimserve_export.from_graph.trimmed import serve_full
from trimserve_export.verify.runner import verify

pytestmark = pytest.mark.export

OUTPUT = (0, 2, 8, 20, 36)  # K_out = 5 of K = 11
TEXTS = ["the cat sat on the mat", "a", "Grüße, Welt! 🎉", "dog", ""]
TOKENS = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("apart")
    sizes = {"rows": V, "hidden_size": 8, "intermediate_size": 12}
    return make_pair(root, "llama", kept_ids=KEPT, output_ids=OUTPUT, **sizes)


@pytest.fixture(scope="module")
def vocab():
    return dataclasses.replace(make_vocab(KEPT, V), output_ids=np.array(OUTPUT))


def test_each_matrix_has_its_own_rows(tiny):
    folder = tiny.generator.folder
    rows = {tensor.name: tensor.rows_after for tensor in folder.manifest.cut}
    assert rows == {"model.embed_tokens.weight": 11, "lm_head.weight": 5}
    cold = read_header(folder.path / COLD_NAME)[0]
    assert {name: spec.shape for name, spec in cold.items()} == {"embedding": (26, 8), "head": (32, 8)}
    assert (folder.manifest.kept, folder.manifest.head_rows) == (11, 5)


def test_greedy_ids_are_those_of_torch(tiny):
    generator, model = tiny.generator, tiny.torch_model()
    produced = set()
    for text in TEXTS:
        (ids,) = generator.codec.encode([text])
        expected = greedy_by_torch(model, ids, TOKENS)
        for certify in (True, False):
            (result,) = generator.generate(text, max_new_tokens=TOKENS, certify=certify)
            assert list(result.ids) == expected
        produced |= set(expected)
    vocab = generator.folder.vocab
    kinds = {(bool(vocab.is_kept(id_)), bool(vocab.head.is_kept(id_))) for id_ in produced}
    assert (True, False) in kinds, "no id with a row in the embedding alone was produced"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.2},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9},
        {"repetition_penalty": 1.5},
        {"temperature": 0.8, "presence_penalty": 0.5, "logit_bias": {7: 3.0, 9: 2.0}},
    ],
    ids=lambda params: "-".join(params),
)
def test_sampled_ids_are_those_of_the_untrimmed_graph(tiny, params):
    generator, sampler = tiny.generator, FullSampler(tiny.full_graph, V)
    for seed, text in enumerate(TEXTS):
        (ids,) = generator.codec.encode([text])
        expected = sampler.run(ids, SamplingParams(seed=seed, **params), TOKENS, generator.stop_ids)
        for certify in (True, False):
            (result,) = generator.generate(text, max_new_tokens=TOKENS, seed=seed, certify=certify, **params)
            assert list(result.ids) == expected


def test_scores_are_the_full_models(tiny):
    sampler = FullSampler(tiny.full_graph, V)
    for score in tiny.generator.score(TEXTS[:4]):
        logits = sampler.logits(score.ids)[:-1].astype(np.float64)
        expected = logits[np.arange(len(logits)), score.ids[1:]] - log_sum_exp(logits)
        # A log-probability is a logit less a mean of logits of a kind: both may be off.
        assert_within(score.log_probs, expected, 2 * sampler.rounding(score.ids), rows=0)


def test_beams_are_the_full_models(tiny, tmp_path):
    whole = make_pair(tmp_path, "llama", kept_ids=range(V), rows=V, hidden_size=8, intermediate_size=12)
    for text in TEXTS[:2]:
        found, expected = (
            model.generate(text, max_new_tokens=8, num_beams=3)[0].ids
            for model in (tiny.generator, whole.generator)
        )
        assert found == expected


def test_compact_mode_gives_output_ids_and_those_of_the_prompt(tiny):
    (ids,) = tiny.generator.codec.encode(["the cat"])
    for seed in range(6):
        (result,) = tiny.generator.generate(
            "the cat", mode="compact", temperature=2.0, seed=seed, max_new_tokens=20
        )
        assert set(result.ids) <= {*OUTPUT, *ids.tolist()}


def test_verify_passes_and_catches_a_shifted_row(tiny, tmp_path):
    result = verify(tiny.generator.folder.path, tiny.model_path, store=False, progress=False)
    assert result.ok, result
    broken = tmp_path / "broken"
    shutil.copytree(tiny.generator.folder.path, broken)
    shifted = dataclasses.replace(open_folder(broken).vocab, output_ids=np.array([0, 2, 7, 20, 36]))
    save_vocab(shifted, broken / "vocab_map.safetensors")
    _seal(broken)
    failed = verify(broken, tiny.model_path, store=False, progress=False).failed
    assert {"kept-rows", "kept-logits"} <= set(failed)


def _seal(path):
    """Let the manifest agree with files that a test changed."""
    write_manifest(path, dataclasses.replace(read_manifest(path), files=list_files(path)))


@pytest.mark.parametrize("family", ["phi", "gemma2"])  # a bias over the vocab, a soft cap
def test_other_heads(family, tmp_path):
    pair = make_pair(tmp_path, family, kept_ids=KEPT, output_ids=OUTPUT, rows=V)
    (ids,) = pair.generator.codec.encode([TEXTS[0]])
    expected = greedy_by_torch(pair.torch_model(), ids, TOKENS)
    assert list(pair.generator.generate(TEXTS[0], max_new_tokens=TOKENS)[0].ids) == expected


def test_a_quantised_head_and_its_cold_rows(tmp_path):
    pair = make_pair(
        tmp_path, "llama", kept_ids=KEPT, output_ids=OUTPUT, rows=V, quantize="int4", hidden_size=32
    )
    sampler = FullSampler(pair.full_graph, V)
    (ids,) = pair.generator.codec.encode([TEXTS[0]])
    expected = sampler.run(ids, SamplingParams(), TOKENS, pair.generator.stop_ids)
    assert list(pair.generator.generate(TEXTS[0], max_new_tokens=TOKENS)[0].ids) == expected
    assert verify(tmp_path / "trimmed", pair.model_path, store=False, progress=False).ok


@pytest.mark.parametrize("kind", ["fp32", "int4", "int8"])
def test_an_onnx_graph_is_cut_alike(kind, vocab, tmp_path):
    source = save_graph(tmp_path, "llama", kind, rows=V, hidden_size=32)
    (tmp_path / "full").mkdir()
    sampler = FullSampler(serve_full(source, tmp_path / "full", task=GENERATE), V)
    export(source, vocab, tmp_path / "out", progress=False)
    assert sorted(tensor.rows_after for tensor in open_folder(tmp_path / "out").manifest.cut)[0] == 5
    generator = open_generator(tmp_path / "out")
    for seed, params in enumerate(({}, {"temperature": 1.0})):
        (ids,) = generator.codec.encode([TEXTS[seed]])
        expected = sampler.run(ids, SamplingParams(seed=seed, **params), TOKENS, generator.stop_ids)
        (result,) = generator.generate(TEXTS[seed], max_new_tokens=TOKENS, seed=seed, **params)
        assert list(result.ids) == expected
    assert verify(tmp_path / "out", source, store=False, progress=False).ok


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_tied_graph_is_refused(kind, vocab, tmp_path):
    source = save_graph(tmp_path, "llama_tied", kind, rows=V)
    with pytest.raises(UnsupportedModelError, match="this model is tied"):
        export(source, vocab, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_from_a_corpus_of_prompts_and_completions_to_a_verified_folder(tmp_path, capsys):
    model = save_model("llama", tmp_path / "model")
    rows = [{"q": "the cat sat on the mat", "a": "a dog"} for _ in range(9)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    columns = {"text_column": "q", "output_column": "a"}
    counted = trimserve.profile([tmp_path / "chats.jsonl"], model, progress=False, **columns)
    chosen = trimserve.select(counted, separate_output=True, multiple_of=1)
    made = export(model, chosen, tmp_path / "out", progress=False)
    assert made.head_rows == len(chosen.output_ids) < made.kept
    assert verify(tmp_path / "out", model, progress=False).ok
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert f"head rows       {made.head_rows}" in capsys.readouterr().out
    assert f"-> {made.head_rows}, those of the output ids" in (tmp_path / "out" / "README.md").read_text()


def test_refusals(vocab, tmp_path):
    tied = save_model("llama_tied", tmp_path / "tied", rows=V)
    with pytest.raises(UnsupportedModelError, match="this model is tied"):
        export(tied, vocab, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    for options in ({"layout": "graph"}, {"layout": "tokenizer"}, {"to": "safetensors"}):
        with pytest.raises(UsageError, match="same ids in embedding and head"):
            export(tied, vocab, tmp_path / "out", progress=False, **options)
    masked = save_model("bert", tmp_path / "masked", rows=V)
    with pytest.raises(UnsupportedModelError, match="not for fill-mask"):
        export(masked, vocab, tmp_path / "out", progress=False)


def test_the_vocab_file_has_one_tensor_and_comes_back(vocab, tmp_path):
    path = tmp_path / "vocab_map.safetensors"
    save_vocab(vocab, path)
    assert list(read_header(path)[0]) == ["vocab_map"]
    loaded = load_vocab(path)
    assert loaded.output_ids.tolist() == list(OUTPUT)
    assert loaded.head.kept_ids.tolist() == list(OUTPUT)
    assert loaded.head.cold_ids.size == V - 5
    with pytest.raises(MismatchError, match="output id 6 is not kept"):
        dataclasses.replace(vocab, output_ids=np.array([0, 6]))


def test_without_cold_rows_the_head_still_has_its_own(vocab, tmp_path):
    model = save_model("llama", tmp_path / "model", rows=V)
    export(model, vocab, tmp_path / "out", cold=False, progress=False)
    generator = open_generator(tmp_path / "out")
    (result,) = generator._generate([np.array([0, 30], np.int32)], {"max_new_tokens": 8, "mode": "compact"})
    assert set(result.ids) <= set(OUTPUT)
