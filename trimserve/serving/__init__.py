"""The server: an OpenAI-compatible face of trimmed folders, as one ASGI application."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.serving.app import create_app as create_app
    from trimserve.serving.server import serve as serve
    from trimserve.serving.settings import ServerSettings as ServerSettings

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "ServerSettings": "trimserve.serving.settings",
        "create_app": "trimserve.serving.app",
        "serve": "trimserve.serving.server",
    },
)
