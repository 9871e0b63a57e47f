"""The errors a user can meet: one sentence each, saying what was expected, found, and what to do next."""

import importlib
from types import ModuleType


class TrimserveError(Exception):
    """Base of every error that trimserve raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(TrimserveError, ValueError):
    """Arguments that contradict each other or name something that does not exist (exit code 2)."""

    exit_code = 2


class NoTokenError(UsageError):
    """Every token id is forbidden: by a processor, or by biases."""


class MismatchError(TrimserveError, ValueError):
    """Two artefacts that do not belong together, or a file that changed since its hash was taken."""


class UnsupportedModelError(TrimserveError, ValueError):
    """A model, graph or tokenizer that trimserve does not understand and therefore refuses to trim."""


class UnknownIdError(TrimserveError, ValueError):
    """A token id that the model has no row for, or that has no compact row and no cold row."""


class MissingExtraError(TrimserveError, ImportError):
    """An optional dependency that is not installed; the message names the pip command."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted module name, e.g. ``"onnxruntime"``.
        extra: the extra of trimserve that installs it, e.g. ``"cpu"``.
        purpose: who needs it, as the subject of the sentence, e.g. ``"trimserve run"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingExtraError(
            f"{purpose} needs {missing}, which is not installed. "
            f"Install it with: pip install 'trimserve[{extra}]'"
        ) from error
