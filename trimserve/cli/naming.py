"""Find the tokenizer behind a profile, to name its tokens."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimserve.profiling import Profile
    from trimserve.source import ModelSource
    from trimserve.tokennames import TokenNames

log = logging.getLogger(__name__)


def find_source(profile: "Profile", model: str | None) -> "ModelSource | None":
    """The model that was profiled: the named one, else the folder that the profile names, if it is there.

    Raises:
        UsageError: the named model does not exist.
        MismatchError: it has another tokenizer than the profile.
    """
    from trimserve.artefacts import sha256_file
    from trimserve.errors import MismatchError
    from trimserve.folder import TOKENIZER_NAME
    from trimserve.source import resolve_model

    if model is None and not (Path(profile.tokenizer_name) / TOKENIZER_NAME).is_file():
        return None  # a hub id is not fetched unasked
    source = resolve_model(model or profile.tokenizer_name, weights=False)
    if sha256_file(source.tokenizer_path) == profile.tokenizer_sha256:
        return source
    if model is not None:
        raise MismatchError(
            f"{model} has another tokenizer than the profile: pass the model that was profiled."
        )
    return None


def find_names(profile: "Profile", model: str | None) -> "TokenNames | None":
    """Names of the tokens, or None with a note where the tokenizer is not at hand; see `find_source`."""
    from trimserve.tokennames import TokenNames

    source = find_source(profile, model)
    if source is None:
        log.warning("%s is not at hand: tokens are shown by id (pass -m)", profile.tokenizer_name)
        return None
    return TokenNames(source.tokenizer())
