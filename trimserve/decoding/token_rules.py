"""What a model's generation config forces and forbids: language codes first, ends, words never to be said.

The names and meanings are those of transformers' GenerationConfig and of the processors it makes of
them (transformers/generation/logits_process.py). All ids are token ids.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from trimserve.arrays import Ids

_NO_IDS: Ids = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one step.

    Attributes:
        forced: if not empty, these ids alone are allowed, and the model is not asked.
        banned: ids that are not allowed.
    """

    forced: Ids
    banned: Ids


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Rules that need nothing but the ids so far.

    Attributes:
        forced_bos_token_id: the first token after a prompt of one token, as an encoder-decoder's is.
        forced_eos_token_id: the tokens allowed at the last step.
        suppress_tokens: never allowed.
        begin_suppress_tokens: not allowed as the first token (the second if the first is forced).
        bad_words_ids: sequences that may not be completed.
        no_repeat_ngram_size: no run of so many tokens may come twice in prompt and output; 0 is off.
        encoder_no_repeat_ngram_size: no such run of the text that was given may come in the output; 0 is off.
        min_length: prompt and output have at least so many tokens before an end is allowed.
        min_new_tokens: the output has at least so many.
        eos_token_id: the ends that the two above speak of.
        max_new_tokens: the step of this number is the last.
        words_from_start: a word may begin with the very first token (transformers 5), or after it (4).
    """

    forced_bos_token_id: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    eos_token_id: tuple[int, ...] = ()
    max_new_tokens: int = 0
    words_from_start: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], max_new_tokens: int, *, words_from_start: bool = False
    ) -> Self:
        """Read the rules of a generation config.

        Args:
            config: the model's generation_config.json, or its config.json where it has none.
            max_new_tokens: the most tokens that will be generated.
            words_from_start: see above.
        """
        ids = {name: as_ids(config.get(name)) for name in _ID_RULES}
        numbers = {name: int(config.get(name) or 0) for name in _NUMBER_RULES}
        if config.get("min_new_tokens") is not None:
            numbers["min_length"] = 0  # as in transformers, the number of new tokens takes its place
        words = (as_ids(word) for word in config.get("bad_words_ids") or ())
        ends = [(end,) for end in ids["eos_token_id"]]
        bad_words = tuple(word for word in words if word and word not in ends)
        values: dict[str, Any] = ids | numbers
        return cls(
            **values,
            bad_words_ids=bad_words,
            max_new_tokens=max_new_tokens,
            words_from_start=words_from_start,
        )

    def __bool__(self) -> bool:
        """Whether there is any rule."""
        limits = self.eos_token_id and (self.min_length or self.min_new_tokens)
        ids = self.forced_bos_token_id or self.forced_eos_token_id or self.suppress_tokens
        runs = self.no_repeat_ngram_size or self.encoder_no_repeat_ngram_size
        return bool(ids or self.begin_suppress_tokens or self.bad_words_ids or runs or limits)

    def at(self, prompt: Ids, output: Ids, source: Ids | None = None) -> Verdict:
        """The rules' verdict on the step after these tokens.

        Args:
            prompt: what generation started from, int32; for an encoder-decoder what its decoder starts with.
            output: generated so far, int32.
            source: of an encoder-decoder the text that its encoder reads.
        """
        if self.forced_bos_token_id and prompt.size + output.size == 1:
            return Verdict(_ids(self.forced_bos_token_id), _NO_IDS)
        if self.forced_eos_token_id and output.size == self.max_new_tokens - 1:
            return Verdict(_ids(self.forced_eos_token_id), _NO_IDS)
        given = prompt if source is None else source
        return Verdict(_NO_IDS, np.unique(np.fromiter(self._banned(prompt, output, given), np.int32)))

    def _banned(self, prompt: Ids, output: Ids, given: Ids) -> Iterator[int]:
        yield from self.suppress_tokens
        first = 1 if self.forced_bos_token_id and prompt.size == 1 else 0
        if output.size == first:
            yield from self.begin_suppress_tokens
        length = prompt.size + output.size
        if length < self.min_length or output.size < self.min_new_tokens:
            yield from self.eos_token_id
        if self.bad_words_ids or self.no_repeat_ngram_size or self.encoder_no_repeat_ngram_size:
            ids = np.concatenate([prompt, output])
            for word in self.bad_words_ids:
                if completes(word, ids, from_start=self.words_from_start):
                    yield word[-1]
            yield from _repeats(ids, ids, self.no_repeat_ngram_size)
            yield from _repeats(given, ids, self.encoder_no_repeat_ngram_size)


def completes(word: tuple[int, ...], ids: Ids, *, from_start: bool) -> bool:
    """Whether the last of a word's ids would complete it after these ids.

    Args:
        word: one id or more.
        ids: so far, int32 (T,).
        from_start: whether the word may begin at the first of them.
    """
    before = len(word) - 1
    if before == 0:
        return True
    enough = ids.size >= before if from_start else ids.size > before
    return enough and tuple(ids[-before:].tolist()) == word[:-1]


def _repeats(given: Ids, ids: Ids, size: int) -> list[int]:
    """Tokens that after `ids` would end a run of `size` tokens that stands in `given`."""
    if not size or given.size < size or ids.size < size - 1:
        return []
    runs = np.lib.stride_tricks.sliding_window_view(given, size)
    begun = (runs[:, :-1] == ids[ids.size - size + 1 :]).all(axis=1)
    ends: list[int] = runs[begun, -1].tolist()
    return ends


_NUMBER_RULES = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens")
_ID_RULES = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "eos_token_id",
)


def _ids(values: tuple[int, ...]) -> Ids:
    return np.array(values, np.int32)


def as_ids(value: object) -> tuple[int, ...]:
    """The token ids of a config entry, which is an int, a list of them, or nothing."""
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(entry for entry in value if isinstance(entry, int))
    return ()
