"""What was generated: text from a request's checked tokens, cut at a stop string."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from trimserve.decoding.request import Request
from trimserve.text.codec import Codec
from trimserve.text.stop_matcher import StopMatcher
from trimserve.text.stops import StopStrings

Stopped = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: the decoded output, without special tokens, up to a stop string.
        ids: token ids produced, including the one that ended it.
        stopped: "eos", "stop" (a stop string) or "length".
        drafted: tokens drafted; with exact mode's blocks more than were produced.
        rejected: drafts that the full model's token replaced.
        cold_mass: with `report_mass`, the mean share of the full model's probability that ids had which
            compact mode cannot produce; else None.
    """

    text: str
    ids: tuple[int, ...]
    stopped: Stopped
    drafted: int = 0
    rejected: int = 0
    cold_mass: float | None = None


class OutputReader:
    """Turns one request's tokens into text and watches for stop strings."""

    def __init__(
        self,
        codec: Codec,
        stop: Sequence[str],
        stop_strings: Sequence[str] = (),
        prompt: Iterable[int] = (),
        *,
        by_bytes: bool = True,
    ) -> None:
        """Start a text.

        Args:
            codec: decodes the tokens.
            stop: strings of the text that end it.
            stop_strings: strings of the tokens, special ones included, that end it; see `StopMatcher`.
            prompt: token ids before the first one.
            by_bytes: see `StopMatcher`.
        """
        self._decoder = codec.stream()
        # What ends the tokens is no part of the text either.
        self._stops = StopStrings((*stop, *stop_strings))
        self._matcher = (
            StopMatcher(codec.tokenizer, stop_strings, prompt, by_bytes=by_bytes) if stop_strings else None
        )
        self._one_by_one = bool(stop or stop_strings)
        self._text: list[str] = []
        self._finished = False
        self._stopped = False

    def push(self, request: Request, tokens: Sequence[int]) -> str:
        """Decode more tokens; returns the text that became certain.

        At a stop string the request is finished, and what was produced after it taken back.
        """
        if not self._one_by_one:
            piece = self._decoder.push(tokens)
            self._text.append(piece)
            return piece
        pieces = []
        for place, token in enumerate(tokens, 1):
            pieces.append(self._stops.push(self._decoder.push([token])))
            matched = self._matcher is not None and self._matcher.ends_with(token)
            if matched or self._stops.stopped:
                self._stopped = True
                request.end(len(tokens) - place)
                break
        piece = "".join(pieces)
        self._text.append(piece)
        return piece

    def finish(self) -> str:
        """The rest of the text: what waited for a longer character or stop string."""
        if self._finished:
            return ""
        self._finished = True
        piece = self._stops.push(self._decoder.flush()) + self._stops.flush()
        self._text.append(piece)
        return piece

    def result(self, request: Request, cold_mass: float | None = None) -> Generation:
        """The finished generation."""
        self.finish()
        at_eos = bool(request.output) and request.output[-1] in request.stop_ids
        stopped: Stopped = "eos" if at_eos else "length"
        return Generation(
            text="".join(self._text),
            ids=tuple(request.output),
            stopped="stop" if self._stopped or self._stops.stopped else stopped,
            drafted=request.drafted,
            rejected=request.rejected,
            cold_mass=cold_mass,
        )
