"""What the adapters share: opening a folder of the right kind, and the parts of a chat message."""

from collections.abc import Mapping
from typing import Any

from trimserve.arguments import AnyPath
from trimserve.encoder.encoder import Encoder
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator
from trimserve.loading import load


def open_encoder(folder: AnyPath, options: Mapping[str, Any]) -> Encoder:
    """Open a folder that gives embeddings.

    Args:
        folder: as `trimserve.load` takes it.
        options: of `trimserve.load`.

    Raises:
        UsageError: it is one of a generator.
    """
    model = load(folder, **options)
    if not isinstance(model, Encoder):
        raise UsageError(f"{folder} generates text, and embeddings need an encoder: name another folder.")
    return model


def open_generator(folder: AnyPath, options: Mapping[str, Any]) -> Generator:
    """Open a folder that generates text; see `open_encoder`.

    Raises:
        UsageError: it is one of an encoder.
    """
    model = load(folder, **options)
    if not isinstance(model, Generator):
        raise UsageError(f"{folder} does {model.task}, and a chat needs a generator: name another folder.")
    return model


def message(role: str, content: object, roles: Mapping[str, str]) -> dict[str, str]:
    """A message for a chat template.

    Args:
        role: the other library's word.
        content: its text.
        roles: the other library's words -> those of chat templates.

    Raises:
        UsageError: another role, or a content that is no text.
    """
    if role not in roles:
        raise UsageError(f"a message of {role!r} has no place in a chat here: send {', '.join(roles)}.")
    if not isinstance(content, str):
        raise UsageError(f"the content of a message of {role!r} should be a text: leave out other parts.")
    return {"role": roles[role], "content": content}
