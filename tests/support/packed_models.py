"""Checkpoints in the formats of AWQ, GPTQ and compressed-tensors, and what they stand for, by torch.

Packed as the libraries' documentation says it, one integer at a time; numbers are drawn, not fitted.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output has which place of an int32
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": True},
    "compressed": {"symmetric": True, "num_bits": 4, "strategy": "group", "group_size": 32},
    "compressed-zeros": {"symmetric": False, "num_bits": 4, "strategy": "group", "group_size": 16},
    "compressed-channel": {"symmetric": True, "num_bits": 8, "strategy": "channel", "group_size": None},
}


def config_of(kind: str) -> dict:
    """The section `quantization_config`."""
    if not kind.startswith("compressed"):
        return CONFIGS[kind]
    weights = {"type": "int", "dynamic": False, "actorder": None} | CONFIGS[kind]
    group = {"weights": weights, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def pack(integers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Put integers (n, m) into int32 along the last axis, the first one lowest, or in an order of places."""
    per = 32 // bits
    padded = torch.nn.functional.pad(integers, (0, -integers.shape[1] % per))
    words = torch.zeros(len(padded), padded.shape[1] // per, dtype=torch.int64)
    for place in range(per):
        words |= padded[:, (order[place] if order else place) :: per] << (bits * place)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def quantize_folder(folder: Path, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Put drawn integers in the place of a saved decoder's linear layers but the head.

    Returns:
        The float32 matrices that they stand for, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    truth = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        parts, truth[name] = _linear(kind, outputs, inputs, generator)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"quantization_config": config_of(kind), "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return truth


def _linear(
    kind: str, outputs: int, inputs: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    settings = CONFIGS[kind]
    bits = settings.get("bits", settings.get("num_bits"))
    size = settings["group_size"] if (settings["group_size"] or -1) > 0 else inputs
    groups, most = inputs // size, 1 << bits
    integers = torch.randint(0, most, (outputs, inputs), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) + 0.5) * (0.6 / most)
    dtype = torch.bfloat16 if kind.startswith("compressed") else torch.float16
    scales = scales.to(dtype)
    zeros = torch.randint(1, most, (outputs, groups), generator=generator)
    if settings.get("sym") or settings.get("symmetric"):
        zeros = torch.full_like(zeros, most // 2)
    apart = integers - zeros.repeat_interleave(size, dim=1)
    truth = apart.float() * scales.float().repeat_interleave(size, dim=1)
    if kind == "awq":
        words = {"qweight": pack(integers.T, 4, AWQ_ORDER), "qzeros": pack(zeros.T, 4, AWQ_ORDER)}
        return words | {"scales": scales.T}, truth
    if kind.startswith("gptq"):
        stored = zeros.T if kind == "gptq-v2" else zeros.T - 1
        places = torch.arange(inputs, dtype=torch.int32) // size
        words = {"qweight": pack(integers, bits).T, "qzeros": pack(stored, bits)}
        return words | {"scales": scales.T, "g_idx": places}, truth
    words = {"weight_packed": pack(integers, bits), "weight_scale": scales}
    if not settings["symmetric"]:
        words["weight_zero_point"] = pack(zeros.T, bits).T
    return words | {"weight_shape": torch.tensor([outputs, inputs])}, truth


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace tensors whose names end so, or take them out."""
    stored = load_file(folder / "model.safetensors")
    for ending, array in tensors.items():
        for name in [name for name in stored if name.endswith(f".{ending}")]:
            del stored[name]
            if array is not None:
                stored[name] = torch.from_numpy(array.copy())
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
