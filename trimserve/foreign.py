"""The border where other libraries' errors come in: each becomes one sentence of ours."""

import contextlib
from types import TracebackType

from trimserve.errors import MismatchError, TrimserveError

_LONGEST_REASON = 300


def foreign(
    subject: str, *, advice: str, error: type[TrimserveError] = MismatchError
) -> contextlib.AbstractContextManager[None]:
    """Turn whatever another library raises in the block into `error`: ``{subject} ({reason}): {advice}``.

    Put it around the calls into the library alone: a fault of our own within it would read as the input's.

    Args:
        subject: what went wrong, e.g. ``"x/tokenizer.json cannot be read as a tokenizer"``.
        advice: what to do next, with its full stop.
        error: the class to raise.

    Raises:
        TrimserveError: of the class `error`, from any Exception but those below, and from a panic of Rust
            code, which is no Exception. A lack of memory is a TrimserveError that says so.

    What passes unchanged: errors of trimserve, Ctrl-C and its kin, and what the system says about a file (an
    OSError with a number).
    """
    return _Border(subject, advice, error)


def rust_faults(subject: str, *, advice: str) -> "_RustBorder":
    """Like `foreign`, but only what no code of trimserve raises: panics of Rust code, and bare Exceptions.

    The tokenizers library raises those two wherever a text meets a damaged tokenizer, so this stands around
    whole functions that have many calls into it: a fault of our own keeps its traceback.

    Raises:
        MismatchError: in the place of either.
    """
    return _RustBorder(subject, advice, MismatchError)


class _Border:
    """A class and not a generator: a step of a graph passes here, and this costs a third."""

    __slots__ = ("_advice", "_error", "_subject")

    def __init__(self, subject: str, advice: str, error: type[TrimserveError]) -> None:
        self._subject = subject
        self._advice = advice
        self._error = error

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, caught: BaseException | None, trace: TracebackType | None
    ) -> None:
        if caught is None or self._passes(caught):
            return
        if isinstance(caught, MemoryError):
            raise TrimserveError(
                f"{self._subject} (out of memory): free some memory or give it less to do."
            ) from caught
        raise self._error(f"{self._subject} ({reason(caught)}): {self._advice}") from caught

    def _passes(self, caught: BaseException) -> bool:
        if is_panic(caught):
            return False
        if not isinstance(caught, Exception) or isinstance(caught, TrimserveError):
            return True
        return isinstance(caught, OSError) and caught.errno is not None


class _RustBorder(_Border, contextlib.ContextDecorator):
    """Around a block, or around a whole function as its decorator."""

    def _passes(self, caught: BaseException) -> bool:
        return not is_panic(caught) and type(caught) is not Exception


def is_panic(caught: BaseException) -> bool:
    """Whether this is a panic of Rust code: PyO3 derives it from BaseException, in a module of its own."""
    return type(caught).__name__ == "PanicException"


def reason(caught: BaseException) -> str:
    """What an error says, in one line of bounded length; its class where it says nothing."""
    line = next((line.strip() for line in str(caught).splitlines() if line.strip()), type(caught).__name__)
    line = line.rstrip(".:")
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "…"
