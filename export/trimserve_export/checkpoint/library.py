"""The border to transformers and what it loads: silence, and one sentence for whatever it raises."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import transformers

from trimserve.errors import TrimserveError, UnsupportedModelError
from trimserve.files.model_json import FETCH
from trimserve.foreign import foreign

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send prints, warnings and progress bars to logging (level debug): none of it concerns the user."""
    text = io.StringIO()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    # torch.export writes to the real stderr, and transformers' exporters log by the names of their files.
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
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
        logging.disable(disabled)
        for line in text.getvalue().splitlines():
            logger.debug("%s", line)


@contextlib.contextmanager
def transformers_border(
    subject: str,
    *,
    advice: str = FETCH,
    error: type[TrimserveError] = UnsupportedModelError,
) -> Iterator[None]:
    """Let transformers work in the block, quietly.

    Args:
        subject: what it cannot do, after its name and version: ``"cannot read x/config.json"``.
        advice: what to do next.
        error: the class to raise.

    Raises:
        TrimserveError: of the class `error`, for whatever the library raises; see `foreign`.
    """
    with foreign(f"transformers {transformers.__version__} {subject}", advice=advice, error=error), quiet():
        yield
