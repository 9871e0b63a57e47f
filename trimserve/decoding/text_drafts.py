"""Drafts from the text: what followed its last tokens where they stood before (n-gram lookup).

Summaries, answers about a document and edits of code repeat long pieces of their prompts. What followed
there is fed together with the next token, in one step of the decoder, and the compact head says how far it
is what it would have drafted. So no token depends on it; only the number of steps does. See Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trimserve.arrays import Ids
from trimserve.decoding.request import Request
from trimserve.runtime.row_costs import RowCosts

# Tokens that must agree, and those that are compared where several places do.
_SHORTEST, _LONGEST = 2, 4
_MOST = 15  # tokens guessed at a time: with the known one, the largest step that is measured
# A guess of which nothing is known yet stands every other time; it counts like so many guesses.
_PRIOR = 4.0
_DECAY = 0.95


class TextDrafts:
    """Guesses what follows in one request's text, and how many of the guesses to feed.

    Example:
        >>> text = TextDrafts(request, costs)  # doctest: +SKIP
        >>> guesses, fed = text.guess(drafts, most=8)  # doctest: +SKIP
    """

    def __init__(self, request: Request, costs: Callable[[], RowCosts]) -> None:
        """Know the prompt.

        Args:
            request: whose prompt and output are looked through.
            costs: what steps of several tokens cost; asked for when there is the first guess.
        """
        self._request = request
        self._costs = costs
        self._text: Ids = np.zeros(2 * request.prompt.size + 256, np.int32)
        self._text[: request.prompt.size] = request.prompt
        self._outputs = 0  # tokens of the output that are in the buffer
        self._stood, self._judged = _PRIOR / 2, _PRIOR

    def guess(self, drafts: Sequence[int], most: int) -> tuple[list[int], int]:
        """What may follow, and how much of it to feed behind the last token.

        Args:
            drafts: token ids drafted since the request's output.
            most: guesses that are of use.

        Returns:
            Token ids, to be compared with what is drafted (see `note`) even if they are not fed; and how many
            of them pay.
        """
        found = _continuation(self._whole(drafts), min(most, _MOST))
        if not found:
            return [], 0
        fed = self._costs().best(self._stood / self._judged, len(found) + 1) - 1
        self._request.guessed += fed
        return found, fed

    def note(self, *, stood: bool, was_fed: bool) -> None:
        """Learn whether a guess was the next draft."""
        self._stood = _DECAY * self._stood + stood
        self._judged = _DECAY * self._judged + 1
        self._request.guesses_stood += stood and was_fed

    def _whole(self, drafts: Sequence[int]) -> Ids:
        """Prompt, output and drafts."""
        request, start = self._request, self._request.prompt.size + self._outputs
        new = [*request.output[self._outputs :], *drafts]
        self._outputs = len(request.output)
        end = start + len(new)
        if end > self._text.size:
            self._text = np.concatenate([self._text, np.zeros(end, np.int32)])
        self._text[start:end] = new
        return self._text[:end]


def _continuation(text: Ids, most: int) -> list[int]:
    """What followed the last tokens where they stood before: int32 (T,) -> at most `most` token ids.

    Of several places those where more tokens agree are taken, of these the last one with enough behind it.
    """
    size = text.size
    if size <= _SHORTEST or most < 1:
        return []
    # places[i] + 1 is the last of two tokens that agree with the text's last two.
    places = np.flatnonzero((text[1:-1] == text[-1]) & (text[:-2] == text[-2]))
    for length in range(_SHORTEST + 1, _LONGEST + 1):
        before = length - _SHORTEST
        longer = places[places >= before]
        longer = longer[text[longer - before] == text[size - length]] if size > length else longer[:0]
        if not longer.size:
            break
        places = longer
    if not places.size:
        return []
    starts = places + _SHORTEST
    whole = starts[starts + most <= size]
    start = int(whole[-1] if whole.size else starts[0])
    found: list[int] = text[start : start + most].tolist()
    return found
