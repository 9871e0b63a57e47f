"""Exporters: which one is taken, what their graphs are, and onnxruntime-genai on what is made of its own.

What each needs skips where it is not installed; test_matrix.py compares trimmed graphs.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from torch.utils._pytree import register_pytree_node

from tests.support.folders import make_vocab
from tests.support.models import GENERATE, needs_transformers_5, save_model
from tests.support.rounding import assert_within, model_bound
from trimserve.cli.main import main
from trimserve.errors import MissingExtraError, UnsupportedModelError, UsageError
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.opening import list_files, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.vocab.map import VocabMap
from trimserve_export import export
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.exporters import choice
from trimserve_export.exporters.choice import choose_exporter, is_installed
from trimserve_export.exporters.exporter import EXPORTERS, GraphJob, load_exporter
from trimserve_export.layouts.writing import write_layout_graph
from trimserve_export.serving.quantize import quantization_of
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, pytest.mark.optimum]
needs_genai = pytest.mark.skipif(
    not is_installed("genai"), reason="needs transformers 5 and onnxruntime-genai"
)
SIZES = {"hidden_size": 32, "tokenizer": "byte_level_bpe"}


def config_of(family: str):
    classes = {
        "llama": transformers.LlamaConfig,
        "gpt2": transformers.GPT2Config,
        "bert": transformers.BertConfig,
    }
    names = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}
    return classes[family](architectures=[names[family]])


@pytest.fixture
def installed(monkeypatch):
    """Let `choice` believe that some exporters are installed, all of which take every model they know."""

    class Stub:
        def __init__(self, name):
            self.name = name

        def check_model(self, config, _task):
            if self.name == "genai" and config.model_type != "llama":
                raise UnsupportedModelError(f"genai does not build {config.model_type}.")

        def check_job(self, job):
            if self.name == "genai" and job.dtype != "fp32" and job.device == "cpu":
                raise UsageError("genai makes fp32 for cpu.")

    def set_installed(*names):
        monkeypatch.setattr(
            choice, "_INSTALLED", {name: lambda name=name: name in names for name in EXPORTERS}
        )
        monkeypatch.setattr(choice, "load_exporter", Stub)

    return set_installed


@pytest.mark.parametrize(
    ("there", "family", "device", "chosen"),
    [
        (("optimum",), "llama", "cpu", "optimum"),
        (("genai", "transformers"), "llama", "cpu", "genai"),
        (("genai", "transformers"), "bert", "cpu", "transformers"),
        (("optimum", "genai"), "llama", "cuda", "genai"),
    ],
)
def test_auto_takes_what_is_installed_and_exports_the_model(installed, there, family, device, chosen):
    installed(*there)
    found = choose_exporter("auto", config_of(family), GraphJob(GENERATE, device=device))
    assert found.name == chosen
    assert found.reason


def test_auto_leaves_half_precision_on_a_cpu_to_who_makes_it(installed):
    installed("genai", "transformers")
    for dtype in ("fp16", "bf16"):
        assert choose_exporter("auto", config_of("llama"), GraphJob(GENERATE, dtype)).name == "transformers"
        on_device = GraphJob(GENERATE, dtype, device="cuda")
        assert choose_exporter("auto", config_of("llama"), on_device).name == "genai"


def test_auto_compares_the_builders_graph_and_has_another_in_reserve(installed):
    installed("genai", "transformers")
    found = choose_exporter("auto", config_of("llama"), GraphJob(GENERATE))
    assert (found.name, found.rival.name) == ("genai", "transformers")
    assert choose_exporter("genai", config_of("llama"), GraphJob(GENERATE)).rival is None
    assert choose_exporter("auto", config_of("llama"), GraphJob(GENERATE, device="cuda")).rival is None
    half = choose_exporter("auto", config_of("llama"), GraphJob(GENERATE, "fp16"))
    assert half.name == "transformers"
    assert "genai makes fp32 for cpu" in half.reason


def test_auto_says_what_another_exporter_lacks(installed):
    installed("genai", "transformers")
    reason = choose_exporter("auto", config_of("bert"), GraphJob("fill-mask")).reason
    assert "genai does not build bert" in reason


def test_auto_without_any_names_the_command(installed):
    installed()
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[export\]'"):
        choose_exporter("auto", config_of("llama"), GraphJob(GENERATE))


@pytest.mark.parametrize("name", EXPORTERS)
def test_an_exporter_that_is_not_installed_names_the_command(installed, name):
    installed(*(other for other in EXPORTERS if other != name))
    with pytest.raises(
        MissingExtraError, match=rf"--exporter {name} needs .* pip install 'trimserve\[export"
    ):
        choose_exporter(name, config_of("llama"), GraphJob(GENERATE))


def test_no_exporter_for_a_model_says_why(installed):
    installed("genai")
    with pytest.raises(UnsupportedModelError, match="genai does not build gpt2"):
        choose_exporter("auto", config_of("gpt2"), GraphJob(GENERATE))


def test_a_device_that_no_installed_exporter_serves_is_refused(installed):
    installed("optimum")
    with pytest.raises(UnsupportedModelError, match="no installed exporter makes graphs for cuda"):
        choose_exporter("auto", config_of("llama"), GraphJob(GENERATE, device="cuda"))


def test_the_command_says_which_exporter_and_why(tmp_path, capsys):
    model = save_model("llama", tmp_path / "model", **SIZES)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n", "utf-8")
    words = ["export", "-m", str(model), "--corpus", str(tmp_path / "text.txt"), "-o"]
    assert main([*words, str(tmp_path / "json"), "--format", "json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["exporter"]
    assert chosen["name"] == next(filter(is_installed, EXPORTERS))
    assert chosen["reason"]
    assert open_folder(tmp_path / "json").manifest.exporter["name"] == chosen["name"]


def run_on_empty_cache(graph, ids, mask=None):
    """All outputs of a decoder for token ids (B, T)."""
    session = ort.InferenceSession(str(graph))
    mask = np.ones_like(ids) if mask is None else mask
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
        "token_type_ids": np.zeros_like(ids),
    }
    wanted = {value.name: value for value in session.get_inputs()}
    for name, value in wanted.items():
        if name.startswith("past_key_values."):
            feeds[name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))


def torch_logits(model, ids, mask=None):
    """The full model's logits, and how far another computation of them may lie from them."""
    full = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    real = slice(None) if mask is None else mask.astype(bool)

    @torch.no_grad()
    def logits(changed):
        padding = None if mask is None else torch.tensor(mask)
        return changed(torch.tensor(ids), attention_mask=padding).logits.numpy()[real]

    return logits(full), model_bound(full, logits, draws=3)


