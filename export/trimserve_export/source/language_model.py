"""The language model of a multimodal checkpoint, as a checkpoint of its own: what takes and gives text."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import transformers
from transformers import PretrainedConfig

from trimserve.errors import UnsupportedModelError
from trimserve.files.tensors import TensorSpec, map_tensor
from trimserve.model.source import CONFIG_NAME, ModelSource
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.source.whole import link_files

# What `generate` reads of the outer config where both have it.
_OUTER: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of two matrices that are compared at a time.
_ROWS: Final = 4096


def language_model_of(source: ModelSource, folder: Path, *, trust_remote_code: bool = False) -> ModelSource:
    """Give the language model of a multimodal checkpoint; no tensor is copied.

    Args:
        source: the checkpoint.
        folder: an existing empty folder: it gets the language model's config, and links to all other files.
        trust_remote_code: allow code that the model folder brings.

    Raises:
        UnsupportedModelError: transformers has no text-generation class for its language model.
    """
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    classes = transformers.AutoModelForCausalLM._model_mapping
    if type(text) not in classes:
        raise UnsupportedModelError(
            f"the language model of this {config.model_type!r} model is a {text.model_type!r} model, and "
            f"transformers {transformers.__version__} has no class that generates text with it alone: this "
            "model cannot be trimmed."
        )
    link_files(source.path, folder, (CONFIG_NAME,))
    inner = replace(source, path=folder, composite=source.path)
    stored = _settings(config) | {
        "architectures": [classes[type(text)].__name__],
        "tie_word_embeddings": _is_tied(config, inner.tensors),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(stored, indent=2) + "\n", "utf-8")
    return replace(inner)  # which has read no config yet


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """The language model's config, with what the whole model's decides."""
    text = config.get_text_config()
    # As a file would hold it: without what every config has by default, and with the type of the section.
    settings: dict[str, Any] = text.to_diff_dict() | {"model_type": text.model_type}
    settings |= {name: found for name in _OUTER if (found := getattr(config, name, None)) is not None}
    return settings | {"vocab_size": text.vocab_size}


def _is_tied(config: PretrainedConfig, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether the head is the embedding, as transformers decides it: two that differ are two."""
    major = int(transformers.__version__.partition(".")[0])
    tied = bool(getattr(config if major >= 5 else config.get_text_config(), "tie_word_embeddings", False))
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not tied or head is None or table is None:
        return tied
    rows = zip(_parts(head), _parts(table), strict=False)
    return head.shape == table.shape and all(np.array_equal(one, other) for one, other in rows)


def _parts(spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
    mapped = map_tensor(spec)
    return (mapped[start : start + _ROWS] for start in range(0, len(mapped), _ROWS))
