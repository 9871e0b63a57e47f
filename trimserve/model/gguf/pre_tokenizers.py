"""How llama.cpp parts a text before BPE merges, by the name in `tokenizer.ggml.pre`.

Each name stands for patterns that part the text one after the other; what a pattern does not match is a part,
too. The patterns are llama.cpp's and not those of the original tokenizers, from which some differ in rare
characters: a GGUF file's ids are what llama.cpp gives. Names are in its documentation,
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from trimserve.errors import UnsupportedModelError

# Letters and digits of Unicode 16, which llama.cpp's tables (Unicode 15.1) do not have and tokenizers' have.
_NEW: Final = (
    r"\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D40}-\x{10D65}"
    r"\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{11380}-\x{113D3}\x{116D0}-\x{116E3}\x{11BC0}-\x{11BF9}"
    r"\x{13460}-\x{143FA}\x{16100}-\x{16139}\x{16D40}-\x{16D79}\x{18CFF}\x{1CCF0}-\x{1CCF9}"
    r"\x{1E5D0}-\x{1E5FA}"
)
_LETTER: Final = rf"[\p{{L}}&&[^{_NEW}]]"
_DIGIT: Final = rf"[\p{{N}}&&[^{_NEW}]]"
_ENDINGS: Final = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD: Final = rf"[^\r\n{_LETTER}{_DIGIT}]?{_LETTER}+"
_MARKS: Final = rf" ?[^\s{_LETTER}{_DIGIT}]+"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = rf"(?:(?={_LETTER})[^a-z])"
_LOWER: Final = rf"(?:(?={_LETTER})[^A-Z])"

_GPT2: Final = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_LETTER}+| ?{_DIGIT}+|{_MARKS}|\s+(?!\S)"
_LLAMA3: Final = rf"{_ENDINGS}|{_WORD}|{_DIGIT}{{1,3}}|{_MARKS}[\r\n]*|{_SPACES}"
_QWEN2: Final = rf"{_ENDINGS}|{_WORD}|{_DIGIT}|{_MARKS}[\r\n]*|{_SPACES}"
_SEED: Final = rf"{_ENDINGS}|{_WORD}|{_DIGIT}| ?[^\s{_LETTER}{_DIGIT}\r\n]+|{_SPACES}"


def _cased(ending: str, digits: str) -> str:
    """Words that begin with capitals, as tiktoken's o200k has them."""
    lead = rf"[^\r\n{_LETTER}{_DIGIT}]?"
    words = rf"{lead}{_UPPER}*{_LOWER}+{ending}|{lead}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}|{_MARKS}[\r\n/]*|{_SPACES}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name of `tokenizer.ggml.pre` stands for.

    Attributes:
        patterns: regular expressions, applied one after the other.
        ignore_merges: a part that is a token as a whole is that token, whatever the merges say.
        add_bos: texts begin with bos where the file does not say so.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def to_json(self, missing: str = "") -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json.

        Args:
            missing: letters of bytes that are no tokens. Nothing merges across them, and they are lost.
        """
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        # The letters that bytes are written with; the parting is done.
        letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        lost = {
            "type": "Split",
            "pattern": {"Regex": f"[{re.escape(missing)}]"},
            "behavior": "Removed",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [*splits, letters, *([lost] if missing else [])]}


_KINDS: Final = (
    (PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True), "llama3 llama-v3 llama-bpe falcon3 pixtral"),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe"),
    (PreTokenizer((_QWEN2,)), "qwen2 deepseek-r1-qwen stablelm2 megrez"),
    (PreTokenizer((_DIGIT, _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    (PreTokenizer((_GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion exaone4"),
    (PreTokenizer((_cased(f"{_ENDINGS}?", f"{_DIGIT}{{1,3}}"),)), "gpt-4o llama4"),
    (PreTokenizer((_cased("", _DIGIT),), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_SEED,)), "seed-coder"),
)
PRE_TOKENIZERS: Final = {name: kind for kind, names in _KINDS for name in names.split()}


def pre_tokenizer(name: str, origin: str) -> PreTokenizer:
    """Look up a name of `tokenizer.ggml.pre`.

    Raises:
        UnsupportedModelError: it is not known; the message has the name and those that are.
    """
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"{origin}: tokenizer.ggml.pre is {name[:60]!r}, whose token ids trimserve does not give (it "
            f"knows {known}): pass the model that the file was made from."
        )
    return PRE_TOKENIZERS[name]
