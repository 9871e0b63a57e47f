"""Find the tokenizer behind a profile, to name its tokens."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimserve.profiling import Profile
    from trimserve.text.names import TokenNames

log = logging.getLogger(__name__)


def find_names(profile: "Profile", model: str | None) -> "TokenNames | None":
    """Names of the tokens, or None with a note where the tokenizer is not at hand."""
    from trimserve.profiledmodel import find_source
    from trimserve.text.names import TokenNames

    source = find_source(profile, model)
    if source is None:
        log.warning("%s is not at hand: tokens are shown by id (pass -m)", profile.tokenizer_name)
        return None
    return TokenNames(source.tokenizer())
