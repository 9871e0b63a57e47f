"""What an engine answers at once instead of taking a request."""

from trimserve.errors import TrimserveError


class QueueFull(TrimserveError):  # noqa: N818 - it is no fault of anybody
    """There is no room in the queue.

    Attributes:
        retry_after: seconds after which there may be room, by the pace of the last requests; 1 at least.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(TrimserveError):  # noqa: N818 - it is no fault of anybody
    """The engine takes no more requests: it is being drained, or was closed."""
