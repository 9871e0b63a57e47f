"""Read how a sentence-transformers folder makes a sentence embedding from hidden states."""

import json
from pathlib import Path
from typing import Any

from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import Pooling
from trimserve.model.source import ModelSource

MODULES_NAME = "modules.json"
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def is_sentence_transformers(source: ModelSource) -> bool:
    """Tell whether a folder is a sentence-transformers model (it has a modules.json)."""
    return (source.path / MODULES_NAME).is_file()


def read_pooling(source: ModelSource) -> Pooling:
    """Read the pooling that a folder declares; mean pooling without normalisation where it declares none.

    Raises:
        UnsupportedModelError: a module or a pooling mode that the runtime has not; its embeddings would
            silently be other ones.
    """
    if not is_sentence_transformers(source):
        return Pooling()
    mode, normalize = "mean", False
    for module in json.loads((source.path / MODULES_NAME).read_text("utf-8")):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            mode = _read_mode(source.path / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedModelError(
                f"{source.name} has a {kind} module in its {MODULES_NAME}, which the runtime cannot run: "
                "remove the file to export the transformer alone, with mean pooling."
            )
    return Pooling(mode, normalize, _max_tokens(source))


def _read_mode(path: Path) -> str:
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("pooling_mode"), str):  # sentence-transformers >= 5.3
        found = [config["pooling_mode"]]
    else:
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        found = [_MODES.get(key, key) for key in chosen]
    if len(found) != 1 or found[0] not in _MODES.values():
        raise UnsupportedModelError(
            f"{path} pools by {' + '.join(found) or 'nothing'}: the runtime has {', '.join(_MODES.values())}."
        )
    return str(found[0])


def _max_tokens(source: ModelSource) -> int | None:
    """The declared maximum, else what sentence-transformers falls back to: positions or tokenizer limit."""
    settings = source.read_json("sentence_bert_config.json")
    if settings.get("do_lower_case") and not _lowers(source):
        raise UnsupportedModelError(
            f"{source.name} lower-cases texts before its tokenizer (do_lower_case in "
            "sentence_bert_config.json), which the runtime does not: add a Lowercase "
            "normalizer to tokenizer.json."
        )
    if settings.get("max_seq_length"):
        return int(settings["max_seq_length"])
    limits = (
        source.config.get("max_position_embeddings"),
        source.read_json("tokenizer_config.json").get("model_max_length"),
    )
    known = [int(limit) for limit in limits if isinstance(limit, int)]
    return min(known, default=None)


def _lowers(source: ModelSource) -> bool:
    normalizer = source.tokenizer().normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"
