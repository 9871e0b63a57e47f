"""The models that a server has: opened beside its work, replaced by an atomic swap, chosen by name."""

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from trimserve.encoder.encoder import Encoder
from trimserve.engine.engine import Engine
from trimserve.engine.settings import EngineSettings
from trimserve.errors import TrimserveError
from trimserve.folder.names import MANIFEST_NAME
from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.serving.grammars import Grammars
from trimserve.serving.options import Mask
from trimserve.serving.problems import ApiError
from trimserve.serving.recording import Recorder, check_recording
from trimserve.serving.settings import ServerSettings
from trimserve.serving.tokens import TokenTexts
from trimserve.version import __version__

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0
_RECORD_SECONDS = 60.0
_RETRY_SECONDS = 5


class ServedModel:
    """An opened folder and the engine that runs it; belongs to one event loop.

    Attributes:
        name: by which clients ask for it.
        engine: its engine.
        created: when it was opened, seconds since 1970.
        stamp: what tells the folder from the one that replaces it.
    """

    def __init__(self, name: str, engine: Engine, stamp: tuple[int, ...]) -> None:
        self.name = name
        self.engine = engine
        self.created = int(time.time())
        self.stamp = stamp
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Self]:
        """A request is being answered: the engine stays open as long as the block lasts."""
        self._users += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def idle(self, timeout: float) -> bool:
        """Wait until no request is being answered; whether that came within so many seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def in_thread(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do what takes longer than an event loop may stand still: templates, tokenizers."""
        return await asyncio.to_thread(function, *args, **kwargs)

    async def run(self, work: Callable[[], R], tokens: int) -> R:
        """Have the engine do something besides generating; what has not begun is dropped with its client.

        Args:
            work: what is done, in the engine's thread.
            tokens: how much it is, for the queue.

        Raises:
            QueueFull: there is no room for it.
        """
        return await asyncio.wrap_future(self.engine.call(lambda _: work(), tokens=tokens))

    @property
    def model(self) -> Encoder | Generator:
        """What the folder holds."""
        return self.engine.model

    @property
    def task(self) -> str:
        """Optimum's name of its task."""
        return self.model.folder.manifest.task

    @cached_property
    def fingerprint(self) -> str:
        """What an answer depends on besides the request: the folder's files and this version."""
        manifest = self.model.folder.manifest.to_json()
        return f"fp_{hashlib.sha256((__version__ + manifest).encode()).hexdigest()[:12]}"

    @cached_property
    def texts(self) -> TokenTexts:
        """The texts of its tokens."""
        return TokenTexts(self.model.codec)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.generator("a grammar"))

    async def mask(self, asked: tuple[str, str] | None) -> Mask | None:
        """Makes the masks of a grammar, given with its field's name, after checking it.

        Raises:
            ApiError: 400, it is no grammar.
        """
        if asked is None:
            return None
        grammar, param = asked
        await self.in_thread(self._grammars.mask, grammar, param)
        return lambda: self._grammars.mask(grammar, param)

    def generator(self, route: str) -> Generator:
        """The model, where it generates.

        Raises:
            ApiError: 400, it does not.
        """
        if not isinstance(self.model, Generator):
            raise self._other_task(route)
        return self.model

    def encoder(self, route: str) -> Encoder:
        """The model, where it encodes; errors as of `generator`."""
        if not isinstance(self.model, Encoder):
            raise self._other_task(route)
        return self.model

    def _other_task(self, route: str) -> ApiError:
        generates = self.task in (GENERATION_TASK, TEXT2TEXT_TASK)
        routes = "/v1/chat/completions or /v1/completions" if generates else "/v1/embeddings or /v1/rerank"
        return ApiError(
            400, f"{self.name} does {self.task}, which {route} does not serve: use {routes}.", param="model"
        )


