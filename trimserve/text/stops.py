"""Stop strings: end a stream of text at the first of them."""

from collections.abc import Iterable

from trimserve.errors import UsageError


class StopStrings:
    r"""Cut a stream of text at the stop string that is complete first.

    Text that may still become a stop string is held back. The result does not depend on how the text is
    split into pieces; of stop strings that end together, the longest is taken.

    Attributes:
        stopped: the stop string that was met, or None.

    Example:
        >>> stops = StopStrings(["\n\n"])
        >>> stops.push("one\n"), stops.push("two\n"), stops.push("\nthree"), stops.stopped
        ('one', '\ntwo', '', '\n\n')
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string must not be empty.")
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and give the text that is surely before any stop string; may be empty."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, length, self.stopped = min(found)
            self._held = ""
            return text[: end + length]
        cut = len(text) - self._open_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """End the stream: give what was held back."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)
