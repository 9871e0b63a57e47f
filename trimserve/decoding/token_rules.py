"""What a model's generation config forces and forbids: language codes first, ends, words never to be said.

The names and meanings are those of transformers 4.57's GenerationConfig and of the processors it makes of
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
        min_length: prompt and output have at least so many tokens before an end is allowed.
        min_new_tokens: the output has at least so many.
        eos_token_id: the ends that the two above speak of.
        max_new_tokens: the step of this number is the last.
    """

    forced_bos_token_id: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    eos_token_id: tuple[int, ...] = ()
    max_new_tokens: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], max_new_tokens: int) -> Self:
        """Read the rules of a generation config.

        Args:
            config: the model's generation_config.json, or its config.json where it has none.
            max_new_tokens: the most tokens that will be generated.
        """
        ids = {name: as_ids(config.get(name)) for name in _ID_RULES}
        numbers = {name: int(config.get(name) or 0) for name in _NUMBER_RULES}
        words = (as_ids(word) for word in config.get("bad_words_ids") or ())
        ends = [(end,) for end in ids["eos_token_id"]]
        bad_words = tuple(word for word in words if word and word not in ends)
        values: dict[str, Any] = ids | numbers
        return cls(**values, bad_words_ids=bad_words, max_new_tokens=max_new_tokens)

    def __bool__(self) -> bool:
        """Whether there is any rule."""
        limits = self.eos_token_id and (self.min_length or self.min_new_tokens)
        ids = self.forced_bos_token_id or self.forced_eos_token_id or self.suppress_tokens
        return bool(
            ids or self.begin_suppress_tokens or self.bad_words_ids or self.no_repeat_ngram_size or limits
        )

    def at(self, prompt: Ids, output: Ids) -> Verdict:
        """The rules' verdict on the step after these tokens.

        Args:
            prompt: what generation started from, int32; for an encoder-decoder what its decoder starts with.
            output: generated so far, int32.
        """
        if self.forced_bos_token_id and prompt.size + output.size == 1:
            return Verdict(_ids(self.forced_bos_token_id), _NO_IDS)
        if self.forced_eos_token_id and output.size == self.max_new_tokens - 1:
            return Verdict(_ids(self.forced_eos_token_id), _NO_IDS)
        return Verdict(_NO_IDS, np.unique(np.fromiter(self._banned(prompt, output), np.int32)))

    def _banned(self, prompt: Ids, output: Ids) -> Iterator[int]:
        yield from self.suppress_tokens
        first = 1 if self.forced_bos_token_id and prompt.size == 1 else 0
        if output.size == first:
            yield from self.begin_suppress_tokens
        length = prompt.size + output.size
        if length < self.min_length or output.size < self.min_new_tokens:
            yield from self.eos_token_id
        if self.bad_words_ids or self.no_repeat_ngram_size:
            ids = np.concatenate([prompt, output])
            yield from self._completed_words(ids)
            yield from self._repeats(ids)

    def _completed_words(self, ids: Ids) -> Iterator[int]:
        for word in self.bad_words_ids:
            before = len(word) - 1
            # transformers looks at a longer word only once there are as many tokens as it has.
            if before == 0 or (len(word) <= ids.size and tuple(ids[-before:].tolist()) == word[:-1]):
                yield word[-1]

    def _repeats(self, ids: Ids) -> list[int]:
        """Tokens that would end a run of `no_repeat_ngram_size` for the second time."""
        size = self.no_repeat_ngram_size
        if not size or ids.size < size:
            return []
        runs = np.lib.stride_tricks.sliding_window_view(ids, size)
        begun = (runs[:, :-1] == ids[ids.size - size + 1 :]).all(axis=1)
        ends: list[int] = runs[begun, -1].tolist()
        return ends


_NUMBER_RULES = ("no_repeat_ngram_size", "min_length", "min_new_tokens")
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
