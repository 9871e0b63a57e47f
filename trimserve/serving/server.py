"""A server process: its socket, its signals, and its end."""

import asyncio
import contextlib
import logging
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from trimserve.errors import UsageError, require
from trimserve.serving.settings import ServerSettings

if TYPE_CHECKING:
    from trimserve.serving.app import App

_log = logging.getLogger(__name__)
_BACKLOG = 1024
# Once nothing is being answered: connections that a client keeps open are closed after so many seconds.
_CLOSING_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: on a host's port (0 takes a free one), or on a socket of the file system."""

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None


def serve(settings: ServerSettings, address: Address, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs; a second signal ends at once.

    Args:
        settings: see `ServerSettings`.
        address: where to listen.
        started: called with the address, as a URL, when clients can connect; models are opened after it.

    Raises:
        MissingExtraError: the extra ``serve`` is not installed.
        UsageError: the address is taken, or not this machine's.
        TrimserveError: a folder cannot be opened.
    """
    for module in ("starlette", "uvicorn", "prometheus_client"):
        require(module, extra="serve", purpose="trimserve serve")
    with _listening(address) as (listening, url):
        failures: list[BaseException] = []
        asyncio.run(_serve(settings, listening, lambda: started(url), failures))
    if failures:
        raise failures[0]


async def _serve(
    settings: ServerSettings,
    listening: socket.socket,
    started: Callable[[], None],
    failures: list[BaseException],
) -> None:
    import uvicorn

    from trimserve.serving.app import create_app

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, fail)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )

    class Server(uvicorn.Server):
        """Drains before it ends."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's form
            if app.models.draining:
                self.force_exit = self.should_exit = True
            else:
                loop.call_soon_threadsafe(_begin_end, app, self, ends)

    loop = asyncio.get_running_loop()
    ends: list[asyncio.Task[None]] = []
    server = Server(config)
    await server.serve(sockets=[listening])
    for end in ends:
        end.cancel()


def _begin_end(app: "App", server: Any, ends: list["asyncio.Task[None]"]) -> None:  # noqa: ANN401 - uvicorn's
    async def end() -> None:
        _log.warning("stopping: no more requests are taken; what runs is finished")
        if not await app.models.drain():
            _log.warning("the time is up: what still runs is cancelled")
        server.should_exit = True

    if not ends:
        ends.append(asyncio.ensure_future(end()))


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket and its URL; a socket of the file system is removed at the end."""
    path = address.unix_socket
    try:
        bound = _bind_unix(path) if path is not None else _bind_host(address)
    except OSError as error:
        where = path or f"{address.host}:{address.port}"
        raise UsageError(
            f"cannot listen on {where} ({error.strerror or error}): stop what listens there, or choose "
            f"another {'--unix-socket' if path else '--port'}."
        ) from error
    try:
        yield bound, f"unix:{path}" if path is not None else _url(bound)
    finally:
        bound.close()
        if path is not None:
            path.unlink(missing_ok=True)


def _bind_host(address: Address) -> socket.socket:
    family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)


def _bind_unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise UsageError("this system has no sockets in files: leave out --unix-socket.")
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()  # left behind by a server that was killed
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    return bound


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
