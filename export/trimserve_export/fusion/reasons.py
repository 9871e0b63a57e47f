"""Why a graph stays as it is."""

from trimserve.errors import TrimserveError


class Unfused(TrimserveError):  # noqa: N818 - no fault: the graph is served as it came
    """The message is the end of a sentence about the graph, or one of its layers."""
