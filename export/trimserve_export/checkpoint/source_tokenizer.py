"""The source's tokenizer: its files in a trimmed folder, and the ids that its own library gives."""

import dataclasses
import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimserve.folder.names import EFFECTIVE_TOKENIZER_NAME, SOURCE_TOKENIZER_FILES, TOKENIZER_NAME
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.library import transformers_border

# Copied as they are, with the tokenizer's.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def ask_library(source: ModelSource, *, trust_remote_code: bool = False) -> ModelSource:
    """The source with its tokenizer read by its library, whether or not a setting can matter."""
    return dataclasses.replace(source, ask_library=True, trust_remote_code=trust_remote_code)


def copy_tokenizer(source: ModelSource, folder: Path) -> None:
    """Copy a source's tokenizer files byte for byte, and write the effective tokenizer where it differs."""
    for name in (*SOURCE_TOKENIZER_FILES, *TEMPLATE_FILES):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    if not source.effective.original:
        (folder / EFFECTIVE_TOKENIZER_NAME).write_bytes(source.effective.content)


def tokenizer_entry(source: ModelSource, layout: str) -> dict[str, Any]:
    """The manifest's `tokenizer`: the file that counts, what made it, and settings that it cannot hold."""
    effective = source.effective
    own = effective.original or layout == "tokenizer"  # a cut tokenizer is cut from the effective one
    name = TOKENIZER_NAME if own else EFFECTIVE_TOKENIZER_NAME
    return {"file": name, **effective.made_by, "settings": dict(effective.settings)}


def load_tokenizer(source: ModelSource) -> Any:  # noqa: ANN401 - a tokenizer of transformers
    """What AutoTokenizer makes of a source's folder.

    Raises:
        UnsupportedModelError: transformers cannot load it.
    """
    transformers = importlib.import_module("transformers")
    advice = "compare with the version that the model was made for."
    with transformers_border(f"cannot load the tokenizer of {source.name}", advice=advice):
        return transformers.AutoTokenizer.from_pretrained(
            str(source.composite or source.path), trust_remote_code=source.trust_remote_code
        )


def library_ids(
    source: ModelSource,
    texts: Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The token ids that AutoTokenizer gives for a source's folder: what every text's ids are compared with.

    Args:
        source: the model.
        texts: any texts.
        pairs: a second text for each.
        max_length: truncate to so many tokens; by default nothing is cut.
        add_special_tokens: as in transformers.

    Raises:
        UnsupportedModelError: transformers cannot load the tokenizer.
    """
    tokenizer = load_tokenizer(source)
    if not texts:
        return []
    with transformers_border(f"cannot tokenize with the tokenizer of {source.name}"):
        encoded = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            add_special_tokens=add_special_tokens,
            truncation=max_length is not None,
            max_length=max_length,
        )
    return [list(ids) for ids in encoded["input_ids"]]
