"""Quantised checkpoints are refused by the name of their method: said by a config, or by tensors alone."""

import json

import numpy as np
import pytest

from trimserve.errors import UnsupportedModelError
from trimserve.files.tensors import exhaust, write_tensors
from trimserve.model.quantized import check_floats
from trimserve.model.source import ModelSource

PROJECTION = "model.layers.0.self_attn.q_proj"
CONFIGS = {
    "GPTQ (4 bits)": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "GPTQ": {"quantization_config": {"desc_act": False, "group_size": 128}},
    "AWQ (4 bits)": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "FP8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "bitsandbytes (4 bits)": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "bitsandbytes (8 bits)": {"quantization_config": {"load_in_8bit": True}},
    "compressed-tensors": {"compression_config": {"config_groups": {}}},
    "MXFP4": {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
    "torchao": {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}},
    "quanto": {"quantization_config": {"quant_method": "quanto", "weights": "int8"}},
    "HQQ": {"llm_config": {"text_config": {"quantization_config": {"quant_method": "hqq"}}}},
    "a-method-of-tomorrow": {"quantization_config": {"quant_method": "a-method-of-tomorrow"}},
    "4-bit groups": {"quantization": {"group_size": 64, "bits": 4}},
}
FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
TENSORS = {
    "GPTQ or AWQ": {f"{PROJECTION}.qweight": ("I32", (2, 16))},
    "FP8": {f"{PROJECTION}.weight": ("F8_E4M3", (16, 16))},
    "bitsandbytes (4 bits)": {
        f"{PROJECTION}.weight": ("U8", (128, 1)),
        f"{PROJECTION}.weight.absmax": ("U8", (4,)),
    },
    "bitsandbytes (8 bits)": {f"{PROJECTION}.weight": ("I8", (16, 16)), f"{PROJECTION}.SCB": ("F32", (16,))},
    "compressed-tensors": {f"{PROJECTION}.weight_packed": ("I32", (16, 2))},
    "MXFP4": {"model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (1, 16, 1, 16))},
    "quanto": {f"{PROJECTION}.weight._data": ("I8", (16, 16))},
    "HQQ": {f"{PROJECTION}.W_q": ("U8", (8, 16))},
    "AQLM": {f"{PROJECTION}.codes": ("I8", (16, 2, 1))},
    "a method that no file names": {f"{PROJECTION}.weight": ("I8", (16, 16))},
}
DTYPES = {
    "I32": np.int32,
    "F8_E4M3": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "F32": np.float32,
    "BOOL": np.bool_,
}


class Stored:
    """A tensor of zeros by its safetensors dtype, of which numpy lacks some."""

    def __init__(self, dtype, shape):
        self.dtype, self.shape = dtype, shape

    def write_to(self, file):
        data = np.zeros(self.shape, DTYPES.get(self.dtype, np.uint8)).tobytes()
        yield file.write(data)


def make(path, config=None, **tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | (config or {})), "utf-8")
    stored = {"model.embed_tokens.weight": Stored("F32", (7, 4))} | tensors
    exhaust(write_tensors(path / "model.safetensors", stored))
    return ModelSource("a-model", None, path)


@pytest.mark.parametrize("method", CONFIGS)
def test_by_the_config(tmp_path, method):
    with pytest.raises(UnsupportedModelError) as error:
        check_floats(make(tmp_path / "m", CONFIGS[method]))
    assert f"a-model is quantised by {method} (" in str(error.value)
    assert "in config.json" in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_by_a_quantisers_own_file(tmp_path, name):
    source = make(tmp_path / "m")
    check_floats(source)
    (source.path / name).write_text("{}", "utf-8")
    with pytest.raises(UnsupportedModelError, match=rf"quantised by {FILES[name]} \({name}\)"):
        check_floats(source)


@pytest.mark.parametrize("method", TENSORS)
def test_by_the_tensors_alone(tmp_path, method):
    tensors = {name: Stored(*facts) for name, facts in TENSORS[method].items()}
    with pytest.raises(UnsupportedModelError) as error:
        check_floats(make(tmp_path / "m", **tensors))
    assert f"quantised by {method} ({PROJECTION[:5]}" in str(error.value)


def test_a_number_format_that_is_not_read_is_no_damaged_file(tmp_path):
    source = make(tmp_path / "m", **{"model.experts.scale": Stored("U8", (4, 4))})
    data = (source.path / "model.safetensors").read_bytes()
    (source.path / "model.safetensors").write_bytes(data.replace(b'"U8"', b'"F4"'))
    with pytest.raises(UnsupportedModelError, match="is stored as F4, a number format of quantised weights"):
        check_floats(source)


def test_what_is_not_quantised_passes(tmp_path):
    buffers = {
        "transformer.h.0.attn.bias": Stored("BOOL", (1, 1, 8, 8)),  # GPT-2's causal mask
        "embeddings.position_ids": Stored("I64", (1, 8)),
        "relative_position_index": Stored("I32", (8, 8)),
        "layer.quantizer.scales": Stored("F32", (4, 4)),
    }
    config = {"quantization_config": None, "codec_config": {"quantization": {"levels": 8}}}
    DTYPES["I64"] = np.int64
    check_floats(make(tmp_path / "m", config, **buffers))
