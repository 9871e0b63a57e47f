"""Write a trimmed GGUF file: of a trimmed checkpoint, or of another GGUF file whose rows are cut."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from trimserve.arrays import Ids
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.gguf_writing import GgmlSource, StoredRows, encode_value, write_gguf
from trimserve.files.tensors import TensorSpec, exhaust
from trimserve.model.gguf.architectures import EMBEDDING, HEAD, Architecture
from trimserve.model.gguf.checkpoint import as_in_transformers
from trimserve.model.gguf.model import GgufModel, open_gguf
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.to_gguf.formats import (
    FILE_TYPES,
    ArrayNumbers,
    CheckpointNumbers,
    DequantizedNumbers,
    Formats,
    Numbers,
    RoundedTensor,
)
from trimserve_export.to_gguf.settings import architecture_for, check_settings, rope_tensors, settings_of
from trimserve_export.to_gguf.vocab import CutVocab, cut_metadata

GGUF_NAME: Final = "model.gguf"
_FILE_TYPE: Final = "general.file_type"
_QUANTIZATION_VERSION: Final = 2
_BIASES: Final = {"attn": "attention_bias", "ffn": "mlp_bias"}
Json = dict[str, Any]


def write_from_checkpoint(checkpoint: ModelSource, cut: CutVocab, formats: Formats, path: Path) -> None:
    """Write a trimmed checkpoint as a GGUF file, a bounded slice of a tensor at a time.

    Args:
        checkpoint: a folder with the trimmed weights and the compact configs.
        cut: the cut tokenizer.
        formats: of its numbers.
        path: the file.

    Raises:
        UnsupportedModelError: llama.cpp does not have this model, or not all of its settings or token ids.
    """
    origin = cut.source.name
    config = load_config(checkpoint.path).get_text_config()
    name, architecture = architecture_for(config, origin)
    title = Path(origin).name if Path(origin).exists() else origin
    general = {
        "architecture": name,
        "type": "model",
        "name": title,
        "file_type": FILE_TYPES[formats.body.name],
        "quantization_version": _QUANTIZATION_VERSION,
    }
    facts: Json = {f"general.{key}": value for key, value in general.items()}
    facts |= settings_of(config, name) | cut.metadata()
    metadata = {key: encode_value(value) for key, value in facts.items()}
    numbers = _numbers_of(checkpoint.tensors, architecture, config.to_dict(), origin)
    numbers |= {key: ArrayNumbers(values) for key, values in rope_tensors(config).items()}
    exhaust(write_gguf(path, metadata, _rounded(numbers, formats)))
    made = open_gguf(path)
    check_settings(config, load_config(made.folder), origin)
    cut.check_ids(ModelSource(origin, None, made.folder, gguf=made).tokenizer())


def write_from_gguf(
    source: ModelSource, cut: CutVocab, kept: Ids, formats: Formats | None, path: Path
) -> None:
    """Write a GGUF file with the kept rows of another one.

    Args:
        source: the model in a GGUF file.
        cut: its cut tokenizer.
        kept: the kept token ids (K,).
        formats: to round all numbers to; None keeps every block as it is.
        path: the file.

    Raises:
        UnsupportedModelError: there is a list in the file of which it is not known how it is cut.
    """
    if source.gguf is None:
        raise MismatchError(f"{source.name} is no GGUF file.")
    file = source.gguf.file
    changed: Json = cut_metadata(source, cut, kept)
    for key in file.metadata:
        if key.endswith(".vocab_size"):
            changed[key] = len(kept)
    if formats is not None:
        changed[_FILE_TYPE] = FILE_TYPES[formats.body.name]
    metadata = {key: file.stored(key) for key in file.metadata if key not in changed}
    metadata |= {key: encode_value(value) for key, value in changed.items() if value is not None}
    rows = {name: kept if name in (EMBEDDING, HEAD) else None for name in file.tensors}
    tensors: Mapping[str, GgmlSource]
    if formats is None:
        tensors = {name: StoredRows(tensor, rows[name]) for name, tensor in file.tensors.items()}
    else:
        numbers = {name: DequantizedNumbers(tensor, rows[name]) for name, tensor in file.tensors.items()}
        tensors = _rounded(numbers, formats)
    exhaust(write_gguf(path, metadata, tensors, alignment=file.alignment))
    made = open_gguf(path)
    cut.check_ids(ModelSource(source.name, None, made.folder, gguf=made).tokenizer())


def _rounded(numbers: Mapping[str, Numbers], formats: Formats) -> dict[str, GgmlSource]:
    return {
        name: RoundedTensor(name, found, formats.of_tensor(name, found.shape))
        for name, found in numbers.items()
    }


def _numbers_of(
    specs: Mapping[str, TensorSpec], architecture: Architecture, config: Json, origin: str
) -> dict[str, Numbers]:
    """The tensors of a checkpoint by llama.cpp's names, as llama.cpp has them."""
    own = _BIASES if architecture.may_have_biases else {}
    biases = tuple(part for part, key in own.items() if config.get(key))
    tied = bool(config.get("tie_word_embeddings"))
    names = architecture.stored_names(config["num_hidden_layers"], head=not tied, biases=biases)
    found: dict[str, Numbers] = {}
    for name, theirs in names.items():
        if theirs not in specs:
            raise UnsupportedModelError(
                f"{origin} has no {theirs}, which llama.cpp needs as {name}: --to gguf takes a language "
                "model as transformers saves it."
            )
        order, shift = as_in_transformers(name, specs[theirs].shape[0], architecture, config)
        places = None if order is None else np.argsort(order)
        found[name] = CheckpointNumbers(specs[theirs], places, -shift)
    known = {*names.values(), *(["lm_head.weight"] if tied else [])}
    others = [name for name in specs if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if others:
        raise UnsupportedModelError(
            f"{origin} has {others[0]}, which llama.cpp's {architecture.model_type} has not: use --to "
            "safetensors, or another layout."
        )
    return found


def format_of(made: GgufModel) -> str:
    """The format that most numbers of a file are stored in."""
    counts: dict[str, int] = {}
    for tensor in made.file.tensors.values():
        size = int(np.prod(tensor.shape, dtype=np.int64))
        counts[tensor.kind.name] = counts.get(tensor.kind.name, 0) + size
    return max(counts, key=counts.__getitem__)
