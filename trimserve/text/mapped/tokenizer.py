"""A tokenizer whose model is mapped: what `tokenizers.Tokenizer` does for the codec, in little memory."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from trimserve.foreign import foreign
from trimserve.text.mapped.spelling import Speller, Spelling
from trimserve.text.mapped.tables import Numbers, Tables
from trimserve.text.mapped.working_set import SmallModel, WorkingSet

# Above every id of a vocab: a Unigram model numbers its pieces itself, and ids of added tokens would be
# among those numbers.
_ADDED = 1 << 24
Json = Any
Input = str | tuple[str, str]


class MappedTokenizer:
    """Encodes and decodes as the tokenizer that its tables were made of does, id for id.

    Normalizer, pre-tokenizer, added tokens, truncation and post-processor are the library's own, and its
    model is one of the library's with the pieces that a text can need (`WorkingSet`). One thread at a time.
    """

    def __init__(self, tables: Tables, full: Callable[[], Tokenizer]) -> None:
        """Make a tokenizer of tables.

        Args:
            tables: mapped.
            full: loads the tokenizer that they were made of, for what needs its whole vocab.
        """
        self._tables, self._full = tables, full
        shell = tables.shell_json()
        self._offset = _ADDED if tables.model["type"] == "Unigram" else 0
        self._added = {token["content"]: int(token["id"]) for token in shell["added_tokens"]}
        self._added_text = {id_: content for content, id_ in self._added.items()}
        self._shell = Tokenizer.from_str(json.dumps(_shifted(shell, self._offset)))
        tokens = self._shell.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in tokens if token.special)
        self._speller: Speller | None = None
        self._split_special = False
        self._shell_json = shell
        self._spelling = Spelling.of(shell, tables.model)
        steps = (self._shell.normalizer, self._shell.pre_tokenizer)
        self._pieces = WorkingSet(tables, self._spelling, self._make_speller, steps)
        self._use(self._pieces.model)

    def encode_batch_fast(self, texts: Sequence[Input], *, add_special_tokens: bool = True) -> list[Any]:
        """Encode texts or pairs of texts, without offsets."""
        return self._encode(list(texts), self._shell.encode_batch_fast, add_special_tokens)

    def encode_batch(self, texts: Sequence[Input], *, add_special_tokens: bool = True) -> list[Any]:
        """Encode texts or pairs of texts."""
        return self._encode(list(texts), self._shell.encode_batch, add_special_tokens)

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Any:  # noqa: ANN401
        """Encode a text, or two."""
        (encoding,) = self.encode_batch(
            [text if pair is None else (text, pair)], add_special_tokens=add_special_tokens
        )
        return encoding

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token are left out."""
        special = self._special if skip_special_tokens else frozenset()
        tokens = (self.id_to_token(id_) for id_ in ids)
        visible = [token for token in tokens if token is not None and token not in special]
        return " ".join(visible) if self.decoder is None else str(self.decoder.decode(visible))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token."""
        if token in self._added:
            return self._added[token]
        number = self._tables.trie.find(token)
        return None if number is None else int(self._tables.ids[number])

    def id_to_token(self, id_: int) -> str | None:
        """The token of an id."""
        if id_ in self._added_text:
            return str(self._added_text[id_])
        number = self._tables.number(id_)
        return None if number is None else self._tables.piece(number)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by their ids."""
        found = self._shell.get_added_tokens_decoder().items()
        return {id_ - self._offset: token for id_, token in found}

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """How many tokens the post-processor adds."""
        return int(self._shell.num_special_tokens_to_add(is_pair))

    def enable_truncation(self, max_length: int, **options: Any) -> None:  # noqa: ANN401
        """Cut texts, as the library does."""
        self._shell.enable_truncation(max_length, **options)

    def no_truncation(self) -> None:
        """Cut texts no more."""
        self._shell.no_truncation()

    def to_str(self) -> str:
        """The whole tokenizer as JSON; loads it."""
        return str(self._full().to_str())

    @property
    def encode_special_tokens(self) -> bool:
        """Whether special tokens in a text are text."""
        return bool(self._shell.encode_special_tokens)

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        self._shell.encode_special_tokens = self._split_special = value
        if self._speller is not None:
            self._speller.tokenizer.encode_special_tokens = value

    @property
    def model(self) -> Any:  # noqa: ANN401
        """The model with the pieces met so far."""
        return self._shell.model

    @property
    def normalizer(self) -> Any:  # noqa: ANN401
        """The library's normalizer."""
        return self._shell.normalizer

    @property
    def pre_tokenizer(self) -> Any:  # noqa: ANN401
        """The library's pre-tokenizer."""
        return self._shell.pre_tokenizer

    @property
    def decoder(self) -> Any:  # noqa: ANN401
        """The library's decoder."""
        return self._shell.decoder

    def _encode(self, texts: list[Input], encode: Callable[..., list[Any]], special: bool) -> list[Any]:
        encodings: list[Any] = []
        for part, small in self._covered(texts):
            self._use(small)
            found = encode(part, add_special_tokens=special)
            encodings += found if small.ids is None else (_Renumbered(one, small.ids) for one in found)
        return encodings

    def _covered(self, texts: list[Input]) -> Iterator[tuple[list[Input], SmallModel]]:
        """Parts of a batch, each with a model that has all pieces of it."""
        flat = [part for text in texts for part in (text if isinstance(text, tuple) else (text,))]
        with foreign("the tables of the tokenizer cannot be used", advice="export the folder again."):
            small = self._pieces.cover(flat, at_any_size=len(texts) == 1)
        if small is not None:
            yield texts, small
            return
        half = len(texts) // 2
        yield from self._covered(texts[:half])
        yield from self._covered(texts[half:])

    def _use(self, small: SmallModel) -> None:
        if small is not getattr(self, "_small", None):
            self._shell.model = small.model
            self._small = small

    def _make_speller(self) -> Speller:
        self._speller = Speller(self._shell_json)
        self._speller.tokenizer.encode_special_tokens = self._split_special
        return self._speller


