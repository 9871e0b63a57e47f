"""What sentence-transformers says of a folder beside its model: the names of its files, and lower case."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from trimserve.files.model_json import read_model_json
from trimserve.model.effective_tokenizer import EffectiveTokenizer

MODULES_NAME = "modules.json"
# What it says of the folder as a whole.
PROMPTS_NAME = "config_sentence_transformers.json"
# The first of these that holds something is the transformer's.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def lower_cases(root: Path, folder: Path) -> bool:
    """Whether sentence-transformers lower-cases texts before the tokenizer does anything (`do_lower_case`).

    Args:
        root: where modules.json would be.
        folder: where the transformer's own files are.
    """
    if not (root / MODULES_NAME).is_file():
        return False
    return bool(_transformer_config(folder).get("do_lower_case"))


def _transformer_config(folder: Path) -> dict[str, Any]:
    """What the first of the transformer's configs that says anything holds."""
    found = (read_model_json(folder / name) for name in TRANSFORMER_CONFIGS)
    return next(filter(None, found), {})


def lower_cased(tokenizer: EffectiveTokenizer) -> EffectiveTokenizer:
    """The tokenizer with a lower-casing before its own normaliser, unless it has one."""
    content = json.loads(tokenizer.content)
    own = content.get("normalizer")
    steps = own["normalizers"] if own and own.get("type") == "Sequence" else [own] if own else []
    if any(step.get("type") == "Lowercase" for step in steps):
        return tokenizer
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
    return dataclasses.replace(
        tokenizer,
        content=json.dumps(content, ensure_ascii=False).encode(),
        original=False,
        made_by={**tokenizer.made_by, "library": "sentence-transformers"},
    )
