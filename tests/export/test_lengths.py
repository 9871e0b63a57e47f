"""Any length: on both sides of every limit in a config, graphs and generation are transformers' own."""

import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers

import trimserve
from tests.support.folders import make_vocab
from tests.support.models import with_random_weights
from tests.support.tiny_tokenizers import KINDS
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.manifest import Lengths
from trimserve.model.resolve import resolve_model
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import open_session
from trimserve_export import export
from trimserve_export.checkpoint.lengths import lengths_of_graph
from trimserve_export.exporters import rope
from trimserve_export.exporters.choice import is_installed
from trimserve_export.exporters.exporter import EXPORTERS, GraphJob, load_exporter
from trimserve_export.verify.plain_run import GraphModel

pytestmark = [pytest.mark.export, pytest.mark.optimum]

LIMIT, LONGEST = 16, 64
# Logits of these models are of size 10; fp32 sums in another order differ by 1e-5 of that.
TOLERANCE = 3e-4
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
_SIZES |= {"intermediate_size": 40, "max_position_embeddings": LONGEST}
_FACTORS = {"short_factor": [1.0, 1.1] * 4, "long_factor": [4.0, 9.0] * 4}
_LONGROPE = {"original_max_position_embeddings": LIMIT, "rope_scaling": {"type": "longrope"} | _FACTORS}
_WINDOW = {"sliding_window": LIMIT}
_WINDOWED_QWEN = _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}


def scaled(kind: str, **settings) -> dict:
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0} | settings}


_YARN = scaled("yarn", original_max_position_embeddings=LIMIT)
_LLAMA3 = scaled("llama3", original_max_position_embeddings=LIMIT, low_freq_factor=1.0, high_freq_factor=4.0)
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LONGEST}
# Name -> class and config; each has a limit at 16 tokens, and takes 64.
CASES: dict[str, tuple[str, dict]] = {
    "phi3_longrope": ("Phi3ForCausalLM", _SIZES | _LONGROPE),
    "llama_longrope": ("LlamaForCausalLM", _SIZES | _LONGROPE),
    "llama_dynamic": (
        "LlamaForCausalLM",
        _SIZES | scaled("dynamic") | {"max_position_embeddings": LIMIT},
    ),
    "llama_linear": ("LlamaForCausalLM", _SIZES | scaled("linear")),
    "llama_llama3": ("LlamaForCausalLM", _SIZES | _LLAMA3),
    "qwen2_yarn": ("Qwen2ForCausalLM", _SIZES | _YARN),
    "mistral_window": ("MistralForCausalLM", _SIZES | _WINDOW),
    "gemma3_window": ("Gemma3ForCausalLM", _SIZES | _WINDOW | {"head_dim": 16}),
    "qwen2_window": ("Qwen2ForCausalLM", _SIZES | _WINDOWED_QWEN),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
}
# Tried with every exporter; the others with the one that `auto` takes, and in the slow tests.
MAIN = ("phi3_longrope", "llama_longrope", "llama_dynamic", "mistral_window")


@dataclass
class Made:
    """A tiny model, its trimmed folder, and the runtime on it."""

    name: str
    source: Path
    folder: Path
    model: "trimserve.Generator"

    def torch_model(self) -> transformers.PreTrainedModel:
        """As it is loaded: transformers' dynamic frequencies depend on what the model saw before."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def tokens(self, count: int) -> np.ndarray:
        ids = np.random.default_rng(count).integers(0, self.model.folder.vocab.vocab_size, count)
        return ids.astype(np.int32)


def save(name: str, path: Path) -> Path:
    class_name, settings = CASES[name]
    model_class = getattr(transformers, class_name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 384}
    # A copy: configs write into the dictionaries that they are given.
    config = model_class.config_class(**copy.deepcopy(settings) | ids)
    with_random_weights(model_class(config), seed=1).save_pretrained(path)
    KINDS["byte_level_bpe"]().save(str(path / "tokenizer.json"))
    return path


def make(name: str, root: Path, exporter: str = "auto") -> Made:
    source = save(name, root / "model")
    size = json.loads((source / "config.json").read_text("utf-8"))["vocab_size"]
    kept = [*range(260), *range(260, size, 3)][: 2 * 128]
    export(source, make_vocab(sorted(kept), size), root / "out", exporter=exporter, progress=False)
    return Made(name, source, root / "out", trimserve.load(root / "out"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make each case once, with the exporter that is asked for."""
    known: dict[tuple[str, str], Made] = {}

    def get(name: str, exporter: str = "auto") -> Made:
        if (name, exporter) not in known:
            known[name, exporter] = make(name, tmp_path_factory.mktemp(name), exporter)
        return known[name, exporter]

    return get


FIRST = next(name for name in EXPORTERS if is_installed(name))
OTHERS = [name for name in EXPORTERS if is_installed(name) and name != FIRST]
COMBINATIONS = [(name, "auto") for name in CASES] + [(name, other) for name in MAIN for other in OTHERS]


