"""Checks of a GGUF file: its numbers, token ids and settings, as our own reader finds them in it."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.files.ggml_blocks import Floats, dequantize_blocks
from trimserve.files.gguf_writing import row_slices
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.model.gguf.checkpoint import DequantizedTensor
from trimserve.model.gguf.model import open_gguf
from trimserve.model.source import ModelSource
from trimserve.text.tokenizer import load_tokenizer
from trimserve_export.to_gguf.formats import CheckpointNumbers, round_blocks
from trimserve_export.to_gguf.model import GGUF_NAME
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check

# Reads some rows of a tensor, float32 (n, width).
_Read: TypeAlias = Callable[[Any], Floats]
_UNCOMPARED: Final = "what llama.cpp computes with them is not compared"
# A norm that is stored with 1 added has lost its lowest bits.
_SHIFT_LOSS: Final = 2.0**-22


def check_gguf_weights(context: Context) -> Check:
    """Compare every number of the file with the source's, rounded to the format that it is stored in."""
    made = open_gguf(context.folder.file(GGUF_NAME))
    wanted, rounds = _stored(context), "gguf" in context.folder.manifest.exporter
    if others := made.tensors.keys() ^ wanted.keys():
        return Check("kept-rows", False, None, f"{min(others)} is in one of the file and its source alone")
    for name, tensor in made.tensors.items():
        kept = context.folder.vocab.kept_ids if name in context.stored.cut else None
        worst = _worst(tensor, wanted[name], kept, rounds=rounds)
        if not worst <= (_SHIFT_LOSS if tensor.shift else 0):
            return Check("kept-rows", False, worst, f"{name} has other numbers than {context.source.name}")
    detail = f"{len(made.tensors):,} tensors have the numbers of the source in their formats; {_UNCOMPARED}"
    return Check("kept-rows", True, 0.0, detail)


def check_gguf_tokenizer(context: Context) -> Check:
    """Compare the token ids that the file's metadata stands for with those of the cut tokenizer beside it."""
    made = open_gguf(context.folder.file(GGUF_NAME))
    read = ModelSource(GGUF_NAME, None, made.folder, gguf=made).tokenizer()
    cut = load_tokenizer(context.folder.file(TOKENIZER_NAME))
    if read.get_vocab(with_added_tokens=True) != cut.get_vocab(with_added_tokens=True):
        return Check("gguf-tokenizer", False, None, "the file's tokens are not those of tokenizer.json")
    same = sum(_ids(read, text) == _ids(cut, text) for text in context.texts)
    # Rare characters part otherwise in llama.cpp, and nothing is normalised.
    ok = all(_ids(read, text) == _ids(cut, text) for text in context.texts if text.isascii())
    detail = f"{same} of {len(context.texts)} texts have tokenizer.json's ids, every one in ASCII among them"
    return Check(
        "gguf-tokenizer", ok, None, detail if ok else "texts in ASCII have other ids than tokenizer.json's"
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def _stored(context: Context) -> dict[str, _Read]:
    """What reads some rows of each tensor of the source, by transformers' names."""
    source = context.source
    if source.gguf is not None and source.has_quantized_rows:
        return {name: tensor.numbers for name, tensor in source.gguf.tensors.items()}
    # A head that a tied model stores a second time is not written.
    second = context.stored.cut.keys() - set(context.stored.roles.values()) if context.stored.tied else ()
    return {
        name: CheckpointNumbers(spec).read
        for name, spec in source.tensors.items()
        if name not in second and not name.endswith("rotary_emb.inv_freq")
    }


def _worst(tensor: DequantizedTensor, read: _Read, kept: Ids | None, *, rounds: bool) -> float:
    """The largest difference of a tensor's numbers from those that it should have; NaN where one is none."""
    *rows, width = tensor.shape
    worst = 0.0
    for part in row_slices(rows[0] if rows else 1, 4 * width):
        expected = read(part if kept is None else kept[part])
        if rounds:
            kind = tensor.stored.kind
            packed = round_blocks(expected, kind).reshape(-1, kind.nbytes)
            expected = dequantize_blocks(packed, kind).reshape(expected.shape)
        found = tensor.numbers(part)
        if not np.array_equal(found, expected, equal_nan=True):
            worst = max(worst, float(np.abs(found - expected).max()))
    return worst
