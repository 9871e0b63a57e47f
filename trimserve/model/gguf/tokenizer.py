"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, with llama.cpp's token ids."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.gguf import GgufFile
from trimserve.foreign import foreign
from trimserve.model.gguf.pre_tokenizers import pre_tokenizer
from trimserve.model.gguf.sentencepiece import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, ScoredPieces
from trimserve.text.tokenizer import parse_tokenizer

Json = dict[str, Any]
_KEY: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
# Tokens that end an answer, whatever type the file gives them: llama.cpp takes them for control tokens.
# fmt: off
_ENDS: Final = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
})
# fmt: on
_ROLES: Final = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "mask": "mask_token",
}
_RIGHT_STRIPPED: Final = ("phi-3", "phi3")
_NOT_STRIPPED: Final = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Attributes:
        file: the file.
        kind: `tokenizer.ggml.model`: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (sentencepiece's BPE).
    """

    file: GgufFile
    kind: str

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens by id.

        Raises:
            MismatchError: one stands twice.
        """
        found = [token or f"[EMPTY_{id_}]" for id_, token in enumerate(self.file.texts(f"{_KEY}tokens"))]
        if len(set(found)) < len(found):
            raise MismatchError(f"{self.file.path} has a token twice in {_KEY}tokens: make the file again.")
        if not found:
            raise MismatchError(f"{self.file.path} has no tokens in {_KEY}tokens: make the file again.")
        return found

    @cached_property
    def vocab(self) -> dict[str, int]:
        """The ids by token."""
        return {token: id_ for id_, token in enumerate(self.tokens)}

    @cached_property
    def types(self) -> list[int]:
        """The type of each token, with those that llama.cpp changes."""
        key = f"{_KEY}token_type"
        if key not in self.file.metadata:
            return [CONTROL if token in _ENDS else NORMAL for token in self.tokens]
        found: list[int] = self.file.numbers(key, len(self.tokens)).tolist()
        return [CONTROL if token in _ENDS else type_ for token, type_ in zip(self.tokens, found, strict=True)]

    def special_id(self, role: str) -> int | None:
        """The id of bos, eos, unknown, padding, eot, eom or mask; None where there is none."""
        by_default = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}
        default = by_default[self.kind].get(role, -1)
        found = self.file.integer(f"{_KEY}{role}_token_id", default)
        if not 0 <= found < len(self.tokens):
            found = default  # as llama.cpp does
        return found if 0 <= found < len(self.tokens) else None

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: eos first, then what llama.cpp ends at as well."""
        named = [self.special_id(role) for role in ("eos", "eot", "eom")]
        texts = [self.vocab[token] for token in self.tokens if token in _ENDS]
        return list(dict.fromkeys([*(id_ for id_ in named if id_ is not None), *texts]))

    def adds(self, role: str) -> bool:
        """Whether every text gets bos at its begin or eos at its end."""
        default = role == "bos" and (self.kind == "llama" or self._pre.add_bos)
        return self.file.flag(f"{_KEY}add_{role}_token", default)

    @cached_property
    def _pre(self) -> Any:  # noqa: ANN401 - a PreTokenizer
        key = f"{_KEY}pre"
        if key not in self.file.metadata:
            raise UnsupportedModelError(
                f"{self.file.path} has no {key}, so its token ids cannot be told: convert the model again "
                "with a current llama.cpp."
            )
        return pre_tokenizer(self.file.text(key), str(self.file.path))

    @cached_property
    def content(self) -> bytes:
        """A tokenizer.json.

        Raises:
            UnsupportedModelError, MismatchError: see `read_tokenizer`.
        """
        made = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            **made,
            "post_processor": self._post_processor(),
        }
        content = json.dumps(document, ensure_ascii=False).encode()
        with foreign(
            f"the tokenizer in {self.file.path} cannot be built",
            advice="make the file again.",
            error=MismatchError,
        ):
            parse_tokenizer(content)
        return content

    def _added(self) -> Iterator[Json]:
        name = self.file.text("general.name", "").lower()
        stripped = any(part in name for part in _RIGHT_STRIPPED)
        for id_, (token, type_) in enumerate(zip(self.tokens, self.types, strict=True)):
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED):
                yield {
                    "id": id_,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": stripped and token not in _NOT_STRIPPED,
                    "normalized": False,
                    "special": type_ != USER_DEFINED,
                }

    def _byte_level(self) -> Json:
        pre = self._pre
        return {
            "normalizer": None,
            "pre_tokenizer": pre.to_json("".join(sorted(set(ByteLevel.alphabet()) - self.vocab.keys()))),
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": self._model(list(self._stored_merges()), ignore_merges=pre.ignore_merges),
        }

    def _stored_merges(self) -> Iterator[tuple[str, str]]:
        """Pairs of tokens, the first merge first; what is no pair of tokens of the vocab never merges."""
        seen = set()
        for merge in self.file.texts(f"{_KEY}merges"):
            place = merge.find(" ", 1)  # a token may begin with a space, none has one inside
            pair = (merge[:place], merge[place + 1 :])
            if place < 0 or pair in seen:
                continue
            seen.add(pair)
            if missing := [token for token in (*pair, "".join(pair)) if token not in self.vocab]:
                raise MismatchError(
                    f"{self.file.path} merges {merge[:60]!r}, but {missing[0][:60]!r} is no token: make the "
                    "file again."
                )
            yield pair

    def _model(self, merges: Sequence[tuple[str, str]], **settings: Any) -> Json:  # noqa: ANN401 - JSON values
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **settings,
            "vocab": self.vocab,
            "merges": [list(pair) for pair in merges],
        }

    def _sentencepiece(self) -> Json:
        space = self.file.flag(f"{_KEY}add_space_prefix", True)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepend = [{"type": "Prepend", "prepend": SPACE}] if space else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
        unknown = self.special_id("unknown")
        scores = self.file.numbers(f"{_KEY}scores", len(self.tokens)).astype(np.float32).tolist()
        made = ScoredPieces(self.vocab, self.types, scores, str(self.file.path))
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "pre_tokenizer": made.runs_apart(),
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    *strip,
                ],
            },
            "model": self._model(
                made.merges(),
                byte_fallback=True,
                fuse_unk=True,
                unk_token=None if unknown is None else self.tokens[unknown],
            ),
        }

    def _post_processor(self) -> Json | None:
        begin = [self.special_id("bos")] if self.adds("bos") else []
        end = [self.special_id("eos")] if self.adds("eos") else []
        if None in begin or None in end:
            raise MismatchError(
                f"{self.file.path} adds a token to every text and does not say which: make the file again."
            )
        named = {self.tokens[id_]: id_ for id_ in (*begin, *end) if id_ is not None}
        if not named:
            return None

        def texts(*letters: str) -> list[Json]:
            parts: list[Json] = []
            for place, letter in enumerate(letters):
                parts += [_special(self.tokens[id_], place) for id_ in begin if id_ is not None]
                parts.append({"Sequence": {"id": letter, "type_id": place}})
                parts += [_special(self.tokens[id_], place) for id_ in end if id_ is not None]
            return parts

        special = {token: {"id": token, "ids": [id_], "tokens": [token]} for token, id_ in named.items()}
        return {
            "type": "TemplateProcessing",
            "single": texts("A"),
            "pair": texts("A", "B"),
            "special_tokens": special,
        }

    @property
    def settings(self) -> Json:
        """A tokenizer_config.json."""
        roles = {name: self.special_id(role) for role, name in _ROLES.items()}
        named = {name: self.tokens[id_] for name, id_ in roles.items() if id_ is not None}
        templates = self._templates()
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **named,
            **({"chat_template": templates} if templates else {}),
        }

    def _templates(self) -> str | list[Json]:
        """The chat template, or several by name."""
        named = {"default": self.file.text(_TEMPLATE, "")}
        for name in self.file.metadata.get("tokenizer.chat_templates", ()):  # type: ignore[union-attr]
            named[str(name)] = self.file.text(f"{_TEMPLATE}.{name}", "")
        found = {name: text for name, text in named.items() if text}
        if found.keys() <= {"default"}:
            return found.get("default", "")
        return [{"name": name, "template": text} for name, text in found.items()]


def _special(token: str, place: int) -> Json:
    return {"SpecialToken": {"id": token, "type_id": place}}


def read_tokenizer(file: GgufFile) -> GgufTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        UnsupportedModelError: of a kind, or with a `tokenizer.ggml.pre`, that is not known; by its name.
        MismatchError: metadata is missing or contradicts itself.
    """
    kind = file.text(f"{_KEY}model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{file.path}: tokenizer.ggml.model is {kind[:60]!r}, and trimserve reads gpt2 (byte-level BPE) "
            "and llama (sentencepiece): pass the model that the file was made from."
        )
    return GgufTokenizer(file, kind)
