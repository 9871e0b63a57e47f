"""The whole export: what a trimmed folder holds, and that it appears complete or not at all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers
from safetensors.numpy import load_file

from tests.support.exports import KEPT, V, open_graph, read_float32, run
from tests.support.folders import make_vocab
from tests.support.models import FAMILIES, PLAIN_EXPORTER, save_model
from tests.support.rounding import FLOAT16, assert_within, model_bound, product_bound
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.hashes import sha256_file
from trimserve.files.tensors import read_header
from trimserve.folder.opening import open_folder
from trimserve.vocab.file import load_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export import card, export, from_checkpoint
from trimserve_export.checkpoint.tasks import infer_task
from trimserve_export.exporters.exporter import load_exporter

pytestmark = [pytest.mark.export, pytest.mark.optimum]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_model("bert_encoder", tmp_path_factory.mktemp("bert") / "model", rows=V)


@pytest.fixture
def vocab() -> VocabMap:
    return make_vocab(KEPT, V)


def test_folder_is_complete_and_says_what_it_is(bert, vocab, tmp_path):
    result = export(bert, vocab, tmp_path / "out")
    folder = open_folder(tmp_path / "out", verify="full")
    manifest = folder.manifest
    assert (manifest.task, manifest.layout, manifest.dtype) == ("feature-extraction", "runtime", "fp32")
    assert (manifest.vocab_size, manifest.kept) == (V, len(KEPT))
    assert manifest.graphs == {"model": "model.onnx"}
    assert manifest.source.files == {"model.safetensors": sha256_file(bert / "model.safetensors")}
    assert manifest.tokenizer_sha256 == sha256_file(bert / "tokenizer.json")
    assert [(cut.name, cut.rows_before, cut.rows_after) for cut in manifest.cut] == [
        ("embeddings.word_embeddings.weight", V, len(KEPT))
    ]
    assert manifest.exporter.keys() >= {"trimserve", "name", "transformers", "torch"}
    assert manifest.exporter["name"] == PLAIN_EXPORTER
    assert {path.name for path in folder.path.iterdir()} == result.files.keys()
    assert {name: (folder.path / name).stat().st_size for name in result.files} == result.files
    np.testing.assert_array_equal(load_vocab(folder.path / "vocab_map.safetensors").kept_ids, KEPT)


@pytest.mark.optimum(only=True)
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "bert"])
def test_large_models_skip_the_exporters_clean_up_and_are_the_same(family, vocab, tmp_path, monkeypatch):
    """Above 2 GiB optimum-onnx cannot tie weights: our passes do."""
    model = save_model(family, tmp_path / "model", rows=V)
    export(model, vocab, tmp_path / "small")
    monkeypatch.setattr(load_exporter("optimum"), "_MAX_POST_PROCESSED_BYTES", 0)
    export(model, vocab, tmp_path / "large")
    sizes = [(tmp_path / name / "model.onnx_data").stat().st_size for name in ("small", "large")]
    assert sizes[0] == sizes[1]
    rows = np.zeros((1, read_float32(tmp_path / "small" / "cold_rows.safetensors")["embedding"].shape[1]))
    feeds = {"cold_rows": rows.astype(np.float32)}
    ids = np.arange(len(KEPT), dtype=np.int64)[None]
    small, large = (
        run(open_graph(tmp_path / name / "model.onnx"), ids, **feeds) for name in ("small", "large")
    )
    assert small.keys() == large.keys()
    for name, values in small.items():
        np.testing.assert_array_equal(values, large[name])


def test_result_counts_bytes_before_and_after(bert, vocab, tmp_path):
    result = export(bert, vocab, tmp_path / "out")
    specs, _ = read_header(bert / "model.safetensors")
    assert result.bytes_before == sum(spec.nbytes for spec in specs.values())
    assert result.bytes_after == result.files["model.onnx"] + result.files["model.onnx_data"]
    assert (result.kept, result.vocab_size) == (len(KEPT), V)
    assert result.peak_rss_bytes > 50e6
    assert json.loads(json.dumps(result.to_dict()))["files"] == result.files


def test_tokenizer_and_configs_are_copied_byte_for_byte(bert, vocab, tmp_path):
    (bert / "tokenizer_config.json").write_text('{"b": 1,\n  "a": 2}')
    (bert / "special_tokens_map.json").write_text("{ }")
    export(bert, vocab, tmp_path / "out")
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bert / name).read_bytes()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_card_states_facts_that_the_manifest_has(bert, vocab, tmp_path):
    (bert / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    export(bert, vocab, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card
    assert "37 -> 11 (29.73 %)" in card
    assert "`embeddings.word_embeddings.weight` (axis 0)" in card
    assert "--vocab vocab_map.safetensors" in card
    assert "$" not in card
    assert str(tmp_path) not in card


def test_same_inputs_give_the_same_files(bert, vocab, tmp_path):
    for name in ("one", "two"):
        export(bert, vocab, tmp_path / name)
    one, two = (open_folder(tmp_path / name).manifest.files for name in ("one", "two"))
    assert {k: v for k, v in one.items() if k != "README.md"} == {
        k: v for k, v in two.items() if k != "README.md"
    }


def test_without_cold_rows(bert, vocab, tmp_path):
    export(bert, vocab, tmp_path / "out", cold=False)
    folder = open_folder(tmp_path / "out")
    assert not folder.has_cold
    assert "cold_rows" in [value.name for value in open_graph(folder.path / "model.onnx").get_inputs()]
    assert "--no-cold" in (folder.path / "README.md").read_text("utf-8")


def test_sharded_checkpoint(vocab, tmp_path):
    model = save_model("llama", tmp_path / "model", rows=V, max_shard_size="4KB")
    export(model, vocab, tmp_path / "out")
    manifest = open_folder(tmp_path / "out").manifest
    assert len(manifest.source.files) > 2
    whole = export(save_model("llama", tmp_path / "whole", rows=V), vocab, tmp_path / "out_whole")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (
        whole.path / "model.onnx_data"
    ).read_bytes()


def test_bfloat16_checkpoint_as_fp32_is_exact(vocab, tmp_path):
    model = save_model("qwen3", tmp_path / "model", rows=V, dtype=torch.bfloat16)
    result = export(model, vocab, tmp_path / "out")
    folder = open_folder(tmp_path / "out")
    assert read_header(folder.path / "cold_rows.safetensors")[0]["embedding"].dtype == "BF16"
    assert result.bytes_before == 2 * sum(
        s.nbytes for s in read_header(model / "model.safetensors")[0].values()
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = np.array([[7, 20, 36, 0, 30]])
    zero = np.zeros((1, 16), np.float32)
    found = run(open_graph(folder.path / "model.onnx"), vocab.to_compact(ids), cold_rows=zero)["logits"]
    with torch.inference_mode():
        expected = reference(torch.tensor(ids)).logits.numpy()[..., list(KEPT)]
    bound = model_bound(reference, lambda model: model(torch.tensor(ids)).logits)
    assert_within(found, expected, bound, rows=-1)


def test_fp16_graph(bert, vocab, tmp_path):
    export(bert, vocab, tmp_path / "out", dtype="fp16")
    export(bert, vocab, tmp_path / "fp32")
    session = open_graph(tmp_path / "out" / "model.onnx")
    types = {value.name: value.type for value in session.get_inputs()}
    assert types["cold_rows"] == "tensor(float16)"
    ids = np.arange(len(KEPT)).reshape(1, -1)
    half = run(session, ids, cold_rows=np.zeros((1, 16), np.float16))["last_hidden_state"]
    full = run(open_graph(tmp_path / "fp32" / "model.onnx"), ids, cold_rows=np.zeros((1, 16), np.float32))
    model = transformers.BertModel.from_pretrained(bert).eval()
    fed = torch.tensor(np.array(KEPT)[ids])
    # Kernels add in float32 and round weights and results to half precision.
    bound = model_bound(model, lambda model: model(fed).last_hidden_state, roundoff=FLOAT16, roundings=2)
    assert_within(half, full["last_hidden_state"], bound, rows=1)


def test_bf16_graph_declares_bf16(bert, vocab, tmp_path):
    import onnx_ir as ir

    export(bert, vocab, tmp_path / "out", dtype="bf16")
    inputs = {value.name: value.dtype for value in ir.load(tmp_path / "out" / "model.onnx").graph.inputs}
    assert inputs["cold_rows"] == ir.DataType.BFLOAT16
    assert open_folder(tmp_path / "out").manifest.dtype == "bf16"


def test_safetensors_is_a_checkpoint_that_transformers_loads(vocab, tmp_path):
    model = save_model("llama", tmp_path / "model", rows=V, eos_token_id=[36, 20], bos_token_id=7)
    result = export(model, vocab, tmp_path / "out", to="safetensors")
    full = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    trimmed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (trimmed.config.vocab_size, trimmed.config.eos_token_id) == (len(KEPT), [10, 8])
    assert trimmed.config.bos_token_id == 6
    ids = np.array([[7, 20, 36, 0]])
    with torch.inference_mode():
        expected = full(torch.tensor(ids)).logits[..., list(KEPT)]
        found = trimmed(torch.tensor(vocab.to_compact(ids))).logits
        hidden = full.model(torch.tensor(ids)).last_hidden_state.numpy()
    # torch's kernels tile a head of another width in another order on some processors.
    head = full.lm_head.weight.detach().numpy()[list(KEPT)]
    assert_within(found.numpy(), expected.numpy(), product_bound(hidden, head.T), rows=-1)
    folder = open_folder(tmp_path / "out", verify="full")
    assert (folder.manifest.graphs, folder.manifest.dtype, folder.has_cold) == ({}, "fp32", True)
    assert result.bytes_after == result.files["model.safetensors"]


def test_encoder_from_a_masked_language_model(vocab, tmp_path):
    model = save_model("bert", tmp_path / "model", rows=V)
    export(model, vocab, tmp_path / "out", task="feature-extraction")
    folder = open_folder(tmp_path / "out")
    assert read_float32(folder.path / "cold_rows.safetensors").keys() == {"embedding", "head_bias"}


def test_awkward_sizes(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": V, "head_dim": 4}
    model = save_model("llama_tied", tmp_path / "model", rows=V, **sizes)
    export(model, make_vocab(KEPT, V), tmp_path / "out")
    zero = np.zeros((1, 8), np.float32)
    out = run(open_graph(tmp_path / "out" / "model.onnx"), np.arange(11).reshape(1, -1), cold_rows=zero)
    assert out["logits"].shape == (1, 11, 11)


def test_vocab_of_one_id(tmp_path):
    model = save_model("llama", tmp_path / "model", rows=V)
    export(model, make_vocab([20], V), tmp_path / "out")
    cold = load_file(tmp_path / "out" / "cold_rows.safetensors")["embedding"]
    rows = cold[[0, 5]]
    out = run(open_graph(tmp_path / "out" / "model.onnx"), np.array([[1, 0, 2]]), cold_rows=rows)
    assert out["logits"].shape == (1, 3, 1)


TASKS = {name: family.task for name, family in FAMILIES.items()}


@pytest.mark.parametrize("family", TASKS)
def test_task_follows_from_the_architecture(family):
    config = transformers.PretrainedConfig(architectures=[FAMILIES[family].model_class])
    assert infer_task(config) == TASKS[family]


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, "pass --task"),
        ("BertForMultipleChoice", "pass --task"),
        ("LlavaForConditionalGeneration", "multimodal"),
    ],
)
def test_task_that_is_not_known_is_asked_for(architecture, message):
    config = transformers.PretrainedConfig(architectures=[architecture] if architecture else None)
    with pytest.raises(UnsupportedModelError, match=message):
        infer_task(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "gguf"}, "use graph, runtime, tokenizer"),
        ({"exporter": "tf2onnx"}, "use auto, genai, optimum, transformers"),
        ({"device": "tpu"}, "use cpu, cuda, webgpu"),
        ({"device": "cuda", "exporter": "optimum"}, "use --exporter genai"),
        ({"dtype": "fp8"}, "use bf16, fp16, fp32"),
        ({"to": "tflite"}, "use gguf, onnx, safetensors"),
        ({"to": "gguf"}, "add --layout tokenizer"),
        ({"task": "translation"}, "use auto, feature-extraction, fill-mask"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_read(vocab, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export("no-such-folder", vocab, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("fill-mask", r"no cls\.predictions.* choose the task it was trained for"),
        ("text-generation-with-past", "'bert' model, not text-generation-with-past"),
    ],
)
def test_task_that_the_model_is_not_for_is_refused(bert, vocab, tmp_path, task, message):
    with pytest.raises(UnsupportedModelError, match=message):
        export(bert, vocab, tmp_path / "out", task=task)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_trimmed_already_is_refused(bert, vocab, tmp_path):
    export(bert, vocab, tmp_path / "once", to="safetensors", progress=False)
    with pytest.raises(UsageError, match=rf"trimmed already: .*{re.escape(str(bert))}"):
        export(tmp_path / "once", vocab, tmp_path / "twice")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


@pytest.mark.optimum(only=True)
def test_model_that_the_exporter_refuses(vocab, tmp_path):
    # optimum-onnx takes all heads of Phi for key-value heads.
    model = save_model("phi", tmp_path / "model", rows=V, num_key_value_heads=1)
    with pytest.raises(UnsupportedModelError, match=r"optimum-onnx 0.1.0 cannot export this 'phi' model"):
        export(model, vocab, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pad_id_that_a_classifier_needs_has_to_stay(tmp_path):
    model = save_model("bert_classifier", tmp_path / "model", rows=V, pad_token_id=9)
    with pytest.raises(UnsupportedModelError, match="needs the pad id 9"):
        export(model, make_vocab(KEPT, V), tmp_path / "out")


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel"), KeyboardInterrupt(), OSError(28, "No space left")]
)
@pytest.mark.parametrize(
    ("module", "step"),
    [
        (load_exporter(PLAIN_EXPORTER), "export_checkpoint"),
        (from_checkpoint, "make_servable"),
        (from_checkpoint, "save_vocab"),
        (card, "render_card"),
    ],
)
def test_failure_half_way_leaves_nothing(bert, vocab, tmp_path, monkeypatch, error, module, step):
    def fail(*args, **_options):
        for folder in (argument for argument in args if isinstance(argument, Path) and argument.is_dir()):
            (folder / "half-written").write_text("x")
        raise error

    monkeypatch.setattr(module, step, fail)
    with pytest.raises((type(error), UnsupportedModelError)):
        export(bert, vocab, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_refused(bert, vocab, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"not empty|no trimserve\.json"):
            export(bert, vocab, tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_our_folder_and_a_failure_keeps_it(bert, vocab, tmp_path, monkeypatch):
    export(bert, vocab, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        export(bert, vocab, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(from_checkpoint, "make_servable", lambda *_args, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(bert, make_vocab(KEPT[:7], V), tmp_path / "out", overwrite=True)
    assert open_folder(tmp_path / "out", verify="full").manifest.kept == len(KEPT)
    export(bert, make_vocab(KEPT[:7], V), tmp_path / "out", overwrite=True)
    assert open_folder(tmp_path / "out", verify="full").manifest.kept == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vocab_of_another_model_is_refused(bert, tmp_path):
    with pytest.raises(MismatchError, match="38 rows"):
        export(bert, make_vocab(KEPT, 38), tmp_path / "out")
    with pytest.raises(MismatchError, match="profile and select with this model"):
        export(bert, make_vocab(KEPT, V, "f" * 64), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_exporter_says_nothing(bert, vocab, tmp_path, capfd):
    export(bert, vocab, tmp_path / "out")
    out, err = capfd.readouterr()
    assert (out, re.sub(r"\s", "", err)) == ("", "")


def test_source_is_never_changed(bert, vocab, tmp_path):
    before = {path.name: sha256_file(path) for path in bert.iterdir()}
    export(bert, vocab, tmp_path / "out")
    assert {path.name: sha256_file(path) for path in bert.iterdir()} == before


@pytest.mark.optimum(only=True)
def test_missing_accelerate_is_asked_for(bert, vocab, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"needs accelerate.*trimserve\[export-optimum\]"):
        export(bert, vocab, tmp_path / "out")
