"""What was generated: text from a request's checked tokens, cut at a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trimserve.decoding.request import Request
from trimserve.text.codec import Codec
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

    def __init__(self, codec: Codec, stop: Sequence[str]) -> None:
        self._decoder = codec.stream()
        self._stops = StopStrings(stop)
        self._text: list[str] = []
        self._finished = False

    def push(self, request: Request, tokens: Sequence[int]) -> str:
        """Decode more tokens; returns the text that became certain."""
        piece = self._stops.push(self._decoder.push(tokens))
        if self._stops.stopped:
            request.finished = True
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
            stopped="stop" if self._stops.stopped else stopped,
            drafted=request.drafted,
            rejected=request.rejected,
            cold_mass=cold_mass,
        )