# The builder rounds Gemma's scale of the embedding, sqrt(H), to two decimals: 8 it keeps.
@needs_genai
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama_tied", {}),
        (
            "gemma3",
            {"hidden_size": 64, "head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
        ),
    ],
)
def test_genai_graphs_equal_torch(tmp_path, family, sizes):
    model = save_model(family, tmp_path / "model", **SIZES | sizes)
    graph = load_exporter("genai").export_checkpoint(model, tmp_path / "out", GraphJob(GENERATE))
    ids = np.random.default_rng(0).integers(0, 300, (1, 40))  # five sliding windows of Gemma's
    assert_within(run_on_empty_cache(graph, ids)["logits"], *torch_logits(model, ids), rows=-1)


@needs_genai
def test_scaled_rope_of_some_layers_is_refused(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = save_model("gemma3", tmp_path / "model", **SIZES, head_dim=16, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="scale the positions of all layers"):
        load_exporter("genai").export_checkpoint(model, tmp_path / "out", GraphJob(GENERATE))


@needs_genai
@pytest.mark.parametrize(
    ("device", "dtype", "quantize", "activations"),
    [
        ("cuda", "fp16", None, ir.DataType.FLOAT16),
        ("cuda", "bf16", None, ir.DataType.BFLOAT16),
        ("cuda", "fp16", "int4", ir.DataType.FLOAT16),
        ("cuda", "bf16", "int4", ir.DataType.BFLOAT16),
        ("webgpu", "fp16", "int4", ir.DataType.FLOAT16),
        ("webgpu", "fp32", "int8", ir.DataType.FLOAT),
    ],
)
def test_genai_graphs_for_other_devices(tmp_path, device, dtype, quantize, activations):
    model = save_model("llama_tied", tmp_path / "model", **SIZES)
    job = GraphJob(GENERATE, dtype, quantize, device)
    graph = ir.load(load_exporter("genai").export_checkpoint(model, tmp_path / "out", job)).graph
    cache = next(value for value in graph.inputs if value.name == "past_key_values.0.key")
    assert (cache.dtype, cache.shape[3]) == (activations, 16)
    products = {node.op_type for node in graph}
    assert ("MatMulNBits" in products) == (quantize is not None)
    session = json.loads((tmp_path / "out" / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    assert device.lower() in json.dumps(session["session_options"]["provider_options"]).lower()


@needs_genai
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "unquantised graphs for cpu with --dtype fp32, not fp16"),
        ({"device": "webgpu", "dtype": "bf16"}, "for webgpu with --dtype fp16 or fp32, not bf16"),
        ({"device": "cuda", "quantize": "int4"}, "with --dtype fp16 or bf16, not fp32"),
        (
            {"device": "cuda", "quantize": "int8", "dtype": "bf16", "cold": False},
            "with --dtype fp16, not bf16",
        ),
    ],
)
def test_what_the_builder_does_not_make_is_refused(tmp_path, options, message):
    model = save_model("llama", tmp_path / "model", **SIZES)
    size = resolve_model(model).vocab_size
    with pytest.raises(UsageError, match=message):
        export(model, make_vocab(range(size), size), tmp_path / "out", exporter="genai", **options)
    assert not (tmp_path / "out").exists()