def chosen(pairs):
    """Exporting takes seconds: what is much like another case is left to the slow tests."""
    for pair in pairs:
        slow = pair[0] not in MAIN or pair[1] != "auto"
        yield pytest.param(pair, id="-".join(pair), marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(params=list(chosen(COMBINATIONS)))
def case(request, made) -> Made:
    try:
        return made(*request.param)
    except UnsupportedModelError as error:
        if request.param[1] != "genai" or "use --exporter transformers" not in str(error):
            raise
        pytest.skip(str(error))


def graph_logits(case: Made, ids: np.ndarray, past: dict | None = None) -> dict[str, np.ndarray]:
    folder = case.model.folder
    graph = GraphModel(open_session(folder.path / "model.onnx"), folder.vocab, ColdRows(folder))
    return graph.run(ids, past)


def test_logits_are_transformers_on_both_sides_of_each_limit(case):
    kept = case.model.folder.vocab.kept_ids
    for length in (LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, LONGEST):
        ids = case.tokens(length)
        with torch.no_grad():
            expected = case.torch_model()(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        difference = np.abs(graph_logits(case, ids)["logits"][0] - expected[:, kept]).max()
        assert difference < TOLERANCE, (length, difference)


def test_steps_are_transformers_across_each_limit(case):
    """With a cache, token by token: keys keep the frequencies of their own step, as in transformers."""
    ids, model, kept = case.tokens(2 * LIMIT + 2), case.torch_model(), case.model.folder.vocab.kept_ids
    steps = [ids[: LIMIT - 2], *np.split(ids[LIMIT - 2 :], len(ids) - LIMIT + 2)]
    cache, past = None, {}
    for step in steps:
        with torch.no_grad():
            out = model(torch.tensor(step[None].astype(np.int64)), past_key_values=cache, use_cache=True)
        cache, found = out.past_key_values, graph_logits(case, step, past)
        past |= found
        difference = np.abs(found["logits"][0] - out.logits[0, :, kept].numpy()).max()
        assert difference < TOLERANCE, (past["present.0.key"].shape, difference)


@pytest.mark.parametrize("mode", ["exact", "compact"])
@pytest.mark.parametrize("start", [LIMIT - 4, LIMIT, 2 * LIMIT])
def test_generated_ids_are_transformers_across_each_limit(case, start, mode):
    """Exact mode drafts across the limit and takes drafts back; compact mode takes single steps."""
    ids, count = case.tokens(start), 20
    if mode == "compact":  # what it cannot produce is left out
        ids = np.intersect1d(ids, case.model.folder.vocab.kept_ids)[:start].astype(np.int32)
    banned = {} if mode == "exact" else {"suppress_tokens": case.model.folder.vocab.cold_ids.tolist()}
    with torch.no_grad():
        expected = case.torch_model().generate(
            torch.tensor(ids[None].astype(np.int64)),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            **banned,
        )[0, len(ids) :]
    (generated,) = case.model._generate([ids], {"max_new_tokens": count, "temperature": 0, "mode": mode})
    assert list(generated.ids) == expected.tolist()


def test_a_batch_gives_what_each_prompt_gives_alone(made):
    model = made("llama_dynamic").model
    prompts = ["the cat sat on the mat " * count for count in (1, 2, 3)]
    alone = [model.generate(prompt, max_new_tokens=8)[0].ids for prompt in prompts]
    assert [found.ids for found in model.generate(prompts, max_new_tokens=8)] == alone


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_score_is_the_whole_text_at_its_length(made, name):
    case = made(name)
    text = "the quick brown fox jumps over it"
    (score,) = case.model.score(text)
    assert len(score.ids) > LIMIT
    ids = torch.tensor(score.ids[None].astype(np.int64))
    with torch.no_grad():
        logits = case.torch_model()(ids).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(score.log_probs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MAIN)
def test_a_longer_prompt_is_an_error_with_both_numbers(made, name):
    model = made(name).model
    ids = np.ones(LONGEST + 1, np.int32)
    with pytest.raises(UsageError, match=rf"has {LONGEST + 1} tokens.* {LONGEST} at most"):
        model._generate([ids], {"max_new_tokens": 1})
    (generated,) = model._generate([ids[:-1]], {"max_new_tokens": 50, "temperature": 0})
    assert len(generated.ids) == 1  # the model's last position is read, and one token comes of it


def test_the_manifest_says_where_positions_change(made):
    found = {name: made(name).model.folder.manifest.lengths for name in MAIN}
    assert [found[name].unchanged for name in MAIN] == [LIMIT, LIMIT, LIMIT, None]
    assert [found[name].restarts for name in MAIN] == [True, False, False, False]
    assert {lengths.longest for lengths in found.values()} == {LONGEST}


@pytest.mark.usefixtures("traced_anew")
def test_a_constant_trace_is_found_by_these_tests(tmp_path, monkeypatch):
    """Without the frequencies in the graph the numbers above are wrong: the comparison can fail."""
    exporter = load_exporter("optimum" if is_installed("optimum") else "transformers")
    if exporter.__name__.endswith("transformers"):
        pytest.skip("transformers' exporter refuses to trace the model as it is")
    monkeypatch.setattr(exporter, "rope_by_length", contextlib.nullcontext)
    case = make("llama_dynamic", tmp_path)
    with pytest.raises(AssertionError):
        test_logits_are_transformers_on_both_sides_of_each_limit(case)


@pytest.mark.usefixtures("traced_anew")
def test_code_of_its_own_that_follows_the_length_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rope, "_follows_length", lambda _module: False)
    with pytest.raises(UnsupportedModelError, match=r"beyond 16 tokens \(dynamic\) in code of its own"):
        make("llama_dynamic", tmp_path, "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("constant", [False, True])
def test_a_graph_of_others_is_limited_to_where_it_is_right(tmp_path, monkeypatch, constant):
    """By whether it compares lengths with the one where its config says that the frequencies change."""
    exporter = load_exporter(FIRST)
    if constant and FIRST != "optimum":
        pytest.skip("no such graph is made here")
    if constant:
        monkeypatch.setattr(exporter, "rope_by_length", contextlib.nullcontext)
    source = save("phi3_longrope", tmp_path / "model")
    graph = exporter.export_checkpoint(source, tmp_path / "graph", GraphJob("text-generation-with-past"))
    found = lengths_of_graph(resolve_model(source), graph)
    assert found == (Lengths(LIMIT) if constant else Lengths(LONGEST, LIMIT, restarts=True))