class _Renumbered:
    """An encoding with the ids of the whole vocab; all else is the library's."""

    __slots__ = ("_encoding", "_ids")

    def __init__(self, encoding: Encoding, ids: Numbers) -> None:
        self._encoding, self._ids = encoding, ids

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        found = np.array(self._encoding.ids, np.int64)
        added = found >= _ADDED
        listed: list[int] = np.where(added, found - _ADDED, self._ids[np.where(added, 0, found)]).tolist()
        return listed

    @property
    def overflowing(self) -> "list[_Renumbered]":
        """What truncation cut off."""
        return [_Renumbered(part, self._ids) for part in self._encoding.overflowing]

    def __len__(self) -> int:
        return len(self._encoding)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._encoding, name)


def _shifted(shell: Json, offset: int) -> Json:
    """A tokenizer.json around a model of the added tokens alone, with their ids moved by an offset."""
    shifted = copy.deepcopy(shell)
    for token in shifted["added_tokens"]:
        token["id"] += offset
    vocab = {token["content"]: token["id"] for token in shifted["added_tokens"]}
    # The library gives an added token the id that it has in the model.
    shifted["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
    _shift_processor(shifted.get("post_processor"), offset)
    return shifted


def _shift_processor(processor: Json, offset: int) -> None:
    if processor is None:
        return
    for nested in processor.get("processors", ()):
        _shift_processor(nested, offset)
    special = processor.get("special_tokens") or {}
    for entry in special.values():  # TemplateProcessing
        entry["ids"] = [id_ + offset for id_ in entry["ids"]]
    for key in ("cls", "sep"):  # BertProcessing, RobertaProcessing: [token, id]
        if key in processor:
            processor[key][1] += offset