@needs_genai
def test_a_vocab_as_large_as_a_linear_is_refused(tmp_path):
    """The builder would take the feed-forward layer for the head, without a word."""
    model = save_model("llama", tmp_path / "model", **SIZES, intermediate_size=300)
    source = resolve_model(model)
    structural = structural_ids(source)
    others = np.setdiff1d(np.arange(source.vocab_size), structural)
    for count in (300, 301):
        kept = np.union1d(structural, others[: count - len(structural)])
        vocab = make_vocab(kept, source.vocab_size)
        if count == 300:
            with pytest.raises(UnsupportedModelError, match=r"gate_proj has 300 rows like the vocab"):
                export(model, vocab, tmp_path / "out", exporter="genai")
        else:
            export(model, vocab, tmp_path / "out", exporter="genai")


@needs_genai
def test_a_half_precision_folder_is_verified_on_the_cpu(tmp_path):
    model = save_model("llama_tied", tmp_path / "model", **SIZES)
    source = resolve_model(model)
    kept = np.union1d(structural_ids(source), np.arange(0, 288))
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    options = {"exporter": "genai", "device": "cuda", "quantize": "int4"}
    export(source, vocab, tmp_path / "out", dtype="fp16", **options)
    assert open_folder(tmp_path / "out").manifest.exporter["device"] == "cuda"
    result = verify(tmp_path / "out", model, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    with pytest.raises(UnsupportedModelError, match="bf16 scales are not built"):
        export(source, vocab, tmp_path / "bf16", dtype="bf16", **options)
    export(source, vocab, tmp_path / "bf16", dtype="bf16", cold=False, **options)


@needs_genai
@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", {"hidden_size": 16}, "heads of a multiple of 16 numbers, and this model's have 8"),
        ("gpt2", {}, "does not build GPT2LMHeadModel"),
        ("bert_encoder", {}, "builds text-generation-with-past alone"),
    ],
)
def test_models_that_the_builder_does_not_take_are_refused(tmp_path, family, sizes, message):
    model = save_model(family, tmp_path / "model", tokenizer="byte_level_bpe", **sizes)
    task = GENERATE if family != "bert_encoder" else "feature-extraction"
    with pytest.raises(UnsupportedModelError, match=message):
        load_exporter("genai").check_model(load_config(model), task)


@needs_genai
@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_onnxruntime_genai_runs_what_was_made_of_its_graphs(tmp_path, layout, quantize):
    """Greedy ids are those of the untrimmed graph whose other logits are masked."""
    import onnxruntime_genai as og

    model = save_model("llama_tied", tmp_path / "model", **SIZES)
    source = resolve_model(model)
    kept = np.union1d(structural_ids(source), np.arange(0, 288))
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    result = export(source, vocab, tmp_path / "out", exporter="genai", layout=layout, quantize=quantize)
    vocab = open_folder(result.path).vocab
    full = load_exporter("genai").export_checkpoint(model, tmp_path / "full", GraphJob(GENERATE))
    if quantize is not None:
        (tmp_path / "rounded").mkdir()
        everything = VocabMap.everything(source.vocab_size)
        scheme = quantization_of(quantize)
        full = write_layout_graph(
            full, tmp_path / "rounded", everything, drop_in=False, has_head=True, scheme=scheme
        )
    ids = [int(id_) for id_ in kept[:9]]
    expected = list(ids)
    for _ in range(8):
        logits = run_on_empty_cache(full, np.array([expected]))["logits"][0, -1]
        expected.append(int(vocab.kept_ids[logits[vocab.kept_ids].argmax()]))
    loaded = og.Model(str(result.path))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(expected), min_length=len(expected), do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(vocab.to_compact(np.array(ids)).tolist() if layout == "tokenizer" else ids)
    while not generator.is_done() and len(generator.get_sequence(0)) < len(expected):
        generator.generate_next_token()
    found = generator.get_sequence(0)
    found = vocab.to_original(found).tolist() if layout == "tokenizer" else list(found)
    assert found == expected[: len(found)]
    assert len(found) > len(ids) + 2


