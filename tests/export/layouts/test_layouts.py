"""Layouts for other runtimes: transformers and optimum load the folders and give the full model's tokens."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from tests.support.models import PLAIN_EXPORTER, save_model
from tests.support.rounding import assert_within, change_of_outputs, model_bound
from tests.support.tiny_tokenizers import CHAT_TEMPLATE, TEXT
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.opening import list_files, open_folder
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve.vocab.map import VocabMap
from trimserve_export import export
from trimserve_export.exporters.choice import is_installed
from trimserve_export.exporters.exporter import GraphJob, load_exporter
from trimserve_export.layouts.drop_in import LOOKUP_NAME, id_table, make_drop_in
from trimserve_export.layouts.segmentation import Sample
from trimserve_export.verify import verify

pytestmark = pytest.mark.export

PROMPTS = ("The cat sat on the", "What is the total", "a dog and", "user: can I")
SETTINGS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tied decoder with a byte-level tokenizer, as transformers loads it."""
    path = save_model("qwen3", tmp_path_factory.mktemp("qwen3") / "model", tokenizer="byte_level_bpe")
    (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"tokenizer_class": "Qwen2Tokenizer"}))
    return path


@pytest.fixture(scope="module")
def counted(model):
    return profile([], model, texts=["The cat sat on the mat. The dog sat on the log"], progress=False)


@pytest.fixture(scope="module")
def vocab(counted) -> VocabMap:
    return select(counted, coverage=0.9, multiple_of=8)


@pytest.fixture(scope="module")
def full(model):
    return AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture(scope="module")
def folders(model, counted, vocab, tmp_path_factory):
    """The folder of each layout, made once."""
    root = tmp_path_factory.mktemp("layouts")
    sample = Sample(TEXT.splitlines())
    for name, options in {
        "checkpoint": {"layout": "tokenizer", "to": "safetensors"},
        "tokenizer": {"layout": "tokenizer"},
        "graph": {"layout": "graph"},
        "graph_no_cold": {"layout": "graph", "cold": False},
    }.items():
        export(model, vocab, root / name, profile=counted, sample=sample, **options)
    return root


class OnlyKept(LogitsProcessor):
    """Masks the full model's logits: the reference for every compact one."""

    def __init__(self, vocab: VocabMap) -> None:
        self._cold = torch.from_numpy(vocab.cold_ids.astype(np.int64))

    def __call__(self, _ids, scores):
        return scores.index_fill(-1, self._cold, float("-inf"))


def greedy(model, ids, processors=()) -> list[int]:
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=TOKENS,
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
        pad_token_id=0,
    )
    return made[0, len(ids) :].tolist()


def check_same_generation(folder, loaded, full, model) -> None:
    """Prompts that are segmented identically give the tokens of the masked full model."""
    vocab = open_folder(folder).vocab
    original, cut = (AutoTokenizer.from_pretrained(path) for path in (model, folder))
    compared = 0
    for prompt in PROMPTS:
        ids, compact = original(prompt)["input_ids"], cut(prompt)["input_ids"]
        if vocab.to_original(compact).tolist() == ids:
            found = vocab.to_original(greedy(loaded, compact)).tolist()
            assert found == greedy(full, ids, [OnlyKept(vocab)])
            compared += 1
    assert compared >= 2


def test_checkpoint_of_layout_tokenizer_in_transformers(folders, full, model):
    folder = folders / "checkpoint"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    vocab = open_folder(folder).vocab
    assert loaded.config.vocab_size == len(vocab) == loaded.get_input_embeddings().num_embeddings
    assert loaded.config.eos_token_id == vocab.to_compact(full.config.eos_token_id)
    check_same_generation(folder, loaded, full, model)


def in_optimum(loader: str, folder: Path, **options):
    """A folder as a class of optimum loads it."""
    import optimum.onnxruntime

    return getattr(optimum.onnxruntime, loader).from_pretrained(folder, **options)


@pytest.mark.optimum(only=True)
def test_graph_of_layout_tokenizer_in_optimum(folders, full, model):
    folder = folders / "tokenizer"
    loaded = in_optimum("ORTModelForCausalLM", folder, use_io_binding=False)
    check_same_generation(folder, loaded, full, model)


