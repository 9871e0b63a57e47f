"""Text to compact ids and back, through the original tokenizer, which is never cut.

Segmentation is that of the full model. An id without a compact row takes a cold slot, or, in a folder
without cold rows, is split into kept pieces (`trimserve.text.fallback`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from trimserve.arrays import Ids
from trimserve.concurrency import Lock, Once
from trimserve.errors import MismatchError, UnknownIdError, UsageError
from trimserve.folder.names import TOKENIZER_TABLES_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.foreign import foreign
from trimserve.text.batching import Encoded, Joined, Servable, SlottedBatch, join
from trimserve.text.cleanup import clean_up
from trimserve.text.fallback import Fallback
from trimserve.text.mapped.tables import Tables
from trimserve.text.mapped.tokenizer import MappedTokenizer
from trimserve.text.streaming import StreamDecoder
from trimserve.text.tokenizer import parse_tokenizer, special_ids, tokenizer_border

_AGAIN = "export the folder again."
_BATCH = 1024  # texts that the tokenizer takes at a time; it works on them in parallel
# A text, or two that a model reads together.
Text = str | tuple[str, str]


class Codec:
    """The original tokenizer of a folder and the way from its token ids to the graph's inputs.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`, or one that does the same with a mapped model; padding and
            truncation of its file are off.
        vocab: the folder's VocabMap.
        special_ids: token ids that decoding leaves out.
    """

    @tokenizer_border
    def __init__(self, folder: TrimmedFolder, *, mapped: bool = False) -> None:
        """Load the tokenizer.

        Args:
            folder: a trimmed folder.
            mapped: use the tables of the tokenizer's model where they are mapped, if the folder has some:
                little private memory, and new words take longer.

        Raises:
            MismatchError: the tokenizer or the vocab belongs to another model.
        """
        self._folder = folder
        self._mapped = mapped and TOKENIZER_TABLES_NAME in folder.manifest.files
        self.vocab = folder.vocab
        _check_hashes(folder)
        self._settings = folder.tokenizer_settings
        self.tokenizer = self._load()
        self.special_ids = special_ids(self.tokenizer)
        self._limit: int | None = None
        # Truncation is state of the tokenizer object.
        self._lock = Lock()
        self._fallback: Once[Fallback] = Once()

    @cached_property
    def pad_id(self) -> int:
        """Token id that fills up a batch: the model's own, because some count positions from it."""
        config = self._folder.read_json("config.json")
        named = self._named_token("pad_token")
        candidates = (
            config.get("pad_token_id"),
            (config.get("text_config") or {}).get("pad_token_id"),
            self.tokenizer.token_to_id(named) if named else None,
            config.get("eos_token_id"),
            int(self.vocab.kept_ids[0]),
        )
        usable = (int(id_) for id_ in candidates if isinstance(id_, int) and self._is_kept(id_))
        return next(usable)

    @cached_property
    def mask_id(self) -> int:
        """Token id of the tokenizer's mask.

        Raises:
            UsageError: it has none.
        """
        named = self._named_token("mask_token")
        found = (self.tokenizer.token_to_id(token) for token in (named, "[MASK]", "<mask>") if token)
        mask_id = next((id_ for id_ in found if id_ is not None), None)
        if mask_id is None:
            raise UsageError(f"the tokenizer of {self._folder.path} has no mask token: it cannot fill masks.")
        return int(mask_id)

    def encode(
        self, texts: Sequence[Text], *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[Ids]:
        """Encode texts to token ids, int32 (T,) each. See `encode_typed`."""
        encoded = self.encode_typed(texts, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        return [text.ids for text in encoded]

    @tokenizer_border
    def encode_typed(
        self, texts: Sequence[Text], *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[Encoded]:
        """Encode texts with the original tokenizer.

        Args:
            texts: any number of texts of any length, or of pairs of texts.
            add_special_tokens: what the tokenizer's post-processor adds (cls, sep, bos).
            max_tokens: longest sequence, special tokens included; a longer text loses tokens at its end
                (at its start where the tokenizer's truncation side is "left"), of a pair the longer text
                first.

        Raises:
            UsageError: a text is not a string, or `max_tokens` leaves no room for the special tokens.
            UnknownIdError: the tokenizer gives an id that the model has no row for.
        """
        _check_texts(texts)
        encoded: list[Encoded] = []
        with self._lock:
            self._mend()
            pairs = any(isinstance(text, tuple) for text in texts)
            self._truncate(max_tokens, add_special_tokens, pairs=pairs)
            for start in range(0, len(texts), _BATCH):
                part = list(texts[start : start + _BATCH])
                encodings = self.tokenizer.encode_batch_fast(part, add_special_tokens=add_special_tokens)
                encoded += map(as_encoded, encodings)
        self._check_rows(texts, encoded)
        return encoded

    def encode_fed(
        self, texts: Sequence[Text], *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> tuple[list[Encoded], int]:
        """Encode texts as a graph is fed with them; see `encode_typed` and `as_fed`."""
        encoded = self.encode_typed(texts, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        return self.as_fed(encoded, max_tokens)

    def as_fed(self, encoded: list[Encoded], max_tokens: int | None) -> tuple[list[Encoded], int]:
        """Split the cold tokens of a folder without cold rows, cut what has become too long, count them."""
        if self._folder.has_cold:
            return encoded, 0
        servable = self.servable([entry.ids for entry in encoded])
        parts = zip(encoded, servable.sequences, servable.repeats, strict=True)
        fed = [
            self._cut(Encoded(ids, np.repeat(entry.type_ids, repeats), entry.truncated), max_tokens)
            for entry, ids, repeats in parts
        ]
        return fed, servable.cold_tokens

    def _cut(self, encoded: Encoded, max_tokens: int | None) -> Encoded:
        """Cut tokens from the end of the text, not the special ones behind it."""
        ids = encoded.ids
        if max_tokens is None or len(ids) <= max_tokens:
            return encoded
        ordinary = np.flatnonzero(~np.isin(ids, list(self.special_ids)))
        tail = len(ids) - 1 - int(ordinary[-1])
        stay = np.r_[0 : max_tokens - tail, len(ids) - tail : len(ids)]
        return Encoded(ids[stay], encoded.type_ids[stay], truncated=True)

    @tokenizer_border
    def decode(self, ids: npt.ArrayLike, *, skip_special_tokens: bool = True) -> str:
        """Decode token ids to text, by default without special tokens."""
        listed = np.asarray(ids, np.int64).ravel().tolist()
        text: str = self.tokenizer.decode(listed, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self._settings["clean_up"] else text

    def token_text(self, id_: int) -> str:
        """The text of one token, also of a special one."""
        return self.decode([id_], skip_special_tokens=False)

    def stream(self) -> StreamDecoder:
        """Start decoding a stream of token ids; the pieces add up to what `decode` gives."""
        return StreamDecoder(self.tokenizer, clean=bool(self._settings["clean_up"]))

    @tokenizer_border
    def servable(self, sequences: Sequence[Ids]) -> Servable:
        """Make every id one that the folder has a row for.

        Where the folder has cold rows nothing needs to be done. Without them, cold tokens are split into
        kept pieces, and the sequences get longer.

        Raises:
            UnknownIdError: a cold token cannot be split; the message names it and the text.
        """
        cold = [~self.vocab.is_kept(ids) for ids in sequences]
        count = sum(int(mask.sum()) for mask in cold)
        if count == 0 or self._folder.has_cold:
            return Servable(sequences, [np.ones(len(ids), np.int64) for ids in sequences], count)
        split = [self._split(ids, mask) for ids, mask in zip(sequences, cold, strict=True)]
        return Servable([ids for ids, _ in split], [repeats for _, repeats in split], count)

    def slots(self, sequences: Sequence[Ids]) -> SlottedBatch:
        """Turn token ids into the graph's `input_ids` and `attention_mask`, padded on the right.

        Args:
            sequences: token ids (T,) each, of any lengths.

        Raises:
            UnknownIdError: an id is outside 0..V-1, or see `servable`.
        """
        split = 0
        if not self._folder.has_cold:
            servable = self.servable(sequences)
            sequences, split = servable.sequences, servable.cold_tokens
        # Translated before it is padded: a batch of unequal texts is mostly padding.
        joined = join(sequences)
        slotted = self.vocab.with_slots(joined.ids)
        pad = int(self.vocab.to_compact(self.pad_id))
        ids, mask = Joined(slotted.ids, joined.lengths).padded(pad)
        return SlottedBatch(ids, mask, slotted.cold_ids, slotted.cold_tokens + split)

    def drop_pages(self) -> None:
        """Give back the pages of the tokenizer's tables that were read, where they are mapped."""
        if self._mapped:
            self._folder.opened(TOKENIZER_TABLES_NAME).drop_pages()

    @contextmanager
    def lent(self) -> Iterator[Tokenizer]:
        """Lend the tokenizer to one caller, who may change its truncation."""
        with self._lock:
            self._mend()
            try:
                self.tokenizer.no_truncation()
                yield self.tokenizer
            finally:
                self._limit = None
                self.tokenizer.no_truncation()

    def named_id(self, role: str, *usual: str) -> int | None:
        """The id of the token that has a role in tokenizer_config.json, else of the first usual one."""
        found = (self.tokenizer.token_to_id(token) for token in (self._named_token(role), *usual) if token)
        return next((int(token_id) for token_id in found if token_id is not None), None)

    @property
    def truncation_side(self) -> str:
        """Where a text that is too long loses tokens: right or left."""
        return self._truncation_side

    def _named_token(self, role: str) -> str | None:
        token: str | None = self._settings["special_tokens"].get(role)
        return token

    def _split(self, ids: Ids, cold: npt.NDArray[np.bool_]) -> tuple[Ids, npt.NDArray[np.int64]]:
        if not cold.any():
            return ids, np.ones(len(ids), np.int64)
        try:
            return self._fallback.get(lambda: Fallback(self.tokenizer, self.vocab)).split(ids, cold)
        except UnknownIdError as error:
            raise UnknownIdError(f"text {shorten(self.decode(ids))}: {error}") from error

    def _is_kept(self, id_: int) -> bool:
        return 0 <= id_ < self.vocab.vocab_size and bool(self.vocab.is_kept(id_))

    def _mend(self) -> None:
        """Replace the tokenizer in a forked child, where another thread was using it at the fork.

        Within the library it counts as used from then on, and refuses to be changed or waits for ever.
        """
        if self._lock.lost:
            self.tokenizer = self._load()
            self._limit = None
            self._lock.lost = False

    def _load(self) -> Tokenizer:
        if self._mapped:
            tables = Tables.read(self._folder.opened(TOKENIZER_TABLES_NAME))
            _check_hash(self._folder, TOKENIZER_TABLES_NAME, tables.tokenizer_sha256)
            with foreign(f"{self._folder.path / TOKENIZER_TABLES_NAME} cannot be used", advice=_AGAIN):
                tokenizer = cast(Tokenizer, MappedTokenizer(tables, self._load_whole))  # does what it does
        else:
            tokenizer = self._load_whole()
        tokenizer.encode_special_tokens = bool(self._settings.get("split_special_tokens"))
        return tokenizer

    def _load_whole(self) -> Tokenizer:
        file = self._folder.opened(self._folder.tokenizer_name)
        return parse_tokenizer(file.read(), str(file.path))

    def _truncate(self, max_tokens: int | None, add_special_tokens: bool, *, pairs: bool) -> None:
        added = self.tokenizer.num_special_tokens_to_add(pairs) if add_special_tokens else 0
        # The library takes a limit below the number of special tokens for no limit.
        if max_tokens is not None and max_tokens < max(added, 1):
            raise UsageError(
                f"max_tokens is {max_tokens} but the special tokens alone take {added}: raise it."
            )
        if max_tokens == self._limit:
            return
        if max_tokens is None:
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(max_tokens, direction=self._truncation_side)
        self._limit = max_tokens

    @cached_property
    def _truncation_side(self) -> str:
        side: str = self._settings["truncation_side"]
        return side

    def _check_rows(self, texts: Sequence[Text], encoded: Iterable[Encoded]) -> None:
        size = self.vocab.vocab_size
        for text, entry in zip(texts, encoded, strict=True):
            if entry.ids.size and int(entry.ids.max()) >= size:
                id_ = int(entry.ids[entry.ids >= size][0])
                raise UnknownIdError(
                    f"text {shorten(text)}: its token {self.tokenizer.id_to_token(id_)!r} has id {id_:,} but "
                    f"the model has {size:,} rows. Take the token out of the text."
                )


def shorten(text: Text, length: int = 48) -> str:
    """Quote a text for a message, cut to `length` characters."""
    if isinstance(text, tuple):
        return " and ".join(shorten(part, length // 2) for part in text)
    return repr(text) if len(text) <= length else repr(text[: length - 1] + "…")


def as_encoded(encoding: Encoding) -> Encoded:
    """The part of the tokenizer's answer that is fed."""
    ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
    return Encoded(ids, types, bool(encoding.overflowing))


def _check_texts(texts: Sequence[Text]) -> None:
    if isinstance(texts, str):
        raise UsageError("expected a list of texts, found one string: pass [text].")
    for text in chain.from_iterable(text if isinstance(text, tuple) else (text,) for text in texts):
        if not isinstance(text, str):
            raise UsageError(f"expected a text, found {type(text).__name__}: pass strings.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"text {shorten(text)} holds half a surrogate pair, which is no character: clean the text."
            ) from error


def _check_hashes(folder: TrimmedFolder) -> None:
    name = folder.tokenizer_name
    _check_hash(folder, name, folder.manifest.files[name].sha256)
    if folder.vocab.tokenizer_sha256:
        _check_hash(folder, "the vocab", folder.vocab.tokenizer_sha256)


def _check_hash(folder: TrimmedFolder, name: str, digest: str) -> None:
    expected = folder.manifest.tokenizer_sha256
    if digest != expected:
        raise MismatchError(
            f"{folder.path} was made for the tokenizer {expected[:12]}…, but {name} belongs to "
            f"{digest[:12]}…: export the folder again."
        )
