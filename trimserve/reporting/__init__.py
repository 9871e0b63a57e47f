"""The report of a profile: its numbers, for a terminal, and as one HTML file."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.reporting.facts import Inputs as Inputs
    from trimserve.reporting.facts import Report as Report
    from trimserve.reporting.facts import gather as gather
    from trimserve.reporting.page import render as render

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Inputs": "trimserve.reporting.facts",
        "Report": "trimserve.reporting.facts",
        "gather": "trimserve.reporting.facts",
        "render": "trimserve.reporting.page",
    },
)
