"""Take out spaces before punctuation in decoded text, as `clean_up_tokenization_spaces` does."""

# In the library's order: a later one sees what an earlier one left.
_REPLACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_LONGEST = max(map(len, _REPLACED))


def clean_up(text: str) -> str:
    """Clean a whole text.

    Example:
        >>> clean_up("it 's here , do n't look .")
        "it's here, don't look."
    """
    for found in _REPLACED:
        text = text.replace(found, found.strip())
    return text


class CleanStream:
    """Clean a text that comes in pieces; what comes out adds up to ``clean_up(all of it)``."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece and give the text that nothing later can change; may be empty."""
        self._held += piece
        cut = _settled(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        return clean_up(ready)

    def flush(self) -> str:
        """End the text: give what was held back."""
        held, self._held = self._held, ""
        return clean_up(held)


def _settled(text: str) -> int:
    """Where a text can be cut so that its parts can be cleaned apart, whatever follows.

    Every pattern begins with a space, and only `" ' "` has another one: before a space that follows neither a
    space nor an apostrophe no pattern is open, but for `" n ' t"`, which becomes `" n't"` first. What begins
    with that space is settled when it is as long as any pattern.
    """
    start = len(text)
    while (start := text.rfind(" ", 0, start)) >= 0:
        if start == 0 or (text[start - 1] not in " '" and not text[:start].endswith(" n")):
            tail = text[start:]
            return len(text) if len(tail) >= _LONGEST and " " not in tail[1:] else start
    return 0 if " " in text else len(text)
