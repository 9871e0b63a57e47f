"""Checkpoints of AWQ, GPTQ and compressed-tensors: their numbers by a reference in torch, kept to the bit."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the [export] extra")

import onnx_ir as ir  # noqa: E402
import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import trimserve  # noqa: E402
from tests.support.models import PLAIN_EXPORTER, save_model  # noqa: E402
from tests.support.packed_models import CONFIGS, change, quantize_folder  # noqa: E402
from tests.support.quantized_graphs import matrices  # noqa: E402
from trimserve.errors import MismatchError, UnsupportedModelError  # noqa: E402
from trimserve.files.quantized import BlockScheme, dequantize  # noqa: E402
from trimserve.folder.opening import open_folder  # noqa: E402
from trimserve.model.resolve import resolve_model  # noqa: E402
from trimserve.runtime.cold_rows import ColdRows  # noqa: E402
from trimserve.vocab.map import VocabMap  # noqa: E402
from trimserve_export.serving.stored_rows import carrier, stored_rows  # noqa: E402
from trimserve_export.source.whole import whole_source  # noqa: E402

pytestmark = pytest.mark.export
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def make(folder, kind, **sizes):
    """A quantised llama, and the model of transformers that it stands for."""
    save_model("llama", folder, tokenizer="byte_level_bpe", **SIZES | sizes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).float().eval()
    truth = quantize_folder(folder, kind)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in truth:
                weight.copy_(truth[name])
    return reference, truth


def edit(folder, **settings):
    """Change settings of the quantisation section; dots part the levels."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for path, value in settings.items():
        *levels, last = ("quantization_config." + path).split(".")
        section = config
        for level in levels:
            section = section[level]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def vocab_of(source, step=2):
    kept = np.arange(0, source.vocab_size, step, dtype=np.int32)
    return VocabMap(kept, np.zeros(len(kept), np.uint8), source.vocab_size, source.tokenizer_sha256)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_numbers_are_those_of_the_reference(kind, tmp_path):
    reference, truth = make(tmp_path / "m", kind)
    with whole_source(resolve_model(tmp_path / "m")) as whole:
        found = transformers.AutoModelForCausalLM.from_pretrained(whole.path, dtype=torch.float32)
        stored = stored_rows(whole.packed_matrices())
    for name, weight in reference.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    for rows in truth.values():
        made = carrier(stored.find(rows.numpy()), 4)
        assert made.bits == (8 if kind in ("gptq-8", "compressed-channel") else 4)
        scheme = BlockScheme(made.bits, made.block_size, zero_points=made.zero_points is not None)
        again = dequantize(made.integers, made.scales, rows.shape[1], scheme, made.zero_points)
        assert np.array_equal(again, rows.numpy())


def test_int4_keeps_blocks_and_vocab_rows_have_eight_bits(tmp_path):
    _, truth = make(tmp_path / "m", "awq")
    source = resolve_model(tmp_path / "m")
    vocab = vocab_of(source)
    out = trimserve.export(
        tmp_path / "m", vocab, tmp_path / "out", quantize="int4", exporter=PLAIN_EXPORTER, progress=False
    ).path
    expected = {row.tobytes() for rows in truth.values() for row in rows.numpy() + np.float32(0)}
    *body, (head, _) = matrices(ir.load(out / "model.onnx").graph)
    assert sum(len(rows) for _, rows in body) == sum(len(rows) for rows in truth.values())
    for node, rows in body:
        assert node.attributes["bits"].as_int() == 4
        assert {row.tobytes() for row in rows} <= expected
    assert head.attributes["bits"].as_int() == 8
    manifest = json.loads((out / "trimserve.json").read_text("utf-8"))
    assert list(manifest["source"]["files"]) == ["model.safetensors"]
    assert manifest["source"]["name"] == str(tmp_path / "m")
    assert trimserve.verify(out, progress=False).ok


