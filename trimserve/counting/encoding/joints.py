"""Find out from its components where a tokenizer lets texts be parted.

A *joint* is a single space where a text may be parted so that the parts encode to the ids of the whole. Most
tokenizers make every space between solid characters one:

- WordPiece, after BertPreTokenizer or WhitespaceSplit: no token spans white space.
- Unigram and BPE behind Metaspace(split): each word is segmented by itself, behind its "▁".
- Byte-level BPE with one of the known expressions: a match begins before each single space.
- SentencePiece BPE without pre-tokenizer, if no token of its vocab has "▁" behind another character: no
  merge can cross such a place.

Normalizers act on characters or grapheme clusters, of which a space between solid characters begins one. That
a character is solid is tried on the tokenizer itself, once a character. Pieces with added tokens are never
solid, since these reach out for white space or change what stands beside them. A tokenizer with any component
not named here is refused.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

from tokenizers import Tokenizer

from trimserve.errors import UsageError

# "lead": the space before a word is a part of it. "drop": a word alone encodes as behind a space.
# "any": as "drop", and any space parts, whatever stands beside it.
Joint = Literal["lead", "drop", "any"]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# In each of them white space stands only at the beginning of an alternative, or makes up all of it.
_EXPRESSIONS = frozenset({_GPT2, _LLAMA3, _LLAMA3.replace("{1,3}", "")})
_NORMALIZERS = frozenset(
    {
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
        "Precompiled",
        "Nmt",
        "Prepend",
    }
)


def components(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says about a tokenizer, without its vocab and merges, which take long to write."""
    model = tokenizer.model
    steps = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    return {
        "model": {
            "type": type(model).__name__,
            "dropout": getattr(model, "dropout", None),
            "end_of_word_suffix": getattr(model, "end_of_word_suffix", None),
        },
        "added_tokens": [
            {"content": token.content} for token in tokenizer.get_added_tokens_decoder().values()
        ],
    } | {name: step and json.loads(step.__getstate__()) for name, step in steps.items()}


def find_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    """How texts may be parted at spaces, by the components of a tokenizer.

    Args:
        parts: what `components` gives.
        vocab: gives the tokens, where they have to be looked at.

    Raises:
        UsageError: a component is not known to be local to words.
    """
    _demand(not parts["model"].get("dropout"), "dropout")
    _demand(not any(_reaches_out(token["content"]) for token in parts["added_tokens"]), "added tokens")
    joint = _pre_tokenizer_joint(parts, vocab)
    for normalizer in _members(parts["normalizer"], "normalizers"):
        kind, pattern = normalizer["type"], normalizer.get("pattern") or {}
        known = kind in _NORMALIZERS or (kind == "Strip" and joint != "lead")
        single = len(pattern.get("String", "")) == 1 or pattern.get("Regex") == " {2,}"
        _demand(known or (kind == "Replace" and single), f"normalizer {kind} {pattern or ''}")
    return joint


def _reaches_out(content: str) -> bool:
    return "▁" in content or any(character.isspace() for character in content)


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise UsageError(f"this tokenizer's {what.strip()} is not known to keep words apart.")


def _members(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [member for nested in component[key] for member in _members(nested, key)]


def _pre_tokenizer_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    steps = _members(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps:
        return _sentencepiece_joint(parts, vocab)
    if kinds == ["BertPreTokenizer"]:
        normalizers = _members(parts["normalizer"], "normalizers")
        return "any" if [step["type"] for step in normalizers] == ["BertNormalizer"] else "drop"
    if kinds in (["WhitespaceSplit"], ["WhitespaceSplit", "Metaspace"]):
        _demand(steps[-1].get("prepend_scheme", "always") != "first", "Metaspace behind WhitespaceSplit")
        return "drop"
    if kinds == ["Metaspace"] and steps[0].get("split", True):
        return "lead" if steps[0].get("prepend_scheme", "always") == "never" else "drop"
    splits, last = steps[:-1], steps[-1]
    known = all(
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _EXPRESSIONS
        and step["behavior"] == "Isolated"
        and not step["invert"]
        for step in splits
    )
    by_regex = last["type"] == "ByteLevel" and (len(splits) == 1) != bool(last.get("use_regex", True))
    _demand(known and by_regex and len(splits) <= 1, "pre-tokenizer " + ", ".join(kinds))
    return "lead"


def _sentencepiece_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    model = parts["model"]
    _demand(model["type"] == "BPE" and not model.get("end_of_word_suffix"), "lack of a pre-tokenizer")
    steps = _members(parts["normalizer"], "normalizers")
    spaces = [step for step in steps if step["type"] == "Replace" and step.get("pattern") == {"String": " "}]
    _demand(bool(spaces) and spaces[0]["content"] == "▁", "lack of a pre-tokenizer")
    _demand(not any("▁" in piece.lstrip("▁") for piece in vocab()), "vocab, which has tokens across words,")
    return "drop" if any(step == {"type": "Prepend", "prepend": "▁"} for step in steps) else "lead"
