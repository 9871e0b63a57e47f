"""The export toolchain of trimserve: checkpoint in, trimmed and servable folder out.

Needs the `[export]` extra. The names here are imported when they are first used, so that what needs no
torch (`trimserve inspect` of a trimmed folder) works without it.
"""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve_export.full_model import export_full as export_full
    from trimserve_export.pipeline import ExportResult as ExportResult
    from trimserve_export.pipeline import export as export

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "ExportResult": "trimserve_export.pipeline",
        "export": "trimserve_export.pipeline",
        "export_full": "trimserve_export.full_model",
    },
)