def test_without_quantize_it_is_the_reference_in_float32(tmp_path):
    reference, _ = make(tmp_path / "m", "gptq")
    source = resolve_model(tmp_path / "m")
    vocab = vocab_of(source)
    out = trimserve.export(tmp_path / "m", vocab, tmp_path / "out", progress=False).path
    table, ids = load_file(tmp_path / "m" / "model.safetensors"), vocab.cold_ids
    cold = ColdRows(open_folder(out))
    assert np.array_equal(cold.embedding(ids), table["model.embed_tokens.weight"][ids].astype(np.float32))
    assert np.array_equal(cold.head(ids), table["lm_head.weight"][ids].astype(np.float32))
    generator = trimserve.load(out)
    for prompt in ("the cat sat on", "a mat"):
        given = torch.tensor([source.tokenizer().encode(prompt).ids])
        expected = reference.generate(given, max_new_tokens=12, do_sample=False)[0, given.shape[1] :]
        assert list(generator.generate([prompt], max_new_tokens=12)[0].ids) == expected.tolist()


def test_inspect_reads_the_headers_alone(tmp_path):
    make(tmp_path / "m", "awq")
    facts = trimserve.inspect(tmp_path / "m", kept=64)
    assert facts.told_by == "headers"
    assert {tensor.role for tensor in facts.vocab_tensors} == {"embedding", "head"}
    assert facts.weight_bytes < (tmp_path / "m" / "model.safetensors").stat().st_size


def test_a_quantisers_own_file_says_the_same(tmp_path):
    make(tmp_path / "m", "awq")
    config = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), "utf-8")
    own = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    (tmp_path / "m" / "quant_config.json").write_text(json.dumps(own), "utf-8")
    assert resolve_model(tmp_path / "m").packed_settings.layout == "awq"
    with whole_source(resolve_model(tmp_path / "m")) as whole:
        assert not (whole.path / "quant_config.json").exists()
        assert whole.packed.bits == 4


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("awq", {"version": "gemv"}, "AWQ with version 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point false"),
        ("awq", {"bits": 3}, "3 bits"),
        ("awq", {"group_size": 8}, "groups of 8"),
        ("gptq", {"bits": 3}, "3 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("compressed", {"format": "int-quantized"}, "format 'int-quantized'"),
        ("compressed", {f"{GROUP}.input_activations": {"num_bits": 8}}, "quantised activations"),
        ("compressed", {f"{GROUP}.weights.type": "float"}, "type 'float'"),
        ("compressed", {f"{GROUP}.weights.strategy": "tensor"}, "strategy 'tensor'"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(kind, settings, message, tmp_path):
    make(tmp_path / "m", kind)
    edit(tmp_path / "m", **settings)
    source = resolve_model(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match=f"{message}.*pass the model that it was made from"):
        trimserve.export(
            tmp_path / "m", VocabMap.everything(source.vocab_size), tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "tensors", "error", "message"),
    [
        ("gptq", {"g_idx": np.zeros(64, np.int32)}, UnsupportedModelError, "desc_act or actorder"),
        ("gptq", {"qzeros": np.full((2, 8), -1, np.int32)}, UnsupportedModelError, "libraries read as two"),
        ("awq", {"scales": None}, MismatchError, "lacks model.layers.0.*scales"),
        ("awq", {"qzeros": None}, MismatchError, "lacks .*qzeros"),
        ("awq", {"scales": np.ones((3, 64), np.float16)}, MismatchError, "should be 2 x 64"),
        ("awq", {"qweight": None}, MismatchError, "has no qweight"),
        ("compressed", {"weight_shape": np.array([64, 99])}, MismatchError, "weight_shape says"),
    ],
)
def test_layers_that_are_damaged_or_in_another_order_are_refused(kind, tensors, error, message, tmp_path):
    make(
        tmp_path / "m", kind, num_attention_heads=1, num_key_value_heads=1, head_dim=64, intermediate_size=64
    )
    change(tmp_path / "m", **tensors)
    source = resolve_model(tmp_path / "m")
    with pytest.raises(error, match=message):
        trimserve.export(
            tmp_path / "m", VocabMap.everything(source.vocab_size), tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()
