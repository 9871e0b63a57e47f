"""A cut tokenizer as a GGUF file's metadata: tokens, their types, merges or scores, special ids, template."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.model_json import read_model_json
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.model.gguf.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ScoredPieces,
)
from trimserve.model.source import ModelSource
from trimserve.text.chat import chat_templates
from trimserve_export.layouts.closure import merge_pairs
from trimserve_export.to_gguf.pre_name import PROBES, find_pre

logger = logging.getLogger(__name__)

KEY: Final = "tokenizer.ggml."
TEMPLATE: Final = "tokenizer.chat_template"
TEMPLATES: Final = "tokenizer.chat_templates"
_ROLES: Final = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "mask": "mask_token",
}
# Where llama.cpp ends an answer, beside its own list of texts.
_ENDS: Final = ("eos", "eot", "eom")
_INSTEAD: Final = "use --to safetensors, or another layout."
Json = dict[str, Any]


@dataclass(frozen=True)
class CutVocab:
    """A cut tokenizer, and the source that it was cut from.

    Attributes:
        source: the model.
        folder: with the cut tokenizer's files and the compact configs.
    """

    source: ModelSource
    folder: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The cut tokenizer."""
        return ModelSource(str(self.folder), None, self.folder).tokenizer()

    @cached_property
    def document(self) -> Json:
        """Its tokenizer.json."""
        found: Json = json.loads((self.folder / TOKENIZER_NAME).read_bytes())
        return found

    @cached_property
    def tokens(self) -> list[str]:
        """Its tokens by compact id; those that no text makes have a name for each place."""
        by_id = {id_: token for token, id_ in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        return [by_id[id_] for id_ in range(len(by_id))]

    def metadata(self) -> dict[str, object]:
        """Everything about it that llama.cpp needs.

        Raises:
            UnsupportedModelError: llama.cpp could not give its ids; the message says why.
        """
        model = self.document["model"]
        if model["type"] != "BPE":
            raise UnsupportedModelError(
                f"{self.source.name} has a tokenizer of type {model['type']}, and --to gguf writes BPE: "
                f"{_INSTEAD}"
            )
        self._check_normalizer()
        merges = list(merge_pairs(model))
        if model.get("byte_fallback"):
            own = self._sentencepiece(merges)
        else:
            pre = find_pre(json.loads(self.source.effective.content), self.source.name)
            own = {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}
        types = np.array([self._type_of(id_) for id_ in range(len(self.tokens))], np.int32)
        facts = own | {"tokens": self.tokens, "token_type": types} | self._additions() | self._special_ids()
        return {f"{KEY}{name}": value for name, value in facts.items()} | self._templates()

    def _check_normalizer(self) -> None:
        """Refuse what changes a text before it is parted, but for NFC and what llama.cpp does, too."""
        normalizer = self.document.get("normalizer") or {"type": "Sequence", "normalizers": []}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        known = ("NFC", "Prepend", "Replace")
        if others := [step["type"] for step in steps if step["type"] not in known]:
            raise UnsupportedModelError(
                f"{self.source.name} has a tokenizer that changes texts by {others[0]}, which llama.cpp does "
                f"not: {_INSTEAD}"
            )
        if "NFC" in (step["type"] for step in steps):
            logger.warning("llama.cpp does not normalise texts (NFC): decomposed letters get other token ids")

    @cached_property
    def _added(self) -> dict[int, Json]:
        return {token["id"]: token for token in self.document["added_tokens"]}

    def _type_of(self, id_: int) -> int:
        token, byte_fallback = self.tokens[id_], self.document["model"].get("byte_fallback")
        if byte_fallback and token == self.document["model"].get("unk_token"):
            return UNKNOWN
        if id_ in self._added:
            return CONTROL if self._added[id_]["special"] else USER_DEFINED
        return BYTE if byte_fallback and len(token) == 6 and token.startswith("<0x") else NORMAL

    def _sentencepiece(self, merges: Sequence[tuple[str, str]]) -> Json:
        """Scores whose order is that of the merges: llama.cpp knows no merges, and makes what scores highest.

        Raises:
            UnsupportedModelError: no scores stand for these merges.
        """
        products = [token for token, _ in groupby(first + second for first, second in merges)]
        ranks = {token: rank for rank, token in enumerate(products)}
        scores = [-float(ranks.get(token, len(ranks))) for token in self.tokens]
        vocab = {token: id_ for id_, token in enumerate(self.tokens)}
        types = [self._type_of(id_) for id_ in range(len(self.tokens))]
        implied = ScoredPieces(vocab, types, scores, self.source.name).merges()
        if len(ranks) < len(products) or set(implied) != set(merges):
            example = next(iter({*implied} ^ {*merges}), products[0])
            raise UnsupportedModelError(
                f"{self.source.name} has merges that no scores of tokens stand for ({example!r}), and "
                f"llama.cpp knows such a tokenizer by its scores alone: {_INSTEAD}"
            )
        space = self.tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
        return {
            "model": "llama",
            "pre": "default",
            "scores": np.array(scores, np.float32),
            "add_space_prefix": space,
        }

    def _additions(self) -> Json:
        """Whether every text gets bos at its begin and eos at its end.

        Raises:
            UnsupportedModelError: it gets anything else.
        """
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a").ids
        bos, eos = self._role("bos"), self._role("eos")
        for begin in ([], [bos]):
            for end in ([], [eos]):
                if whole == [*begin, *bare, *end]:
                    return {"add_bos_token": bool(begin), "add_eos_token": bool(end)}
        raise UnsupportedModelError(
            f"{self.source.name} puts more around a text than bos and eos, which llama.cpp does not: "
            f"{_INSTEAD}"
        )

    def _role(self, role: str) -> int | None:
        token = self.source.tokenizer_settings["special_tokens"].get(_ROLES[role])
        return None if token is None else self.tokenizer.token_to_id(token)

    def _special_ids(self) -> Json:
        found = {role: self._role(role) for role in _ROLES}
        ends = list(self.end_ids())
        if ends and found["eos"] not in ends:
            found["eos"] = ends[0]
        others = [id_ for id_ in ends if id_ != found["eos"]]
        found |= dict(zip(_ENDS[1:], others, strict=False))
        return {f"{role}_token_id": id_ for role, id_ in found.items() if id_ is not None}

    def end_ids(self) -> Iterator[int]:
        """The compact ids that end an answer, as the folder's configs say it."""
        for name in ("generation_config.json", "config.json"):
            stated = read_model_json(self.folder / name).get("eos_token_id")
            ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
            if ids:
                yield from dict.fromkeys(ids)
                return

    def _templates(self) -> Json:
        named = chat_templates(self.source)
        found: Json = {f"{TEMPLATE}.{name}": text for name, text in named.items() if name != "default"}
        if found:
            found[TEMPLATES] = sorted(name for name in named if name != "default")
        return found | ({TEMPLATE: named["default"]} if "default" in named else {})

    def check_ids(self, written: Tokenizer) -> None:
        """Compare the ids that llama.cpp will give with the cut tokenizer's, on texts and every added token.

        Args:
            written: what was read of the file again.

        Raises:
            UnsupportedModelError: they are not the same.
        """
        names = [token["content"] for token in self._added.values()]
        for text in (
            *PROBES,
            *(part for name in names for part in (f"a{name}b", f"a {name} b", f"{name}{name}")),
        ):
            if written.encode(text).ids != self.tokenizer.encode(text).ids:
                raise UnsupportedModelError(
                    f"llama.cpp would give other token ids for {text[:60]!r} than the tokenizer of "
                    f"{self.source.name}: {_INSTEAD}"
                )


def cut_metadata(source: ModelSource, cut: CutVocab, kept: Ids) -> dict[str, object]:
    """What of a GGUF file's tokenizer changes when it is cut: the keys with a value, None for those that go.

    Args:
        source: the model in a GGUF file.
        cut: its cut tokenizer.
        kept: the kept token ids (K,).

    Raises:
        MismatchError: a list in the file has another length than its vocab.
        UnsupportedModelError: a list that is not known.
    """
    if source.gguf is None:
        raise MismatchError(f"{source.name} is no GGUF file.")
    file, compact = source.gguf.file, {id_: place for place, id_ in enumerate(kept.tolist())}
    found: dict[str, object] = {f"{KEY}tokens": cut.tokens}
    for key, value in file.metadata.items():
        if not key.startswith(KEY) or key in found:
            continue
        if key.endswith("_token_id") and isinstance(value, int):
            found[key] = compact.get(value)
        elif key == f"{KEY}merges":
            found[key] = [" ".join(pair) for pair in merge_pairs(cut.document["model"])]
        elif key in (f"{KEY}token_type", f"{KEY}scores"):
            kind: npt.DTypeLike = np.float32 if key.endswith("scores") else np.int32
            found[key] = file.numbers(key, len(file.texts(f"{KEY}tokens")))[kept].astype(kind)
        elif isinstance(value, np.ndarray | list) and key != f"{KEY}precompiled_charsmap":
            raise UnsupportedModelError(
                f"{file.path} has the list {key[:60]!r}, of which it is not known how it is cut: pass the "
                "model that the file was made from."
            )
    return found | {"tokenizer.huggingface.json": None} | _named_ids(source.read_json("config.json"), compact)


def _named_ids(config: Mapping[str, Any], compact: Mapping[int, int]) -> dict[str, object]:
    """Bos and eos by their compact ids, where llama.cpp would else take the ones that it has by default."""
    ends = config.get("eos_token_id")
    ids = {"bos": config.get("bos_token_id"), "eos": ends[0] if isinstance(ends, list) else ends}
    return {
        f"{KEY}{role}_token_id": compact[id_]
        for role, id_ in ids.items()
        if isinstance(id_, int) and id_ in compact
    }
