"""The generation settings that transformers takes from a model's folder, and what of them cannot be served.

With a generation_config.json they are that file, and nothing else. Without one transformers makes them of
config.json: version 4 of the config with its class's defaults, version 5 of the file as it is.
"""

import logging
from typing import Any

import transformers
from transformers import GenerationConfig

from trimserve.errors import UnsupportedModelError
from trimserve.generation.config import CONFIG_NAME
from trimserve.generation.fields import FIELDS, check_settings
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.library import transformers_border

logger = logging.getLogger(__name__)


def read_generation(source: ModelSource, *, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """What a generator's manifest says about generating (`Manifest.generation`).

    Args:
        source: a model that generates.
        trust_remote_code: allow code that the model folder brings.

    Returns:
        `transformers_version`, and the settings from config.json where there is no generation_config.json;
        None where there is no config.json (onnxruntime-genai's folders), or transformers does not know it.

    Raises:
        UnsupportedModelError: a setting that the runtime cannot honour; the message names it.
    """
    version = {"transformers_version": transformers.__version__}
    if (source.path / CONFIG_NAME).is_file():
        _check(source.read_json(CONFIG_NAME), f"{source.name}: {CONFIG_NAME}")
        return version
    if not source.config:
        return None
    try:
        with transformers_border(f"cannot make generation settings of {source.name}"):
            made = _from_config(source, trust_remote_code=trust_remote_code)
    except UnsupportedModelError as error:
        logger.info("config.json is not known: %s", error)
        return None
    settings = {
        name: value
        for name, value in made.to_dict().items()
        if name in known_fields() and value is not None and value != known_fields()[name]
    }
    _check(settings, f"{source.name}: config.json")
    return settings | version


def known_fields() -> dict[str, Any]:
    """The fields of the installed GenerationConfig and their defaults; it ignores all others."""
    fields = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def _from_config(source: ModelSource, *, trust_remote_code: bool) -> GenerationConfig:
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return GenerationConfig.from_pretrained(
            source.path, config_file_name="config.json", _from_model_config=True
        )
    config = transformers.AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    return GenerationConfig.from_model_config(config)


def _check(settings: dict[str, Any], where: str) -> None:
    check_settings({name: value for name, value in settings.items() if name in known_fields()}, where)
    for name, default in known_fields().items():
        if name not in FIELDS and settings.get(name) not in (None, default):
            raise UnsupportedModelError(
                f"{where} sets {name} = {settings[name]!r}, which this version of trimserve does not know: "
                "take it out of the file, or update trimserve."
            )
