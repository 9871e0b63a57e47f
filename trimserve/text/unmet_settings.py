"""Settings beside a tokenizer.json that change token ids when transformers loads it, told without it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from trimserve.folder.tokenizer_settings import LISTS, ROLES, content_of
from trimserve.text.tokenizer import tokenizer_border

Json = Mapping[str, Any]

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@tokenizer_border
def unmet_setting(tokenizer: Tokenizer, config: Json, special_tokens: Json, added_tokens: Json) -> str | None:
    """Find a setting that tokenizer.json by itself does not follow.

    Args:
        tokenizer: tokenizer.json, loaded.
        config: the content of tokenizer_config.json.
        special_tokens: of special_tokens_map.json.
        added_tokens: of added_tokens.json, token -> id.

    Returns:
        The setting as a phrase, such as ``"add_eos_token = true"``; None where all are followed.
    """
    found = (
        *_frame(tokenizer, config),
        *_normalizing(tokenizer, config),
        *_prefix_space(tokenizer, config),
        *_added(tokenizer, config.get("added_tokens_decoder") or {}),
        *_named(tokenizer, config, ""),
        *_named(tokenizer, special_tokens, " of special_tokens_map.json"),
        *_numbered(tokenizer, added_tokens),
    )
    return next(iter(found), None)


@tokenizer_border
def prefix_space(tokenizer: Tokenizer) -> bool | None:
    """Whether the tokenizer puts a space before the first word; None where it has no such choice."""
    for step in _steps(tokenizer.pre_tokenizer):
        if "add_prefix_space" in step:
            return bool(step["add_prefix_space"])
        if "prepend_scheme" in step:
            return bool(step["prepend_scheme"] != "never")
    return True if any(step["type"] == "Prepend" for step in _steps(tokenizer.normalizer)) else None


def _frame(tokenizer: Tokenizer, config: Json) -> Iterator[str]:
    """What is put around a text: bos before it, eos behind it."""
    for key, role, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        if not isinstance(wanted := config.get(key), bool):
            continue
        token, frame = content_of(config.get(role)), tokenizer.encode("").ids
        id_ = None if token is None else tokenizer.token_to_id(token)
        if wanted != (bool(frame) and id_ is not None and frame[place] == id_):
            yield _phrase(key, wanted)


def _normalizing(tokenizer: Tokenizer, config: Json) -> Iterator[str]:
    """Case and accents; the space around Chinese characters is BERT's alone."""
    normalizer = tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str("A") == "a"
    strips = normalizer is not None and normalizer.normalize_str("é") == "e"
    is_bert = any(step["type"] == "BertNormalizer" for step in _steps(normalizer))
    spaces = normalizer is not None and normalizer.normalize_str("中").strip() != normalizer.normalize_str(
        "中"
    )
    states = {"do_lower_case": lowers, "strip_accents": strips}
    if is_bert:
        states["tokenize_chinese_chars"] = spaces
    for key, state in states.items():
        if isinstance(wanted := config.get(key), bool) and wanted != state:
            yield _phrase(key, wanted)


def _prefix_space(tokenizer: Tokenizer, config: Json) -> Iterator[str]:
    state, wanted = prefix_space(tokenizer), config.get("add_prefix_space")
    if isinstance(wanted, bool) and state is not None and wanted != state:
        yield _phrase("add_prefix_space", wanted)


def _added(tokenizer: Tokenizer, decoder: Mapping[str, Json]) -> Iterator[str]:
    known = tokenizer.get_added_tokens_decoder()
    for id_, token in decoder.items():
        found = known.get(int(id_))
        if found is None or found.content != token["content"] or not _same_flags(found, token):
            yield f"{token['content']!r} of added_tokens_decoder"


def _named(tokenizer: Tokenizer, names: Json, file: str) -> Iterator[str]:
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokens: list[tuple[str, str | Json | None]] = [(role, names.get(role)) for role in ROLES]
    for key in LISTS:
        listed = names.get(key) or []
        tokens += [(key, token) for token in (listed.values() if isinstance(listed, dict) else listed)]
    for key, token in tokens:
        content = content_of(token)
        unknown = bool(content) and content not in known
        if unknown or (content and isinstance(token, Mapping) and not _same_flags(known[content], token)):
            yield f"{key} {content!r}{file}"


def _numbered(tokenizer: Tokenizer, added_tokens: Json) -> Iterator[str]:
    ids = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    for token, id_ in added_tokens.items():
        if ids.get(token) != id_:
            yield f"{token!r} of added_tokens.json"


def _same_flags(found: AddedToken, wanted: Json) -> bool:
    return all(getattr(found, flag) == wanted[flag] for flag in _FLAGS if flag in wanted)


def _steps(step: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a component of tokenizers
    """The states of a component and of what it is made of."""
    if step is None:
        return []
    try:
        return _flat(json.loads(step.__getstate__()))
    except Exception:  # one that is written in Python has no state
        return []


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    members = next((value for value in state.values() if isinstance(value, list)), [])
    return [part for member in members for part in _flat(member)] if state["type"] == "Sequence" else [state]


def _phrase(key: str, value: bool) -> str:
    return f"{key} = {str(value).lower()}"
