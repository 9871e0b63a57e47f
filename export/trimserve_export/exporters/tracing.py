"""What all exporters share: silence, and one sentence for whatever tracing a model can raise."""

import contextlib

from trimserve.errors import UnsupportedModelError
from trimserve.foreign import foreign
from trimserve_export.checkpoint.library import quiet as quiet


def failures_named(exporter: str, model_type: str, task: str) -> contextlib.AbstractContextManager[None]:
    """Turn whatever an exporter can raise into one sentence; want of disk or memory says so.

    Raises:
        UnsupportedModelError: in place of the exporter's error.
    """
    return foreign(
        f"{exporter} cannot export this {model_type!r} model for {task}",
        advice="choose another --exporter or --task, or fetch the model again if it is damaged.",
        error=UnsupportedModelError,
    )
