"""The merges that sentencepiece's scores stand for: of all pairs that make a token, the highest score first.

llama.cpp makes, of tokens with one score, the one that stands further left in the text; the tokenizers
library ranks its merges and has no two of one rank. What it cannot follow is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from trimserve.errors import MismatchError, UnsupportedModelError

# token_type of a token, by https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE: Final = "\u2581"  # what a space is written with
_LONGEST: Final = 256  # characters of a token that is made of others
_ADVICE: Final = "pass the model that the file was made from."


@dataclass(frozen=True)
class ScoredPieces:
    """Tokens with scores.

    Attributes:
        vocab: token -> id.
        types: the type of each id.
        scores: the score of each id.
        origin: what to name in messages.
    """

    vocab: Mapping[str, int]
    types: Sequence[int]
    scores: Sequence[float]
    origin: str

    def merges(self) -> list[tuple[str, str]]:
        """All pairs of tokens that make a token, the first to be made first.

        Raises:
            UnsupportedModelError: two tokens have one score, or one has a character that is no token.
            MismatchError: a score that is no number.
        """
        self._check_letters()
        made = self._mergeable
        if (longest := self._longest_run) is not None:
            made = {token: score for token, score in made.items() if not _is_run(token)}
        by_score: dict[float, str] = {}
        for token, score in made.items():
            if (other := by_score.setdefault(score, token)) != token:
                raise UnsupportedModelError(
                    f"{self.origin} gives {other[:30]!r} and {token[:30]!r} the same score, {score}, so "
                    "which of them is made first depends on their places in a text, which is not followed: "
                    f"{_ADVICE}"
                )
        ordered = sorted(made, key=lambda token: (-made[token], self.vocab[token]))
        runs = [SPACE * length for length in range(2, (longest or 1) + 1)]
        return [pair for token in (*runs, *ordered) for pair in self._halves(token)]

    def runs_apart(self) -> dict[str, Any] | None:
        """A pre-tokenizer that takes runs of spaces apart, the longest possible from the left on; or None."""
        if self._longest_run is None:
            return None
        pattern = {"Regex": f"{SPACE}{{2,{self._longest_run}}}"}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}

    def _check_letters(self) -> None:
        """Refuse a token with a character that is no token: llama.cpp merges those, too."""
        for token, id_ in self.vocab.items():
            if len(token) > 1 and not self._is_special(token) and self.types[id_] != BYTE:
                missing = [letter for letter in token if letter not in self.vocab]
                if missing:
                    raise UnsupportedModelError(
                        f"{self.origin} has the token {token[:30]!r} and none for {missing[0]!r} in it, so "
                        f"it is made of bytes in a way that is not followed: {_ADVICE}"
                    )

    def _is_special(self, token: str) -> bool:
        """Whether a text is searched for it before anything merges; not with spaces, which are rewritten."""
        type_ = self.types[self.vocab[token]]
        return type_ in (UNKNOWN, CONTROL) or (type_ == USER_DEFINED and SPACE not in token)

    @cached_property
    def _mergeable(self) -> dict[str, float]:
        """The tokens that are made of two others, and their scores."""
        if not np.isfinite(self.scores).all():
            raise MismatchError(f"{self.origin} has a score that is no number: make the file again.")
        return {
            token: self.scores[id_]
            for token, id_ in self.vocab.items()
            if 1 < len(token) <= _LONGEST and not self._is_special(token) and any(self._halves(token))
        }

    def _halves(self, token: str) -> Iterator[tuple[str, str]]:
        """The pairs of tokens that a token can be made of."""
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in self.vocab and right in self.vocab:
                yield left, right

    @cached_property
    def _longest_run(self) -> int | None:
        """The longest run of spaces that is a token, where runs have one score and are made before all else.

        Gemma has runs of 2 to 31 spaces with the highest score: a longer run begins with the longest.
        """
        runs = {token: score for token, score in self._mergeable.items() if _is_run(token)}
        others = {token: score for token, score in self._mergeable.items() if not _is_run(token)}
        if len(runs) < 2 or len(set(runs.values())) > 1:
            return None
        own = next(iter(runs.values()))
        # One of the same score that begins with a space stands to the right of the run before it.
        top = all(score < own or (score == own and SPACE not in token[1:]) for token, score in others.items())
        mixed = any(2 * SPACE in token for token in others)
        longest = max(map(len, runs))
        return longest if top and not mixed and len(runs) == longest - 1 else None


def _is_run(token: str) -> bool:
    return len(token) > 1 and not token.strip(SPACE)
