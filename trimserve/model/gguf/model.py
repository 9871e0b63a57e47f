"""A GGUF file as a folder of small files, the way that transformers would have saved its model.

config.json, tokenizer.json and their kin are made of the metadata in a temporary folder, which lives as long
as the process. The weights stay in the file; `write_weights` dequantises them where a library needs them.
"""

import functools
import json
import logging
import math
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from trimserve.files.ggml_blocks import GgmlType
from trimserve.files.gguf import GgufFile, GgufTensor, read_gguf
from trimserve.files.tensors import TensorSpec
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.model.gguf.architectures import EMBEDDING, HEAD, architecture_of
from trimserve.model.gguf.checkpoint import DequantizedTensor, named_tensors, write_checkpoint
from trimserve.model.gguf.config import config_of, generation_of
from trimserve.model.gguf.tokenizer import read_tokenizer

log = logging.getLogger(__name__)

# Formats without minima that have a scale for fewer numbers than 32.
_SMALL_BLOCKS = {"Q3_K": 16, "Q6_K": 16}


@dataclass(frozen=True)  # no slots: the folder goes when nothing refers to the model any more
class GgufModel:
    """A model in a GGUF file.

    Attributes:
        file: what the file says.
        folder: its small files as transformers has them.
        tensors: transformers' name -> tensor, in file order.
    """

    file: GgufFile
    folder: Path
    tensors: dict[str, DequantizedTensor]

    def __post_init__(self) -> None:
        weakref.finalize(self, _remove, self.folder, os.getpid())

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Where the tensors lie, by transformers' names; their dtype is ggml's, such as ``Q4_K``."""
        return {
            name: TensorSpec(
                name,
                made.stored.kind.name,
                made.shape,
                self.file.path,
                made.stored.offset,
                made.stored.nbytes,
            )
            for name, made in self.tensors.items()
        }

    @property
    def bits_a_weight(self) -> float:
        """Bits that a number takes in the format that most of the body's matrices have."""
        counts: dict[GgmlType, int] = {}
        for name, tensor in self.file.tensors.items():
            if len(tensor.shape) == 2 and name not in (EMBEDDING, HEAD):
                counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
        kind = max(counts, key=counts.__getitem__)
        return 8 * kind.nbytes / kind.numbers

    @property
    def head_block(self) -> int | None:
        """Numbers of a block of 8-bit rows that the vocab head's are kept in; None where any will do."""
        head = self.file.tensors.get(HEAD, self.file.tensors[EMBEDDING])
        return _SMALL_BLOCKS.get(head.kind.name)

    @property
    def packed_matrices(self) -> tuple[GgufTensor, ...]:
        """The body's matrices of integers in blocks, the rows in the file's order."""
        return tuple(
            tensor
            for name, tensor in self.file.tensors.items()
            if tensor.is_packed and name not in (EMBEDDING, HEAD)
        )

    def write_weights(self, path: Path) -> None:
        """Write all weights, dequantised to float32, into a safetensors file."""
        log.info("dequantising %s", self.file.path)
        write_checkpoint(self.tensors, path)


def open_gguf(path: Path) -> GgufModel:
    """Read a GGUF file and make its small files.

    Raises:
        UnsupportedModelError: an architecture, tokenizer or number format that is not read, by its name.
        MismatchError: the file is damaged or contradicts itself.
    """
    stat = path.stat()
    return _cached(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=2)  # a command asks for the same file several times
def _cached(path: Path, *signature: int) -> GgufModel:
    del signature  # part of the key: a file that changed
    file = read_gguf(path)
    name, architecture = architecture_of(file)
    tokenizer = read_tokenizer(file)
    config = config_of(file, name, architecture, tokenizer)
    tensors = named_tensors(file, architecture, config)
    settings = tokenizer.settings | {"model_max_length": config["max_position_embeddings"]}
    contents = {
        "config.json": config,
        "generation_config.json": generation_of(tokenizer),
        "tokenizer_config.json": settings,
    }
    content = tokenizer.content
    model = GgufModel(file, Path(tempfile.mkdtemp(prefix="trimserve-gguf.")), tensors)
    (model.folder / TOKENIZER_NAME).write_bytes(content)
    for name_of_file, values in contents.items():
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        (model.folder / name_of_file).write_text(text, "utf-8")
    return model


def _remove(folder: Path, process: int) -> None:
    """Remove a model's folder, but not in a process that was forked off the one that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
