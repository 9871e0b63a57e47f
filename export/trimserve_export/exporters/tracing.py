"""What all exporters share: silence, and one sentence for whatever tracing a model can raise."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import transformers

from trimserve.errors import TrimserveError, UnsupportedModelError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send prints, warnings and progress bars to logging (level debug): none of it concerns the user."""
    text = io.StringIO()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    torch_logger = logging.getLogger("torch")  # torch.export writes to the real stderr
    torch_level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        torch_logger.setLevel(torch_level)
        for line in text.getvalue().splitlines():
            logger.debug("%s", line)


@contextlib.contextmanager
def failures_named(exporter: str, model_type: str, task: str) -> Iterator[None]:
    """Turn whatever an exporter can raise into one sentence; want of disk or memory passes.

    Raises:
        UnsupportedModelError: in place of the exporter's error.
    """
    try:
        yield
    except (OSError, MemoryError, TrimserveError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedModelError(
            f"{exporter} cannot export this {model_type!r} model for {task}: {reason}"
        ) from error