def test_layout_tokenizer_has_the_exporters_interface(folders):
    folder = open_folder(folders / "tokenizer", verify="full")
    assert not folder.has_cold
    assert not {"cold_head.onnx", "cold_rows.safetensors"} & set(folder.manifest.files)
    names = {value.name for value in open_session(folder.path).get_inputs()}
    assert names >= {"input_ids", "attention_mask", "past_key_values.0.key"}
    assert not names & {"cold_rows", "logits_to_keep"}
    assert open_session(folder.path).get_outputs()[0].name == "logits"
    with pytest.raises(UnsupportedModelError, match="for other runtimes"):
        load(folder.path)


def test_tokenizer_in_transformers(folders, model):
    folder = folders / "checkpoint"
    vocab = open_folder(folder).vocab
    original, cut = (AutoTokenizer.from_pretrained(path) for path in (model, folder))
    assert len(cut) == len(vocab)
    assert sorted(cut.get_vocab().values()) == list(range(len(vocab)))
    assert (cut.eos_token, cut.pad_token) == (original.eos_token, original.pad_token)
    assert cut.eos_token_id == vocab.to_compact(original.eos_token_id)
    messages = [{"role": "user", "content": "The cat sat"}]
    expected = original.apply_chat_template(messages, add_generation_prompt=True)
    found = cut.apply_chat_template(messages, add_generation_prompt=True)
    assert cut.decode(found) == original.decode(expected)
    for text in TEXT.splitlines():
        assert cut.decode(cut(text)["input_ids"]) == original.decode(original(text)["input_ids"]) == text


def test_segmentation_is_stored_and_in_the_card(folders):
    folder = open_folder(folders / "tokenizer")
    facts = folder.manifest.segmentation
    assert facts["texts"] == len(TEXT.splitlines())
    assert 0 < facts["identical"] < facts["texts"]
    assert facts["tokens_after"] > facts["tokens_before"]
    assert facts["held_out"]
    card = (folder.path / "README.md").read_text("utf-8")
    assert f"{facts['identical']} of {facts['texts']} held-out texts" in card
    assert "byte for byte" not in card
    assert "--layout tokenizer" in card
    assert "drop-in" in (folders / "graph" / "README.md").read_text("utf-8")


def open_session(folder) -> ort.InferenceSession:
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def logits_of(folder, ids) -> np.ndarray:
    session = open_session(folder)
    feeds = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        "token_type_ids": np.zeros((1, len(ids)), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: feeds[name] for name in names & feeds.keys()})[0]


