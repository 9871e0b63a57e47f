"""A checkpoint of AWQ, GPTQ or compressed-tensors: its linear layers in blocks, and written as float32."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from trimserve.errors import MismatchError
from trimserve.files.tensors import (
    CHUNK_BYTES,
    TensorSource,
    TensorSpec,
    WholeTensor,
    exhaust,
    map_tensor,
    to_float32,
    write_tensors,
)
from trimserve.model.packed.layouts import WORD, PackedLinear
from trimserve.model.packed.settings import PackedSettings, refused

_INTEGERS: Final = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}
_SCALES: Final = {"awq": "scales", "gptq": "scales", "compressed-tensors": "weight_scale"}
_ZEROS: Final = {"awq": "qzeros", "gptq": "qzeros", "compressed-tensors": "weight_zero_point"}
# What else a linear layer may have: places of its inputs, and sizes.
_REORDER: Final = {"gptq": "g_idx", "compressed-tensors": "weight_g_idx"}
_SIZES: Final = "weight_shape"
_FLOATS: Final = frozenset({"F16", "BF16", "F32"})
_AGAIN: Final = "fetch or make it again."


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A checkpoint whose linear layers are stored as integers in blocks.

    Attributes:
        linears: by the names that their matrices have in the model, e.g. ``...q_proj.weight``.
        others: all other tensors, by name.
        bits: of an integer.
    """

    linears: Mapping[str, PackedLinear]
    others: Mapping[str, TensorSpec]
    bits: int

    def write_weights(self, path: Path) -> None:
        """Write all weights as float32 into a safetensors file, a bounded slice at a time."""
        tensors: dict[str, TensorSource] = {
            name: _Floats(spec) if spec.dtype in _FLOATS else WholeTensor(spec)
            for name, spec in self.others.items()
        }
        tensors |= {name: _Dequantized(linear) for name, linear in self.linears.items()}
        exhaust(write_tensors(path, tensors, {"format": "pt"}))


