"""What a token id stands for, for people: its text, and its kind by script."""

import functools
import re
import unicodedata

from tokenizers import Tokenizer

from trimserve.text.tokenizer import is_byte_token, special_ids, tokenizer_border

SPECIAL, BYTES, UNUSED, UNNAMED = "special", "bytes", "unused", "no token"
CODE = "code"
_SPACE_MARK = "\u2581"
_FULL_NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}
_WIDTHS = {"FULLWIDTH", "HALFWIDTH"}
# First words of the names of letters that belong to no script, such as MICRO SIGN.
_SIGNS = {"MODIFIER", "SUPERSCRIPT", "FEMININE", "MASCULINE", "MICRO", "SCRIPT", "DOUBLE-STRUCK"}
_SIGNS |= {"MATHEMATICAL", "IDEOGRAPHIC"}
_OPERATOR = re.compile(r"[{}()\[\];=<>/\\|&$#*+`_@^~%-]{2,}")
_IDENTIFIER = re.compile(r"[a-z0-9][A-Z]|[A-Za-z]_|_[A-Za-z]|[A-Za-z][({\[;=]|[({\[.][A-Za-z]|^[#$@][A-Za-z]")


class TokenNames:
    """Texts and kinds of one tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer) | set(tokenizer.get_added_tokens_decoder())
        self._byte_level = "ByteLevel(" in f"{tokenizer.pre_tokenizer}{tokenizer.decoder}"

    @tokenizer_border
    def text(self, id_: int) -> str:
        """The characters that a token stands for; a part of a character as its bytes, `<E4 B8>`."""
        token: str | None = self._tokenizer.id_to_token(id_)
        if token is None:
            return f"#{id_}"
        if id_ in self._special:
            return token
        if is_byte_token(token):
            return _byte_text(bytes([int(token[3:5], 16)]))
        if self._byte_level and all(letter in _BYTE_OF for letter in token):
            return _byte_text(bytes(_BYTE_OF[letter] for letter in token))
        return token.replace(_SPACE_MARK, " ")

    @tokenizer_border
    def kind(self, id_: int) -> str:
        """What the token is made of: a script's name, `digits`, `code`, `special` and the like."""
        token = self._tokenizer.id_to_token(id_)
        if token is None:
            return UNNAMED
        if id_ in self._special:
            return SPECIAL
        text = self.text(id_)
        if is_byte_token(token) or _PART.fullmatch(text):
            return BYTES
        if _RESERVED.fullmatch(token):
            return UNUSED
        return kind_of(text.removeprefix("##"))


_RESERVED = re.compile(r"[\[<]unused_?\d+[\]>]")
_PART = re.compile(r"<[0-9A-F]{2}( [0-9A-F]{2})*>")


def _byte_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"<{data.hex(' ').upper()}>"


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for: a printable one for its own."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def kind_of(text: str) -> str:
    """Tell what a text is made of.

    Example:
        >>> [kind_of(text) for text in (" cat", " naïve", "42", "猫", "なに", "кот", "();", "getName", " ")]
        ['Latin', 'Latin, accented', 'digits', 'Han', 'Kana', 'Cyrillic', 'code', 'code', 'whitespace']
    """
    body = text.strip()
    if not body:
        return "whitespace"
    scripts = {_script(character) for character in body} - {""}
    if not scripts:
        return _kind_without_letters(body)
    if scripts == {"Kana", "Han"}:
        return "Kana"  # Japanese alone mixes them
    if len(scripts) > 1:
        return "several scripts"
    (script,) = scripts
    if script == "Latin" and _IDENTIFIER.search(body):
        return CODE
    return "Latin, accented" if script == "Latin" and not body.isascii() else script


def _kind_without_letters(body: str) -> str:
    if any(character.isnumeric() for character in body):
        return "digits"
    if _OPERATOR.search(body):
        return CODE
    return "punctuation" if any(map(_is_punctuation, body)) else "symbols, emoji"


def _is_punctuation(character: str) -> bool:
    return character.isascii() or unicodedata.category(character).startswith("P")


@functools.cache
def _script(character: str) -> str:
    """The script of a letter by its Unicode name; empty for anything else."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    words = unicodedata.name(character, "OTHER").split()
    word = next((word for word in words if word not in _WIDTHS), "OTHER")
    return "" if word in _SIGNS else _FULL_NAMES.get(word, word.capitalize())
