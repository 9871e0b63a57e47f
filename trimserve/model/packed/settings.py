"""What a quantised checkpoint's config says of its blocks; what is not read is refused by its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trimserve.errors import UnsupportedModelError
from trimserve.model.packed.layouts import Layout

# What quantisers write beside config.json: AutoGPTQ and AutoAWQ of before they had a section there.
PACKED_CONFIGS: Final = ("quantize_config.json", "quant_config.json")
_BITS: Final = {"awq": (4,), "gptq": (2, 4, 8), "compressed-tensors": (4, 8)}
_TITLES: Final = {"awq": "AWQ", "gptq": "GPTQ", "compressed-tensors": "compressed-tensors"}
_USUAL_GROUP: Final = 128  # the default of both, and of transformers' configs
_STRATEGIES: Final = ("group", "channel")
_ADVICE: Final = (
    "pass the model that it was made from, with --quantize int4 or int8 if small weights are wanted."
)


@dataclass(frozen=True, slots=True)
class PackedSettings:
    """How the linear layers of a checkpoint are stored.

    Attributes:
        layout: whose.
        bits: of an integer.
        group_size: inputs that share a scale; None for all of a row.
        less_one: see `PackedLinear`.
    """

    layout: Layout
    bits: int
    group_size: int | None
    less_one: bool = False


def packed_settings(section: Mapping[str, Any], name: str) -> PackedSettings | None:
    """Read a quantisation section of config.json, or a quantiser's own file.

    Args:
        section: its content.
        name: the model's, for messages.

    Returns:
        None for a method that is none of the three.

    Raises:
        UnsupportedModelError: one of the three with a setting that is not read.
    """
    method = section.get("quant_method")
    if method is None:
        method = "awq" if "w_bit" in section else "gptq" if "desc_act" in section else None
        method = "compressed-tensors" if "config_groups" in section else method
    if method == "awq":
        return _awq(section, name)
    if method == "gptq":
        return _gptq(section, name)
    return _compressed(section, name) if method == "compressed-tensors" else None


def _awq(section: Mapping[str, Any], name: str) -> PackedSettings:
    version = str(section.get("version", "gemm")).lower()
    if version != "gemm":
        raise refused(name, "awq", f"version {version!r} (gemm is read)")
    if not section.get("zero_point", True):
        raise refused(name, "awq", "zero_point false")
    return _settings(section, name, "awq", less_one=False)


def _gptq(section: Mapping[str, Any], name: str) -> PackedSettings:
    form = section.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise refused(name, "gptq", f"checkpoint_format {form!r} (gptq and gptq_v2 are read)")
    return _settings(section, name, "gptq", less_one=form == "gptq")


def _settings(section: Mapping[str, Any], name: str, layout: Layout, *, less_one: bool) -> PackedSettings:
    bits = section.get("bits", section.get("w_bit"))
    group = section.get("group_size", section.get("q_group_size", _USUAL_GROUP))
    return PackedSettings(layout, _bits(bits, name, layout), _group(group, name, layout), less_one)


def _compressed(section: Mapping[str, Any], name: str) -> PackedSettings:
    layout: Layout = "compressed-tensors"
    form = section.get("format")
    if form != "pack-quantized":
        raise refused(name, layout, f"format {form!r} (pack-quantized is read)")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise refused(name, layout, "config_groups of several kinds")
    (group,) = groups.values()
    group = group if isinstance(group, dict) else {}
    if group.get("input_activations") or group.get("output_activations") or section.get("kv_cache_scheme"):
        raise refused(name, layout, "quantised activations")
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    if weights.get("type") != "int" or weights.get("strategy") not in _STRATEGIES:
        what = f"weights of type {weights.get('type')!r}, strategy {weights.get('strategy')!r}"
        raise refused(name, layout, f"{what} (int in groups or channels is read)")
    bits = _bits(weights.get("num_bits"), name, layout)
    size = None if weights["strategy"] == "channel" else _group(weights.get("group_size"), name, layout)
    return PackedSettings(layout, bits, size)


def _bits(bits: Any, name: str, layout: Layout) -> int:  # noqa: ANN401 - whatever a config has
    if bits not in _BITS[layout] or isinstance(bits, bool):
        known = " or ".join(map(str, _BITS[layout]))
        raise refused(name, layout, f"{bits!r} bits ({known} are read)")
    return int(bits)


def _group(size: Any, name: str, layout: Layout) -> int | None:  # noqa: ANN401 - whatever a config has
    if size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % 16:
        raise refused(name, layout, f"groups of {size!r} (multiples of 16 are read)")
    return size


def refused(name: str, layout: Layout, what: str) -> UnsupportedModelError:
    """The error for what is not read of a known layout."""
    return UnsupportedModelError(
        f"{name} is quantised by {_TITLES[layout]} with {what}, which trimserve does not read: {_ADVICE}"
    )
