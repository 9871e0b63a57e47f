"""How many tokens of a prompt are fed between two steps of the others: what takes about as long as a step."""

# Below it, the weights are read for next to nothing.
_LEAST_CHUNK = 16


class Pace:
    """Learns what steps and prompts cost; which tokens come does not depend on it."""

    def __init__(self, most: int) -> None:
        """Know nothing yet.

        Args:
            most: tokens fed at a time, at most; 2 or more.
        """
        self._most = most
        self._step_seconds = 0.0
        self._token_seconds = 0.0

    def note_step(self, seconds: float) -> None:
        """Learn from a step of all sequences."""
        self._step_seconds = _average(self._step_seconds, seconds)

    def note_prompt(self, tokens: int, seconds: float) -> None:
        """Learn from a chunk of a prompt."""
        self._token_seconds = _average(self._token_seconds, seconds / tokens)

    def chunk(self, live: int) -> int:
        """Tokens to feed next, while so many sequences wait for it."""
        if not live or not self._token_seconds or not self._step_seconds:
            return self._most
        return max(2, min(self._most, max(_LEAST_CHUNK, int(self._step_seconds / self._token_seconds))))


def _average(old: float, new: float) -> float:
    return new if old == 0 else 0.8 * old + 0.2 * new
