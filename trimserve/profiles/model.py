"""Find the model that a profile was counted with."""

from pathlib import Path

from tokenizers import Tokenizer

from trimserve.errors import MismatchError
from trimserve.model.effective_tokenizer import has_tokenizer
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.profiles.profile import Profile

Model = str | Path | ModelSource


def find_source(profile: Profile, model: Model | None) -> ModelSource | None:
    """The model that was profiled: the named one, else the folder that the profile names, if it is there.

    Raises:
        UsageError: the named model does not exist.
        MismatchError: it has another tokenizer than the profile.
    """
    if model is not None:
        return _checked(profile, model)
    if not Path(profile.tokenizer_name).is_dir() or not has_tokenizer(Path(profile.tokenizer_name)):
        return None  # a hub id is not fetched unasked
    source = resolve_model(profile.tokenizer_name, weights=False)
    return source if source.has_tokenizer(profile.tokenizer_sha256) else None


def tokenizer_of(profile: Profile, model: Model | None) -> Tokenizer:
    """The tokenizer that counted a profile, with padding and truncation off.

    Raises:
        UsageError: there is no such model.
        MismatchError: it has another tokenizer than the profile.
    """
    return _checked(profile, model or profile.tokenizer_name).tokenizer()


def _checked(profile: Profile, model: Model) -> ModelSource:
    source = resolve_model(model, weights=False)
    if not source.has_tokenizer(profile.tokenizer_sha256):
        raise MismatchError(
            f"{source.name} has another tokenizer (sha256 {source.tokenizer_sha256[:12]}…) than the profile "
            f"({profile.tokenizer_sha256[:12]}…): pass the model that was profiled."
        )
    return source
