"""Tell whether a checkpoint is quantised, and by what: by its configs, then by the tensors themselves.

A quantised checkpoint has no floating-point rows to cut or to feed, so it is refused by the name of its
method. The rule does not list what transformers supports: any `quantization_config` counts, whoever wrote it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from trimserve.errors import UnsupportedModelError
from trimserve.model.source import CONFIG_NAME, ModelSource

# Sections of config.json that say how the weights are stored. MLX calls its own `quantization`.
_SECTIONS: Final = ("quantization_config", "compression_config", "quantization")
# Files that quantisers write beside config.json, and who does.
_FILES: Final = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
_TITLES: Final = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "modelopt": "ModelOpt",
    "bitnet": "BitNet",
    "vptq": "VPTQ",
    "spqr": "SpQR",
}
# Endings of names that only quantised tensors have, and who writes them; the more telling ones first.
_ENDINGS: Final = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\.[\w.]+)$"), "bitsandbytes (4 bits)"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes (8 bits)"),
    (re.compile(r"\.(weight_packed|weight_shape|weight_zero_point|weight_g_idx)$"), "compressed-tensors"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 in blocks"),
    (re.compile(r"\.weight_scale(_2)?$"), "compressed-tensors, FP8 or ModelOpt"),
    (re.compile(r"_(blocks|scales)$"), "MXFP4"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
    (re.compile(r"\.(W_q|weight_quantizer[\w.]*)$"), "HQQ"),
    (re.compile(r"\.(codebooks|codes)$"), "AQLM"),
    (re.compile(r"\.weight[_.:](qdata|int_data|tensor_impl[\w.:]*)$"), "torchao"),
)
# Those that no floating-point model has, whatever their dtype.
_TELLING: Final = _ENDINGS[:5]
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
# Buffers that checkpoints of floating-point models hold in integers: causal masks, positions.
_WEIGHT: Final = re.compile(r"(weight|_proj|kernel|experts)$")


def check_floats(source: ModelSource) -> None:
    """Refuse a checkpoint whose weights are not floating-point numbers.

    Reads configs and the headers of the weights alone.

    Raises:
        UnsupportedModelError: the message names the method, where it is said, and what to do.
    """
    found = _by_config(source.config) or _by_files(source) or _by_tensors(source)
    if found is None:
        return
    method, where = found
    raise UnsupportedModelError(
        f"{source.name} is quantised by {method} ({where}), and trimserve cuts floating-point rows: pass the "
        "model that it was made from, with --quantize int4 or int8 if small weights are wanted, or save a "
        "dequantised copy with transformers (model.dequantize(), then save_pretrained)."
    )


def _by_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    for path, section in _sections(config, ""):
        return _method(section), f"{path} in {CONFIG_NAME}"
    return None


def _sections(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Sections that say how weights are stored, also those of nested configs."""
    for key, value in config.items():
        if not isinstance(value, dict) or not value:
            continue
        # Another kind of model may call its codec's settings so.
        if key in _SECTIONS and (key != "quantization" or "bits" in value):
            yield f"{prefix}{key}", value
        else:
            yield from _sections(value, f"{prefix}{key}.")


def _method(section: Mapping[str, Any]) -> str:
    """The method's name; configs of before `quant_method` tell it by their keys."""
    name = section.get("quant_method") or section.get("quant_algo") or section.get("quant_type")
    if isinstance(name, str):
        title = _TITLES.get(name.lower(), name)
        bits = section.get("bits") or section.get("w_bit") or ("4" if section.get("load_in_4bit") else None)
        bits = bits or ("8" if section.get("load_in_8bit") else None)
        return f"{title} ({bits} bits)" if isinstance(bits, int | str) else title
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return f"bitsandbytes ({4 if section.get('load_in_4bit') else 8} bits)"
    if "config_groups" in section:
        return "compressed-tensors"
    if "w_bit" in section:
        return "AWQ"
    if "desc_act" in section:
        return "GPTQ"
    return f"{section['bits']}-bit groups" if "bits" in section else "a method that it does not name"


def _by_files(source: ModelSource) -> tuple[str, str] | None:
    for name, method in _FILES.items():
        if (source.path / name).is_file():
            return method, name
    return None


def _by_tensors(source: ModelSource) -> tuple[str, str] | None:
    specs = source.tensors.values()
    # By dtype first: names alone, such as `_scales`, may be those of learnt parameters.
    unusual = [spec for spec in specs if spec.dtype not in _FLOATS and len(spec.shape) > 1]
    eighths = [spec for spec in unusual if spec.dtype.startswith("F8")]
    named = [(spec, method) for pattern, method in _ENDINGS for spec in unusual if pattern.search(spec.name)]
    telling = [(spec, method) for pattern, method in _TELLING for spec in specs if pattern.search(spec.name)]
    unnamed = [(spec, "a method that no file names") for spec in unusual if _WEIGHT.search(spec.name)]
    found = next(iter([*((spec, "FP8") for spec in eighths), *named, *telling, *unnamed]), None)
    return None if found is None else (found[1], f"{found[0].name} holds {found[0].dtype}")