@dataclass(frozen=True, slots=True)
class _Floats:
    spec: TensorSpec
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        stored = map_tensor(self.spec).reshape(-1)
        for start in range(0, stored.size, CHUNK_BYTES // 4):
            part = np.asarray(stored[start : start + CHUNK_BYTES // 4])
            yield _write(to_float32(part, self.spec.dtype), file)


@dataclass(frozen=True, slots=True)
class _Dequantized:
    linear: PackedLinear
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.linear.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        count, width = self.shape
        step = max(1, CHUNK_BYTES // (4 * width))
        for start in range(0, count, step):
            yield _write(self.linear.unpack(slice(start, start + step)).floats(), file)


def _write(floats: np.ndarray, file: IO[bytes]) -> int:
    data = np.ascontiguousarray(floats).reshape(-1).view(np.uint8).data
    size = len(data)
    while data:
        data = data[file.write(data) :]
    return size


def packed_checkpoint(
    tensors: Mapping[str, TensorSpec], settings: PackedSettings, name: str
) -> PackedCheckpoint:
    """Tell the linear layers of a checkpoint from its other tensors; no integer is read but the places.

    Args:
        tensors: all tensors by name.
        settings: what the config says of them.
        name: the model's, for messages.

    Raises:
        MismatchError: a part of a layer is missing or of another shape or dtype than it should have.
        UnsupportedModelError: inputs in another order, or zero points that libraries read differently.
    """
    layout = settings.layout
    ending = f".{_INTEGERS[layout]}"
    linears = {}
    used = set()
    for key, spec in tensors.items():
        if not key.endswith(ending):
            continue
        module = key.removesuffix(ending)
        parts = {
            part: found
            for part in (_SCALES[layout], _ZEROS[layout], _REORDER.get(layout, ""), _SIZES)
            if part and (found := tensors.get(f"{module}.{part}")) is not None
        }
        used |= {key, *(f"{module}.{part}" for part in parts)}
        linears[f"{module}.weight"] = _linear(module, spec, parts, settings, name)
    if not linears:
        raise MismatchError(f"{name} has no {ending[1:]}, which its quantisation config asks for: {_AGAIN}")
    others = {key: spec for key, spec in tensors.items() if key not in used}
    return PackedCheckpoint(linears, others, settings.bits)


def _linear(
    module: str, integers: TensorSpec, parts: Mapping[str, TensorSpec], settings: PackedSettings, name: str
) -> PackedLinear:
    layout, bits = settings.layout, settings.bits
    scales, zeros = parts.get(_SCALES[layout]), parts.get(_ZEROS[layout])
    if scales is None or (zeros is None and layout != "compressed-tensors"):
        missing = _SCALES[layout] if scales is None else _ZEROS[layout]
        raise MismatchError(f"{name} lacks {module}.{missing}: {_AGAIN}")
    shape = _shape(module, integers, parts, settings, name)
    made = PackedLinear(layout, bits, shape, integers, scales, zeros, settings.less_one)
    _check_shapes(module, made, settings, name)
    _check_order(module, parts.get(_REORDER.get(layout, "")), made, name)
    if made.less_one and _has_wrapped(made):
        raise refused(
            name, layout, f"zero points in {module} that lie beyond the integers, which libraries read as two"
        )
    return made


def _shape(
    module: str, integers: TensorSpec, parts: Mapping[str, TensorSpec], settings: PackedSettings, name: str
) -> tuple[int, int]:
    if integers.dtype != "I32" or len(integers.shape) != 2:
        raise MismatchError(
            f"{name}: {integers.name} is {integers.dtype} {integers.shape}, no matrix of I32."
        )
    first, second = integers.shape
    per = WORD // settings.bits
    if settings.layout == "awq":
        return second * per, first
    if settings.layout == "gptq":
        return second, first * per
    if _SIZES not in parts:
        return first, second * per
    sizes = map_tensor(parts[_SIZES]).reshape(-1).tolist()
    if len(sizes) != 2 or sizes[0] != first or -(-sizes[1] // per) != second:
        raise MismatchError(f"{name}: {module}.{_SIZES} says {sizes}, its integers {first} x {second * per}.")
    return first, sizes[1]


def _check_shapes(module: str, made: PackedLinear, settings: PackedSettings, name: str) -> None:
    outputs, inputs = made.shape
    group = settings.group_size or inputs
    if inputs % group or group % 16:
        raise refused(name, made.layout, f"{inputs:,} inputs of {module} in groups of {group:,}")
    groups, per = inputs // group, WORD // made.bits
    words = -(-outputs // per)
    by_row = made.layout == "compressed-tensors"
    expected: dict[TensorSpec, tuple[int, int]] = {
        made.scales: (outputs, groups) if by_row else (groups, outputs)
    }
    if made.zeros is not None:
        expected[made.zeros] = (words, groups) if by_row else (groups, words)
    for spec, shape in expected.items():
        known = ("I32",) if spec is made.zeros else tuple(_FLOATS)
        if spec.shape != shape or spec.dtype not in known:
            raise MismatchError(
                f"{name}: {spec.name} should be {shape[0]:,} x {shape[1]:,} of {' or '.join(sorted(known))} "
                f"but is {' x '.join(map(str, spec.shape))} of {spec.dtype}: {_AGAIN}"
            )


def _check_order(module: str, places: TensorSpec | None, made: PackedLinear, name: str) -> None:
    """Refuse inputs whose groups are not runs: desc_act, actorder."""
    if places is None:
        return
    found = map_tensor(places).reshape(-1)
    inputs = made.shape[1]
    # compressed-tensors writes -1 where nothing is in another order.
    plain: Any = found == np.arange(len(found)) // (inputs // made.groups)
    if len(found) != inputs or not (plain.all() or (found == -1).all()):
        raise refused(name, made.layout, f"inputs in another order (desc_act or actorder: {module}.g_idx)")


def _has_wrapped(made: PackedLinear) -> bool:
    """Whether a zero point is stored as the largest integer: 2 ** bits, or 0 that was wrapped."""
    wrapped = np.uint8((1 << made.bits) & 255)
    return bool((made.zero_points() == wrapped).any())
