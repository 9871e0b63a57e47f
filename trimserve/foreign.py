"""The border where other libraries' errors come in: each becomes one sentence of ours."""

import contextlib
from types import TracebackType

from trimserve.errors import MismatchError, TrimserveError

_LONGEST_REASON = 300
_LESS = "free some memory or give it less to do."


# What libraries say that found no memory, and have no class for it: ONNX Runtime, C++, torch, CUDA.
_NO_MEMORY = (
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "out of memory",
)


def foreign(
    subject: str,
    *,
    advice: str,
    error: type[TrimserveError] = MismatchError,
    memory: str = _LESS,
) -> contextlib.AbstractContextManager[None]:
    """Turn whatever another library raises in the block into `error`: ``{subject} ({reason}): {advice}``.

    Put it around the calls into the library alone: a fault of our own within it would read as the input's.

    Args:
        subject: what went wrong, e.g. ``"x/tokenizer.json cannot be read as a tokenizer"``.
        advice: what to do next, with its full stop.
        error: the class to raise.
        memory: the advice where memory was lacking.

    Raises:
        TrimserveError: of the class `error`, from any Exception but those below, and from a panic of Rust
            code, which is no Exception. A lack of memory is a TrimserveError that says so, by whichever name
            the library calls it.

    What passes unchanged: errors of trimserve, Ctrl-C and its kin, and what the system says about a file (an
    OSError with a number).
    """
    return _Border(subject, advice, error, memory)


def rust_faults(subject: str, *, advice: str) -> "_RustBorder":
    """Like `foreign`, but only what no code of trimserve raises: panics of Rust code, and bare Exceptions.

    The tokenizers library raises those two wherever a text meets a damaged tokenizer, so this stands around
    whole functions that have many calls into it: a fault of our own keeps its traceback.

    Raises:
        MismatchError: in the place of either.
    """
    return _RustBorder(subject, advice, MismatchError, _LESS)


class _Border:
    """A class and not a generator: a step of a graph passes here, and this costs a third."""

    __slots__ = ("_advice", "_error", "_memory", "_subject")

    def __init__(self, subject: str, advice: str, error: type[TrimserveError], memory: str) -> None:
        self._subject = subject
        self._advice = advice
        self._error = error
        self._memory = memory

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, caught: BaseException | None, trace: TracebackType | None
    ) -> None:
        if caught is None or self._passes(caught):
            return
        if _lacks_memory(caught):
            raise TrimserveError(f"{self._subject} (out of memory): {self._memory}") from caught
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


def _lacks_memory(caught: BaseException) -> bool:
    said = str(caught).lower()
    return isinstance(caught, MemoryError) or any(words in said for words in _NO_MEMORY)


def is_panic(caught: BaseException) -> bool:
    """Whether this is a panic of Rust code: PyO3 derives it from BaseException, in a module of its own."""
    return type(caught).__name__ == "PanicException"


def reason(caught: BaseException) -> str:
    """What an error says, in one line of bounded length; its class where it says nothing."""
    line = next((line.strip() for line in str(caught).splitlines() if line.strip()), type(caught).__name__)
    line = line.rstrip(".:")
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "…"
