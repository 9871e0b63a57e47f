"""The file names of a trimmed folder."""

import re
from pathlib import PurePosixPath, PureWindowsPath

from trimserve.errors import MismatchError

# Holds the cold rows of a quantised head.
COLD_BLOCKS_NAME = "cold_head.onnx_data"
MANIFEST_NAME = "trimserve.json"
VOCAB_NAME = "vocab_map.safetensors"
# Every file with rows, blocks or bounds of cold ids is called so.
COLD_PREFIX = "cold_"
COLD_NAME = "cold_rows.safetensors"
# What the rounding of a quantised body was weighted with.
CALIBRATION_NAME = "calibration.safetensors"
TOKENIZER_NAME = "tokenizer.json"
# What the source's library makes of it on loading, where that gives other ids or text.
EFFECTIVE_TOKENIZER_NAME = "tokenizer.effective.json"
# Its model as tables that are mapped (`trimserve.text.mapped`).
TOKENIZER_TABLES_NAME = "tokenizer_tables.safetensors"
# The files that a source's tokenizer is read from.
SOURCE_TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
)
# What says that a folder holds an adapter: peft's, and that of reversible fine-tuning.
ADAPTER_CONFIG = "adapter_config.json"
COUPLED_CONFIG = "reversible.json"
# What sentence-transformers does around the model, and the tensors of its modules.
SENTENCE_NAME = "sentence_modules.json"
SENTENCE_TENSORS_NAME = "sentence_modules.safetensors"
# Where folders for transformers.js keep their graphs.
GRAPH_FOLDER = "onnx"
# The folders that a trimmed folder may have in it: that one, and those of sentence-transformers' modules.
_INNER_FOLDER = re.compile(rf"{GRAPH_FOLDER}|[1-9]\d?_[A-Za-z]+", re.ASCII)


def is_inner_folder(name: str) -> bool:
    """Whether a trimmed folder may have a folder of this name in it."""
    return _INNER_FOLDER.fullmatch(name) is not None


def check_inner_name(name: str, origin: str) -> None:
    """Refuse a file name that is neither plain nor a plain one in a folder that may be there.

    Raises:
        MismatchError: see above.
    """
    inner, slash, plain = name.partition("/")
    check_plain_name(plain if slash and is_inner_folder(inner) else name, origin)


def check_plain_name(name: str, origin: str) -> None:
    """Refuse a file name that could lead outside the folder.

    Raises:
        MismatchError: the name is empty, absolute, or has a folder in it.
    """
    plain = name not in ("", ".", "..") and "\0" not in name
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise MismatchError(
            f"{origin} names the file {name!r}, which is not a plain name inside the folder: "
            "do not use this folder unless you know who made it."
        )


# Scales, norms and the order; the integers and what ONNX Runtime packed them into; their graph.
SKETCH_NAME = "cold_sketch.safetensors"
SKETCH_DATA_NAME = "cold_sketch.onnx_data"
SKETCH_GRAPH_NAME = "cold_sketch.onnx"
# The same product, with the mass of each group.
SKETCH_MASS_NAME = "cold_sketch_mass.onnx"
SKETCH_FILES = (SKETCH_NAME, SKETCH_DATA_NAME, SKETCH_GRAPH_NAME, SKETCH_MASS_NAME)
COLD_MAX_NAME = "cold_max.onnx"
COLD_HEAD_NAME = "cold_head.onnx"
# The weights of a cold head that is the full graph's own nodes (trimserve_export.from_graph.cold_head).
COLD_WEIGHTS_NAME = "cold_head.onnx_weights"