@needs_genai
@pytest.mark.parametrize("layout", ["runtime", "tokenizer", "graph"])
def test_verify_sees_shifted_rows_of_a_quantised_table(tmp_path, layout):
    """One table of integers, looked up and multiplied with."""
    model = save_model("llama_tied", tmp_path / "model", **SIZES)
    source = resolve_model(model)
    kept = np.union1d(structural_ids(source), np.arange(0, 288))
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    folder = export(source, vocab, tmp_path / "out", exporter="genai", layout=layout, quantize="int4").path
    checks = verify(folder, model, store=False).checks
    assert [check for check in checks if not check.ok] == []
    assert {"quantized-head", "quantized-embedding"} <= {check.name for check in checks}
    graph = ir.load(folder / "model.onnx")
    rows = len(open_folder(folder).vocab)
    weights = graph.graph.initializers.values()
    tables = [value for value in weights if value.shape[:1] == (rows,) and value.dtype == ir.DataType.UINT8]
    assert [len(table.shape) for table in tables] == [3, 2]  # the same bytes, a block or a row together
    for table in tables:
        table.const_value = ir.tensor(np.roll(table.const_value.numpy(), 1, axis=0), name=table.name)
    ir.save(graph, folder / "model.onnx")
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=list_files(folder)))
    failed = set(verify(folder, model, store=False).failed)
    assert failed >= {"quantized-head", "quantized-embedding"}
    assert failed & {"hidden-states", "layout-outputs"}


@needs_transformers_5
def test_transformers_graph_has_the_names_of_others_and_equals_torch(tmp_path):
    model = save_model("llama_tied", tmp_path / "model", tokenizer="byte_level_bpe")
    path = load_exporter("transformers").export_checkpoint(model, tmp_path / "out", GraphJob(GENERATE))
    graph = ir.load(path).graph
    caches = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "position_ids", *caches]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(name.replace("past_key_values", "present") for name in caches),
    ]
    shapes = {value.name: str(value.shape) for value in graph.inputs}
    assert shapes["input_ids"] == "[batch_size,sequence_length]"
    assert shapes["attention_mask"] == "[batch_size,total_sequence_length]"
    assert shapes["past_key_values.0.key"] == "[batch_size,1,past_sequence_length,8]"
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    found = run_on_empty_cache(path, ids, mask)["logits"][mask.astype(bool)]
    assert_within(found, *torch_logits(model, ids, mask), rows=-1)


class CacheList(list):
    """What torch takes apart into its tensors, as it does transformers' caches."""

    def __init__(self, tensors, layer):
        super().__init__(tensors)
        self.layers = [layer]


register_pytree_node(CacheList, lambda cache: (list(cache), None), lambda leaves, _: CacheList(leaves, None))


def test_caches_are_found_by_what_they_are_whatever_they_are_called():
    """A later transformers spells them anew; here the values of a layer even come before its keys."""
    exporter = load_exporter("transformers")
    graph = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 20]>
        g (int64[b, t] input_ids, float[b, 1, p, 8] p0, float[b, 1, p, 4] p1, float window)
            => (float[b, 1, q, 4] first, float[b, 1, q, 8] second)
        {
            new0 = RandomNormal <shape = [2, 1, 3, 8]> ()
            new1 = RandomNormal <shape = [2, 1, 3, 4]> ()
            second = Concat <axis = 2> (p0, new0)
            joined = Concat <axis = 2> (p1, new1)
            first = Identity (joined)
        }"""
    ).graph
    layer = SimpleNamespace(keys=torch.zeros(2, 1, 3, 4), values=torch.zeros(2, 1, 3, 8))
    cache = [layer.values, layer.keys, torch.tensor(3.0)]
    example = {"input_ids": torch.zeros(2, 3), "past_key_values": CacheList(cache, layer)}
    exporter._name_caches(graph, example)
    assert [value.name for value in graph.inputs][1:3] == ["past_key_values.0.value", "past_key_values.0.key"]
    assert [value.name for value in graph.outputs] == ["present.0.key", "present.0.value"]


def test_a_graph_that_cannot_be_run_is_never_put_in_place(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model", **SIZES)
    size = resolve_model(model).vocab_size
    name = next(filter(is_installed, EXPORTERS))

    def refuses(*_args, **_kwargs):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : head sizes differ")

    monkeypatch.setattr("trimserve.runtime.decoder.Decoder.step", refuses)
    with pytest.raises(UnsupportedModelError, match=rf"the graph that {name} made .*head sizes differ"):
        export(model, make_vocab(range(size), size), tmp_path / "out")
    assert not (tmp_path / "out").exists()
