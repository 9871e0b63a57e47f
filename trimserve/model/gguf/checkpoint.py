"""A GGUF file's tensors by the names of transformers: where they lie, and dequantised into safetensors."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.ggml_blocks import check_readable
from trimserve.files.gguf import GgufFile, GgufTensor
from trimserve.files.tensors import CHUNK_BYTES, TensorSource, exhaust, write_tensors
from trimserve.model.gguf.architectures import EMBEDDING, HEAD, ROPE_TENSORS, Architecture

_HEADS: Final = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_BIASED: Final = {"attn": "attention_bias", "ffn": "mlp_bias"}
_PART: Final = re.compile(r"(?:blk\.\d+\.)?([a-z_]+)\.(?:weight|bias)")


@dataclass(frozen=True, slots=True)
class DequantizedTensor:
    """A tensor as transformers has it: float32, its rows in transformers' order.

    Attributes:
        stored: the tensor in the file.
        order: which stored row stands at each place; None where all do as they are.
        shift: added to every number.
    """

    stored: GgufTensor
    order: npt.NDArray[np.int64] | None = None
    shift: float = 0.0

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, row-major."""
        return self.stored.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the numbers to an unbuffered file, a bounded slice of rows at a time; yield their bytes."""
        width = self.shape[-1]
        count = self.stored.rows
        step = max(1, CHUNK_BYTES // (4 * width))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            data = np.ascontiguousarray(self.numbers(rows)).reshape(-1).view(np.uint8).data
            while data:
                data = data[file.write(data) :]
            yield 4 * width * (rows.stop - rows.start)

    def numbers(self, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Some rows' numbers, float32 (n, width); all of them by default."""
        if self.order is None:
            found = self.stored.floats(rows)
        elif len(self.shape) == 1:  # a bias, whose rows are single numbers
            found = self.stored.floats()[:, self.order]
        else:
            found = self.stored.floats(self.order[rows])
        return found + np.float32(self.shift) if self.shift else found


def named_tensors(
    file: GgufFile, architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, DequantizedTensor]:
    """The tensors of a file by transformers' names, in file order.

    Raises:
        MismatchError: one is missing or of another shape than the metadata says.
        UnsupportedModelError: one is not known, or of a number format that is not read.
    """
    biases = tuple(part for part in ("attn", "ffn") if architecture.may_have_biases and config[_BIASED[part]])
    layers = config["num_hidden_layers"]
    if layers > len(file.tensors):  # before a table of that length is made
        raise MismatchError(f"{file.path} has {len(file.tensors):,} tensors for {layers:,} layers.")
    names = architecture.stored_names(layers, head=HEAD in file.tensors, biases=biases)
    if missing := [name for name in names if name not in file.tensors]:
        raise MismatchError(
            f"{file.path} lacks {missing[0]} ({len(missing):,} of {len(names):,} tensors): make it again."
        )
    if others := [name for name in file.tensors if name not in names and name not in ROPE_TENSORS]:
        raise UnsupportedModelError(
            f"{file.path} has {others[0][:60]!r}, which {architecture.model_class} has not: pass the model "
            "that the file was made from."
        )
    sizes = _shapes(config)
    found = {}
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue
        check_readable(tensor.kind, f"{file.path}: {name}")
        part = _part(name)
        expected = sizes[part][:1] if name.endswith(".bias") else sizes[part]
        if tensor.shape != expected:
            raise MismatchError(
                f"{file.path}: {name} should be {' x '.join(map(str, expected))} by the metadata but is "
                f"{' x '.join(map(str, tensor.shape))}: make the file again."
            )
        order, shift = as_in_transformers(name, tensor.shape[0], architecture, config)
        found[names[name]] = DequantizedTensor(tensor, order, shift)
    return found


def _part(name: str) -> str:
    match = _PART.fullmatch(name)
    return match[1] if match else name


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each part's weight."""
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    packed = config["model_type"] == "phi3"  # gate and up in one
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm")
    vocab = (config["vocab_size"], hidden)
    return {
        **dict.fromkeys(norms, (hidden,)),
        **dict.fromkeys((_part(EMBEDDING), _part(HEAD)), vocab),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (width,)),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (2 * inner if packed else inner, hidden),
        "ffn_down": (hidden, inner),
    }


def as_in_transformers(
    name: str, rows: int, architecture: Architecture, config: Mapping[str, Any]
) -> tuple[npt.NDArray[np.int64] | None, float]:
    """How a stored tensor differs from the one that transformers has.

    Args:
        name: llama.cpp's.
        rows: of the tensor.
        architecture: of the model.
        config: its config.json.

    Returns:
        Which stored row stands at each place (None where all do as they are), and what is added to numbers.
    """
    part = _part(name)
    if architecture.shifted_norms and part.endswith("norm"):
        return None, -1.0
    if architecture.interleaved and part in _HEADS:
        return _halves_of_heads(rows, config[_HEADS[part]]), 0.0
    return None, 0.0


def _halves_of_heads(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Stored rows in the order of transformers: the first of each pair that is turned, then the second."""
    pairs = np.arange(rows, dtype=np.int64).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def write_checkpoint(tensors: Mapping[str, DequantizedTensor], path: Path) -> None:
    """Dequantise tensors into a safetensors file, a bounded slice at a time."""
    sources: dict[str, TensorSource] = dict(tensors)
    exhaust(write_tensors(path, sources, {"format": "pt"}))