@pytest.mark.optimum(only=True)
def test_drop_in_generates_in_optimum_with_the_original_tokenizer(folders, full, model, vocab):
    folder = folders / "graph"
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    loaded = in_optimum("ORTModelForCausalLM", folder, use_io_binding=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cold = 0
    for prompt in (*PROMPTS, "unseen Ωmega 🦊 latte"):
        ids = tokenizer(prompt)["input_ids"]
        cold += (~vocab.is_kept(ids)).sum()
        assert greedy(loaded, ids) == greedy(full, ids, [OnlyKept(vocab)])
    assert cold > 5


def test_drop_in_logits_are_the_full_ones_where_kept(folders, full, vocab):
    ids = np.arange(vocab.vocab_size)[:60]
    found = logits_of(folders / "graph", ids)
    with torch.inference_mode():
        expected = full(torch.tensor(ids[None])).logits.numpy()
    assert found.shape == expected.shape
    bound = model_bound(full, lambda model: model(torch.tensor(ids[None])).logits)
    assert_within(found[..., vocab.kept_ids], expected[..., vocab.kept_ids], bound, rows=-1)
    assert np.all(found[..., vocab.cold_ids] == -np.inf)


def test_drop_in_without_cold_rows_refuses_a_cold_id(folders, vocab):
    kept, cold = vocab.kept_ids[:3].tolist(), int(vocab.cold_ids[0])
    folder = folders / "graph_no_cold"
    assert not open_folder(folder).has_cold
    np.testing.assert_array_equal(logits_of(folder, kept), logits_of(folders / "graph", kept))
    with pytest.raises(Exception, match=f"(?s){LOOKUP_NAME}.*out of (data )?bounds"):
        logits_of(folder, [*kept, cold])
    with pytest.raises(Exception, match=r"out of (data )?bounds"):
        logits_of(folders / "graph", [vocab.vocab_size])


class UncheckedGather(OpRun):
    """Gather as CUDA's: an index out of bounds reads zeros."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        found = np.take(data, np.clip(indices, 0, data.shape[axis] - 1), axis=axis)
        if data.ndim == 2 and axis == 0:
            found[(indices < 0) | (indices >= len(data))] = 0
        return (found,)


UncheckedGather.__name__ = "Gather"


def test_cold_id_without_a_row_is_nan_where_lookups_are_not_checked(tmp_path):
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="lookup"),
            helper.make_node("Identity", ["rows"], ["last_hidden_state"]),
        ],
        "embedding",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 2])],
        [numpy_helper.from_array(rows, "table")],
    )
    source = tmp_path / "source.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), source)
    vocab = VocabMap(np.array([2, 3, 6]), np.zeros(3, np.uint8), 8)
    (tmp_path / "out").mkdir()
    path = make_drop_in(source, tmp_path / "out", vocab, has_head=False)
    evaluator = ReferenceEvaluator(str(path), new_ops=[UncheckedGather])
    (found,) = evaluator.run(None, {"input_ids": np.array([[2, 5, 6]])})
    np.testing.assert_array_equal(found[0], [rows[0], [np.nan, np.nan], rows[2]])


def test_table_from_ids_to_rows():
    vocab = VocabMap(np.array([2, 3, 6]), np.zeros(3, np.uint8), 8)
    assert id_table(vocab, slots=True).tolist() == [3, 4, 0, 1, 5, 6, 2, 7]
    assert id_table(vocab, slots=False).tolist() == [3, 3, 0, 1, 3, 3, 2, 3]


def expected_ids(folder, full, model, prompt) -> tuple[list[int], list[int]] | None:
    """Ids of a prompt in the folder's own vocab and what the masked full model says to it, up to its end."""
    vocab = open_folder(folder).vocab
    ids = AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]
    made = greedy(full, ids, [OnlyKept(vocab)])
    made = [id_ for id_ in made if id_ != full.config.eos_token_id]
    if open_folder(folder).manifest.layout == "graph":
        return ids, made
    if not vocab.is_kept(ids).all():
        return None
    return vocab.to_compact(ids).tolist(), vocab.to_compact(made).tolist()


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_onnxruntime_genai_generates(folders, full, model, layout):
    og = pytest.importorskip("onnxruntime_genai")
    folder = folders / layout
    loaded = og.Model(str(folder))
    tokenizer = og.Tokenizer(loaded)
    compared = 0
    for prompt in PROMPTS:
        if (expected := expected_ids(folder, full, model, prompt)) is None:
            continue
        ids = tokenizer.encode(prompt).tolist()
        parameters = og.GeneratorParams(loaded)
        parameters.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
        generator = og.Generator(loaded, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        assert (ids, generator.get_sequence(0).tolist()[len(ids) :]) == expected
        compared += len(expected[1])
    assert compared > TOKENS


def by_transformers_js(folder: Path, options: object, prompts: Iterable[str]) -> list[tuple[list, list]]:
    """Ids of each prompt and what follows, as transformers.js under Node gives them, up to the end."""
    scripts = Path(__file__).parents[2] / "js"
    node = shutil.which("node")
    if node is None or not (scripts / "node_modules").is_dir():
        pytest.skip("transformers.js is not installed: make test-js")
    settings = [str(folder.parent), folder.name, str(TOKENS), json.dumps(options)]
    command = [node, str(scripts / "generate.mjs"), *settings, *prompts]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    return [
        (result["ids"], [id_ for id_ in result["made"] if id_ != end]) for result in json.loads(done.stdout)
    ]


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_transformers_js_generates(folders, full, model, layout):
    expected = {prompt: expected_ids(folders / layout, full, model, prompt) for prompt in PROMPTS}
    expected = {prompt: ids for prompt, ids in expected.items() if ids is not None}
    beside = {"subfolder": "", "use_external_data_format": True, "dtype": "fp32"}
    assert by_transformers_js(folders / layout, beside, expected) == list(expected.values())
    assert len(expected) >= 2


# transformers.js' dtype -> what it ends a file's name with.
VARIANTS = {"fp32": "", "q4": "_q4", "int8": "_int8", "q8": "_quantized"}


@pytest.fixture(scope="module")
def variants(model, tmp_path_factory) -> Path:
    """One model in four precisions, laid out for transformers.js; the weights of one lie beside its graph."""
    folder = tmp_path_factory.mktemp("variants") / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    exported = load_exporter(PLAIN_EXPORTER).export_checkpoint(
        resolve_model(model).path, folder / "onnx", GraphJob("text-generation-with-past")
    )
    blocks = MatMulNBitsQuantizer(str(exported), block_size=16, is_symmetric=True)
    blocks.process()
    blocks.model.save_model_to_file(str(folder / "onnx" / "model_q4.onnx"), True)
    for dtype, kind in (("int8", QuantType.QInt8), ("q8", QuantType.QUInt8)):
        quantize_dynamic(exported, folder / "onnx" / f"model{VARIANTS[dtype]}.onnx", weight_type=kind)
    return folder


def by_graph(graph: Path, ids: list[int], allowed: np.ndarray, end: int) -> list[int]:
    """The largest allowed logit of a graph as it was exported, a token at a time, up to the end."""
    session = ort.InferenceSession(str(graph))
    feeds = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    known = {value.name for value in session.get_inputs()}
    made: list[int] = []
    while len(made) < TOKENS and end not in made:
        fed = np.array([made[-1:] or ids])
        count = len(ids) + len(made)
        feeds |= {"input_ids": fed, "attention_mask": np.ones((1, count), np.int64)}
        feeds["position_ids"] = np.arange(count - fed.size, count)[None]
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {name: array for name, array in feeds.items() if name in known})
        outputs = dict(zip(names, found, strict=True))
        made.append(int(allowed[outputs.pop("logits")[0, -1, allowed].argmax()]))
        feeds |= {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
    return [id_ for id_ in made if id_ != end]


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_transformers_js_loads_each_variant(variants, counted, vocab, full, model, tmp_path, layout):
    export(variants, vocab, tmp_path / "out", layout=layout, profile=counted)
    kept = open_folder(tmp_path / "out").vocab
    tokenizer, end = AutoTokenizer.from_pretrained(model), full.config.eos_token_id
    prompts = [p for p in PROMPTS if layout == "graph" or kept.is_kept(tokenizer(p)["input_ids"]).all()]
    expected = []
    for suffix in VARIANTS.values():
        for ids in (tokenizer(prompt)["input_ids"] for prompt in prompts):
            made = by_graph(variants / "onnx" / f"model{suffix}.onnx", ids, kept.kept_ids, end)
            moved = (ids, made) if layout == "graph" else (kept.to_compact(ids), kept.to_compact(made))
            expected.append(tuple(list(map(int, part)) for part in moved))
    # One file of weights beside the graph of q4, and one of cold rows beside each drop-in.
    files = {dtype: (dtype == "q4") + (layout == "graph") for dtype in VARIANTS}
    options = [{"dtype": dtype, "use_external_data_format": count} for dtype, count in files.items()]
    assert by_transformers_js(tmp_path / "out", options, prompts) == expected
    assert len({tuple(made) for _, made in expected}) > len(prompts), "the variants all say the same"
    assert len(prompts) >= 2


@pytest.mark.parametrize(
    ("family", "tokenizer", "loader"),
    [
        ("bert", "wordpiece", "ORTModelForMaskedLM"),
        ("bert_encoder", "wordpiece", "ORTModelForFeatureExtraction"),
        ("xlm_roberta", "unigram", "ORTModelForMaskedLM"),  # counts positions from the pad id
    ],
)
@pytest.mark.optimum
@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_encoders(tmp_path, family, tokenizer, loader, layout):
    path = save_model(family, tmp_path / "model", tokenizer=tokenizer)
    source = resolve_model(path)
    counted = profile([], source, texts=["the cat sat on the mat"], progress=False)
    export(
        path, select(counted, coverage=0.9, multiple_of=1), tmp_path / "out", layout=layout, profile=counted
    )
    vocab = open_folder(tmp_path / "out").vocab
    assert len(vocab) < vocab.vocab_size
    text = "the cat sat" if layout == "tokenizer" else "the cat un dog tte l"
    ids = np.array(source.tokenizer().encode(text).ids)
    fed = vocab.to_compact(ids) if layout == "tokenizer" else ids
    inputs = {"input_ids": fed[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    session = open_session(tmp_path / "out")
    known = {value.name for value in session.get_inputs()}
    if "token_type_ids" in known:
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    found = session.run(None, inputs)[0]
    if is_installed("optimum"):
        tensors = {name: torch.tensor(value) for name, value in inputs.items()}
        by_optimum = in_optimum(loader, tmp_path / "out")(**tensors)[0].numpy()
        np.testing.assert_array_equal(by_optimum, found)
    expected, bound = full_output(path, family, ids)
    if layout == "graph":
        assert (~vocab.is_kept(ids)).any()
    if family != "bert_encoder":
        expected = expected[..., vocab.kept_ids]
        found = found if layout == "tokenizer" else found[..., vocab.kept_ids]
    assert_within(found, expected, bound, rows=-1)
    assert verify(tmp_path / "out", path, store=False, progress=False).ok


def full_output(path, family, ids) -> tuple[np.ndarray, float]:
    """The full model's output by torch, and how far another computation of it may lie from it."""
    import transformers

    from tests.support.models import FAMILIES

    model = getattr(transformers, FAMILIES[family].model_class).from_pretrained(path).eval()

    @torch.no_grad()
    def output(model) -> np.ndarray:
        return model(torch.tensor(ids[None]))[0].numpy()

    return output(model), model_bound(model, output)


def test_bfloat16_cold_rows_in_an_fp32_drop_in(tmp_path):
    path = save_model("qwen3", tmp_path / "model", tokenizer="byte_level_bpe", dtype=torch.bfloat16)
    export(path, vocab_for(path), tmp_path / "out", layout="graph")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found_vocab = open_folder(tmp_path / "out").vocab
    ids = np.arange(40)
    with torch.inference_mode():
        expected = reference(torch.tensor(ids[None])).logits.numpy()[..., found_vocab.kept_ids]
    found = logits_of(tmp_path / "out", ids)[..., found_vocab.kept_ids]
    bound = model_bound(reference, lambda model: model(torch.tensor(ids[None])).logits)
    assert_within(found, expected, bound, rows=-1)


def vocab_for(path) -> VocabMap:
    return select(profile([], path, texts=["The cat"], progress=False), coverage=0.9, multiple_of=8)


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_quantized_layouts_run(model, full, vocab, tmp_path, layout):
    export(model, vocab, tmp_path / "out", layout=layout, quantize="int8")
    export(model, vocab, tmp_path / "fp32", layout=layout)
    ids = open_folder(tmp_path / "out").vocab.kept_ids[:4].tolist() if layout == "graph" else [1, 2, 3, 4]
    found, expected = (logits_of(tmp_path / name, ids) for name in ("out", "fp32"))
    fed = torch.tensor([ids if layout == "graph" else vocab.kept_ids[ids].tolist()])

    def step(weight: torch.Tensor, _: int) -> torch.Tensor:
        """What 8 bits may change in a number of a matrix: half a step of its row's largest one."""
        return weight.abs().amax(-1, keepdim=True) / 127 / 2 * (weight.ndim > 1)

    # Twice: the activations are rounded to 8 bits as well.
    bound = 2 * change_of_outputs(full, lambda model: model(fed).logits, step)
    assert_within(found, expected, bound, rows=1)
    assert not np.array_equal(found, expected)


def test_combinations_that_make_no_sense_are_refused(model, vocab, tmp_path):
    with pytest.raises(UsageError, match="layout graph changes a graph"):
        export(model, vocab, tmp_path / "out", layout="graph", to="safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["checkpoint", "tokenizer", "graph", "graph_no_cold"])
def test_verify_holds(folders, model, full, name):
    result = verify(folders / name, model, store=False, progress=False)
    assert result.ok, result.failed
    if name != "checkpoint":
        outputs = next(check for check in result.checks if check.name == "layout-outputs")
        assert outputs.max_abs_diff <= model_bound(full, lambda made: made(torch.arange(60)[None]).logits)


def damaged(folders, name, tmp_path):
    return Path(shutil.copytree(folders / name, tmp_path / name))


def rehash(folder) -> None:
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=list_files(folder)))


@pytest.mark.parametrize("name", ["tokenizer", "graph"])
def test_verify_sees_a_shifted_row(folders, model, tmp_path, name):
    folder = damaged(folders, name, tmp_path)
    graph = ir.load(folder / "model.onnx")
    size = (len(open_folder(folder).vocab), 16)
    table = next(v for v in graph.graph.initializers.values() if tuple(v.shape.numpy()) == size)
    rows = table.const_value.numpy().copy()
    rows[[5, 6]] = rows[[6, 5]]
    table.const_value = ir.tensor(rows, name=table.name)
    ir.save(graph, folder / "model.onnx")
    rehash(folder)
    result = verify(folder, model, store=False, progress=False)
    assert {"kept-rows", "layout-outputs"} <= set(result.failed)


def test_verify_sees_a_shifted_token_and_a_shifted_table(folders, model, tmp_path):
    folder = damaged(folders, "checkpoint", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    one, two = list(vocab)[5:7]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    rehash(folder)
    assert "tokenizer" in verify(folder, model, store=False, progress=False).failed
    folder = damaged(folders, "graph", tmp_path)
    graph = ir.load(folder / "model.onnx")
    table = graph.graph.initializers["trimserve/logits/columns"]
    columns = np.roll(table.const_value.numpy(), 1)
    table.const_value = ir.tensor(columns, name=table.name)
    ir.save(graph, folder / "model.onnx")
    rehash(folder)
    assert set(verify(folder, model, store=False, progress=False).failed) == {"id-tables", "layout-outputs"}


@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_verify_of_quantized_layouts(model, vocab, tmp_path, layout):
    export(model, vocab, tmp_path / "out", layout=layout, quantize="int8")
    result = verify(tmp_path / "out", model, store=False, progress=False)
    assert result.ok, result.failed
    graph = ir.load(tmp_path / "out" / "model.onnx")
    kept = len(open_folder(tmp_path / "out").vocab)
    weights = graph.graph.initializers.values()
    blocks = next(value for value in weights if value.shape[0] == kept and len(value.shape) == 3)
    blocks.const_value = ir.tensor(np.roll(blocks.const_value.numpy(), 1, axis=0), name=blocks.name)
    ir.save(graph, tmp_path / "out" / "model.onnx")
    rehash(tmp_path / "out")
    failed = verify(tmp_path / "out", model, store=False, progress=False).failed
    assert {"quantized-head", "layout-outputs"} <= set(failed)


@pytest.mark.realdata
def test_real_model_in_onnxruntime_genai(data_dir, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    path = data_dir / "models" / "multidomain-qwen2"
    seen = (data_dir / "corpora" / "gsm8k-en" / "text.txt").read_text("utf-8")[:200_000]
    counted = profile([], path, texts=[seen], progress=False)
    export(path, select(counted), tmp_path / "out", layout="tokenizer", profile=counted, progress=False)
    vocab = open_folder(tmp_path / "out").vocab
    prompt = "Natalia sold clips to 48 of her friends in"
    ids = resolve_model(path).tokenizer().encode(prompt).ids
    loaded = og.Model(str(tmp_path / "out"))
    compact = og.Tokenizer(loaded).encode(prompt).tolist()
    assert vocab.to_original(compact).tolist() == ids
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(compact)
    while not generator.is_done():
        generator.generate_next_token()
    found = vocab.to_original(generator.get_sequence(0)[len(ids) :]).tolist()
    full = AutoModelForCausalLM.from_pretrained(path).eval()
    made = full.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=24,
        do_sample=False,
        logits_processor=LogitsProcessorList([OnlyKept(vocab)]),
    )
    assert found == made[0, len(ids) :].tolist()
    assert len(found) == 24
