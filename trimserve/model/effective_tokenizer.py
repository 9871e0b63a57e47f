"""The tokenizer of a model folder as the library that the folder was made for loads it.

transformers reads tokenizer_config.json and other files beside tokenizer.json and may change it: add an eos
token, lower-case, add tokens. What it then tokenizes with is the *effective* tokenizer, a tokenizer.json of
its own. Nothing here imports transformers: see `trimserve.model.library_tokenizer`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trimserve.errors import MissingExtraError, UnsupportedModelError, UsageError
from trimserve.files.content import check_content
from trimserve.files.model_json import read_model_json
from trimserve.folder.names import ADAPTER_CONFIG, COUPLED_CONFIG, SOURCE_TOKENIZER_FILES, TOKENIZER_NAME
from trimserve.folder.tokenizer_settings import declared_settings
from trimserve.model.library_tokenizer import ask_transformers
from trimserve.text.tokenizer import load_tokenizer, parse_tokenizer
from trimserve.text.unmet_settings import prefix_space, unmet_setting

log = logging.getLogger(__name__)

Json = dict[str, Any]
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Classes that take tokenizer.json as it is, but for what `unmet_setting` knows.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Above it transformers may mend the pattern of Mistral's tokenizers.
_MENDED_FROM = 100_000
_SAVE = "save the tokenizer with transformers' save_pretrained(folder)"


@dataclass(frozen=True)
class EffectiveTokenizer:
    """What a folder's texts are tokenized with.

    Attributes:
        content: a tokenizer.json.
        original: it is the folder's own, byte for byte.
        made_by: the library, its version and the tokenizer's class; or why the file is taken as it is.
        settings: what a tokenizer.json cannot say: truncation_side, model_max_length, clean_up (of decoded
            text), split_special_tokens, special_tokens (role -> token).
        origin: the file that it was made of, for messages.
    """

    content: bytes
    original: bool
    made_by: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: str = TOKENIZER_NAME

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the content: what profiles, vocabs and folders are bound to."""
        return hashlib.sha256(self.content).hexdigest()

    def load(self) -> Tokenizer:
        """Load it, with padding and truncation off."""
        tokenizer = parse_tokenizer(self.content, self.origin)
        tokenizer.encode_special_tokens = bool(self.settings.get("split_special_tokens"))
        return tokenizer


def effective_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, always: bool = False
) -> EffectiveTokenizer:
    """Find out what a folder's texts are tokenized with.

    Args:
        folder: a model's folder.
        trust_remote_code: allow code that the folder brings.
        always: ask transformers also where the settings cannot matter.

    Raises:
        UsageError: the folder has no tokenizer.
        MissingExtraError: its ids need transformers, which is not installed.
        UnsupportedModelError: transformers cannot load it, and tokenizer.json alone would give other ids.
        MismatchError: a file cannot be read.
    """
    names = (*SOURCE_TOKENIZER_FILES, "config.json")
    stats = [(name, (folder / name).stat()) for name in names if (folder / name).is_file()]
    signature = tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return _cached(folder, trust_remote_code, always, signature)