class Models:
    """All models of a server, by name.

    Attributes:
        draining: whether the server ends: no more requests are taken.
        recorder: counts served token ids, where that is asked for.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._served: dict[str, ServedModel] = {}
        record = settings.record_profile
        check_recording(record, len(settings.folders))
        self.recorder = None if record is None else Recorder(record, settings.record_min_docs)
        self._retiring: list[asyncio.Task[None]] = []
        self.draining = False

    @property
    def names(self) -> tuple[str, ...]:
        """What clients can ask for, in the order of the command line."""
        return tuple(self._settings.folders)

    @property
    def served(self) -> Mapping[str, ServedModel]:
        """Those that are open."""
        return self._served

    @property
    def ready(self) -> bool:
        """Whether every model can be asked."""
        return not self.draining and len(self._served) == len(self._settings.folders)

    def choose(self, name: str | None) -> ServedModel:
        """The model of a request.

        Raises:
            ApiError: 404, there is none of this name; 503, it is being opened, or the server ends.
        """
        if self.draining:
            raise ApiError(
                503, "the server is being stopped: ask another one.", code="draining", retry_after=1
            )
        if name is None and len(self.names) > 1:
            raise ApiError(400, f"this server has {', '.join(self.names)}: name one as model.", param="model")
        chosen = self.names[0] if name is None else name
        if chosen not in self._settings.folders:
            raise ApiError(
                404,
                f"there is no model {chosen[:100]!r}: this server has {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        if chosen not in self._served:
            raise ApiError(
                503, f"{chosen} is being opened: try again.", code="loading", retry_after=_RETRY_SECONDS
            )
        return self._served[chosen]

    async def open_all(self) -> None:
        """Open every folder, one after the other.

        Raises:
            TrimserveError: one of them cannot be opened.
        """
        for name in self.names:
            self._served[name] = await asyncio.to_thread(self._open, name)
            _log.info("%s is served from %s", name, self._settings.folders[name])

    async def record(self) -> None:
        """Write what was recorded now and then, for ever; a full disk is logged and tried again."""
        while self.recorder is not None:
            await asyncio.sleep(_RECORD_SECONDS)
            try:
                await self.recorder.save()
            except (TrimserveError, OSError) as error:
                _log.error("the live profile cannot be written: %s", error)

    async def watch(self) -> None:
        """Look for replaced folders, for ever; what cannot be opened is logged, and the old one stays."""
        failed: dict[str, tuple[int, ...]] = {}
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            for name, served in list(self._served.items()):
                stamp = folder_stamp(self._settings.folders[name])
                if stamp and stamp not in (served.stamp, failed.get(name)):
                    try:
                        await self._replace(name)
                    except (TrimserveError, OSError) as error:
                        failed[name] = stamp
                        _log.error("%s stays as it is: its new folder does not open: %s", name, error)

    async def _replace(self, name: str) -> None:
        """Open a folder anew, swap, and let the old model finish what it has."""
        old = self._served[name]
        self._served[name] = await asyncio.to_thread(self._open, name)
        _log.info("%s was replaced", name)
        self._retiring.append(asyncio.create_task(self._retire(old)))

    async def _retire(self, old: ServedModel) -> None:
        await old.idle(math.inf)  # its answers are finished by the model that began them
        await asyncio.to_thread(old.engine.close)

    def _open(self, name: str) -> ServedModel:
        settings, path = self._settings, self._settings.folders[name]
        stamp = folder_stamp(path)  # before it is read: replaced meanwhile, it is opened once more
        model = load(path, device=settings.device, threads=settings.threads, memory=settings.memory)
        limits = EngineSettings(
            max_queued_requests=settings.max_queue, max_queued_tokens=settings.max_queue_tokens
        )
        if self.recorder is not None:
            self.recorder.begin(model.folder, model.codec)
        return ServedModel(name, Engine(model, limits), stamp)

    async def drain(self) -> bool:
        """Take nothing new and wait for what runs; whether it ended within the timeout."""
        self.draining = True
        waits = (served.idle(self._settings.shutdown_timeout) for served in self._served.values())
        return all(await asyncio.gather(*waits))

    async def close(self) -> None:
        """End all engines, and write what was recorded."""
        if self.recorder is not None:
            await self.recorder.save()
        for served in self._served.values():
            await asyncio.to_thread(served.engine.close)


def folder_stamp(path: Path) -> tuple[int, ...]:
    """What changes when a folder is replaced: its manifest's file; empty while there is none."""
    try:
        found = (path / MANIFEST_NAME).stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
