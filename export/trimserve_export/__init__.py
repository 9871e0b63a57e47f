"""The export toolchain of trimserve: checkpoint in, trimmed and servable folder out.

Needs the `[export]` extra. The names here are imported when they are first used, so that what needs no
torch (`trimserve inspect` of a trimmed folder) works without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimserve_export.pipeline import ExportResult, export, export_full

__all__ = ["ExportResult", "export", "export_full"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.pipeline"), name)