@functools.lru_cache(maxsize=4)  # a command asks for the same folder several times
def _cached(folder: Path, trust: bool, always: bool, signature: object) -> EffectiveTokenizer:
    del signature  # part of the key: a file that changed
    if not has_tokenizer(folder):
        if (base := _base_of_adapter(folder)) is not None:
            raise UsageError(
                f"{folder} is an adapter without a tokenizer: pass -m {base}, the model that it belongs to."
            )
        raise UsageError(
            f"{folder} has no {TOKENIZER_NAME} and no other file of a tokenizer: make one with transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    class_name = _class_name(folder)
    if class_name is None:
        return _as_it_is(folder, "no tokenizer_class and no model_type say which class loads it")
    if not _has_transformers():
        return _as_it_is(folder, "transformers is not installed")
    if not always and class_name in _PLAIN and _is_surely_plain(folder):
        return _as_it_is(folder, f"{class_name} takes the file as it is")
    found = ask_transformers(folder, trust_remote_code=trust)
    if "python" in found:
        raise UnsupportedModelError(
            f"{folder}: transformers {found['version']} tokenizes with {found['python']}, a class in Python "
            f"whose ids no {TOKENIZER_NAME} gives: use a model of a class that has a fast tokenizer."
        )
    if "error" in found:
        reason = f"transformers {found['version']} cannot load it ({found['error']})"
        as_it_is = _as_it_is(folder, reason)
        log.warning("%s: %s is taken as it is, because %s.", folder, TOKENIZER_NAME, reason)
        return as_it_is
    origin = str(folder / TOKENIZER_NAME)
    made_by = {"library": "transformers", "version": found["version"], "class": found["class"]}
    if found["content"] is None:
        content = (folder / TOKENIZER_NAME).read_bytes()
        return EffectiveTokenizer(content, True, made_by, found["settings"], origin)
    return EffectiveTokenizer(found["content"].encode(), False, made_by, found["settings"], origin)


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer can be made of."""
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return any((folder / name).is_file() for name in SOURCE_TOKENIZER_FILES if name not in settings)


def _class_name(folder: Path) -> str | None:
    """The class that AutoTokenizer would take, or the model type that it would infer it from."""
    config, model = _read(folder, _CONFIG), _read(folder, "config.json")
    names = (config.get("tokenizer_class"), model.get("tokenizer_class"), model.get("model_type"))
    return next((name for name in names if name), None)


def _as_it_is(folder: Path, reason: str) -> EffectiveTokenizer:
    """tokenizer.json by itself, where no setting beside it is known to change its ids.

    Raises:
        MissingExtraError, UnsupportedModelError: one does, or there is no tokenizer.json.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        others = ", ".join(name for name in SOURCE_TOKENIZER_FILES if (folder / name).is_file())
        needs = others.endswith((".model", ".spm")) and importlib.util.find_spec("sentencepiece") is None
        advice = "install sentencepiece and protobuf" if needs else _SAVE
        what = f"{folder} has no {TOKENIZER_NAME}, only {others}, which transformers reads"
        raise _refusal(what, reason, advice)
    original = original_tokenizer(folder, {"reason": reason})
    tokenizer = parse_tokenizer(original.content, str(path))
    unmet = unmet_setting(tokenizer, *(_read(folder, name) for name in (_CONFIG, _SPECIAL, _ADDED)))
    if unmet is not None:
        raise _refusal(f"{folder} has {unmet}, which {TOKENIZER_NAME} alone does not follow", reason)
    return original


def original_tokenizer(folder: Path, made_by: Mapping[str, str] | None = None) -> EffectiveTokenizer:
    """tokenizer.json by itself, whatever stands beside it."""
    check_content(folder / TOKENIZER_NAME)
    content = (folder / TOKENIZER_NAME).read_bytes()
    settings = declared_settings(_read(folder, _CONFIG), _read(folder, _SPECIAL))
    made_by = {"library": "tokenizers", **(made_by or {})}
    return EffectiveTokenizer(content, True, made_by, settings, str(folder / TOKENIZER_NAME))


def lone_tokenizer(folder: Path, reason: str) -> EffectiveTokenizer:
    """tokenizer.json by itself for a library that reads no file beside it: its own settings alone count."""
    original = original_tokenizer(folder, {"reason": reason})
    path = folder / TOKENIZER_NAME
    truncation = parse_tokenizer(original.content, str(path), as_stored=True).truncation or {}
    side = str(truncation.get("direction", "right")).lower()
    return replace(original, settings=declared_settings({"truncation_side": side}, {}))


def _refusal(what: str, reason: str, advice: str = _SAVE) -> Exception:
    if "not installed" in reason:
        return MissingExtraError(
            f"{what}; so its token ids need transformers, which is not installed. Install it with: "
            "pip install 'trimserve[export]'"
        )
    return UnsupportedModelError(f"{what}, and {reason}: {advice}.")


def _is_surely_plain(folder: Path) -> bool:
    """Whether the base class of transformers 4 surely leaves tokenizer.json as it is."""
    config, path = _read(folder, _CONFIG), folder / TOKENIZER_NAME
    version = importlib.metadata.version("transformers")
    if (
        not version.startswith("4.")
        or not path.is_file()
        or {"auto_map", "fast_tokenizer_files"} & config.keys()
    ):
        return False
    tokenizer = load_tokenizer(path)
    space = prefix_space(tokenizer)  # which the class takes to be false where nothing is said
    return (
        tokenizer.get_vocab_size() < _MENDED_FROM
        and space in (None, bool(config.get("add_prefix_space", False)))
        and unmet_setting(tokenizer, config, _read(folder, _SPECIAL), _read(folder, _ADDED)) is None
    )


def _base_of_adapter(folder: Path) -> str | None:
    """The model that a folder's adapter belongs to, BASE if it does not say; None if it holds no adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        return _read(folder, ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    if (folder / COUPLED_CONFIG).is_file():
        return (_read(folder, COUPLED_CONFIG).get("base") or {}).get("name") or "BASE"
    return None


def _read(folder: Path, name: str) -> Json:
    return read_model_json(folder / name)
