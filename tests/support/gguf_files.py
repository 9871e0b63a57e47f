"""GGUF files written by hand, byte for byte, so that a test can say what is wrong in them."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trimserve.files.ggml_blocks import GGML_TYPES

CODES = {kind.name: code for code, kind in GGML_TYPES.items()}


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(content):
    """A typed value: what Python has, floats as float32, ints as uint32."""
    if isinstance(content, bool):
        return struct.pack("<IB", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str | bytes):
        return struct.pack("<I", 8) + string(content)
    if isinstance(content, np.ndarray):
        code = {"i": 5, "f": 6, "b": 7}[content.dtype.kind]
        data = content.astype({5: "<i4", 6: "<f4", 7: "u1"}[code]).tobytes()
        return struct.pack("<IIQ", 9, code, len(content)) + data
    return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(string, content))


@dataclass
class Tensor:
    """A tensor as the header describes it; sizes are ggml's, the innermost first."""

    name: str
    kind: str
    sizes: tuple[int, ...]
    data: bytes
    offset: int | None = None
    code: int | None = None


@dataclass
class Written:
    """What to write; every count can be told wrong."""

    metadata: list[tuple[str, object]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    key_count: int | None = None
    raw: dict[str, bytes] = field(default_factory=dict)  # key -> type and value as they are

    def to_bytes(self):
        keys = [string(key) + value(content) for key, content in self.metadata]
        keys += [string(key) + content for key, content in self.raw.items()]
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(keys) if self.key_count is None else self.key_count,
        )
        header = b"GGUF" + struct.pack("<IQQ", self.version, *counts) + b"".join(keys)
        body = b""
        for tensor in self.tensors:
            offset = len(body) if tensor.offset is None else tensor.offset
            code = CODES[tensor.kind] if tensor.code is None else tensor.code
            sizes = struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes)
            header += string(tensor.name) + sizes + struct.pack("<IQ", code, offset)
            body += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return header + bytes(-len(header) % self.alignment) + body

    def write(self, path: Path):
        path.write_bytes(self.to_bytes())
        return path


def random_tensor(name, kind, shape, seed=0):
    """A tensor of random blocks whose scales are small finite numbers."""
    code = CODES[kind]
    rng = np.random.default_rng(seed)
    if kind == "F32":
        data = rng.standard_normal(shape).astype("<f4").tobytes()
    else:
        kind_of = GGML_TYPES[code]
        count = int(np.prod(shape)) // kind_of.numbers
        data = rng.integers(0, 48, (count, kind_of.nbytes), dtype=np.uint8).tobytes()
    return Tensor(name, kind, tuple(reversed(shape)), data)


# Where the float16 scales of a block lie, and of what size they are drawn: all numbers are below 1.
_SCALES = {
    "Q4_0": ((0, 0.03),),
    "Q4_1": ((0, 0.03), (2, -0.25)),
    "Q5_0": ((0, 0.015),),
    "Q5_1": ((0, 0.015), (2, -0.25)),
    "Q8_0": ((0, 0.002),),
    "Q2_K": ((80, 0.006), (82, 0.01)),
    "Q3_K": ((108, 0.002),),
    "Q4_K": ((0, 0.0005), (2, 0.004)),
    "Q5_K": ((0, 0.00025), (2, 0.004)),
    "Q6_K": ((208, 0.0001),),
}


def random_blocks(kind, shape, seed=0):
    """A matrix of random blocks, uint8 (n, bytes of a row): any integers, scales as real files have them."""
    known = GGML_TYPES[CODES[kind]]
    rng = np.random.default_rng(seed)
    count = shape[0] * shape[1] // known.numbers
    blocks = rng.integers(0, 256, (count, known.nbytes), np.uint8)
    for first, size in _SCALES[kind]:
        scales = (rng.uniform(0.5, 1, count) * size).astype("<f2")
        blocks[:, first : first + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)
