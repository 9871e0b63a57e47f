"""Trained adapters as files: reversible.safetensors and reversible.json."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trimserve.errors import MismatchError, UsageError
from trimserve.files.artefact import SCHEMA_VERSION
from trimserve.files.atomic import atomic_path
from trimserve.files.checked_json import convert_json, read_json
from trimserve.files.tensors import read_header
from trimserve.finetune.provenance import describe_base
from trimserve.folder.manifest import Source
from trimserve.folder.names import COUPLED_CONFIG
from trimserve.foreign import foreign
from trimserve.model.source import ModelSource
from trimserve_export.coupled.coupling import Form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_NAME = "reversible.safetensors"
_ADVICE = "save the adapters again."


@dataclass(frozen=True, slots=True)
class Settings:
    """The content of reversible.json.

    Attributes:
        form: how the layers are coupled.
        model_type: of the model's config.
        architecture: the model's class.
        base: the model that the adapters were trained on; None if it was not known.
    """

    form: Form
    model_type: str
    architecture: str
    base: Source | None
    schema_version: int = field(default=SCHEMA_VERSION)


def write_adapters(model: "PreTrainedModel", form: Form, base: ModelSource | None, folder: Path) -> None:
    """Write every trained parameter of a coupled model, and how its layers are coupled."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".adapters." in name
    }
    settings = Settings(
        form,
        model.config.model_type,
        type(model).__name__,
        None if base is None else describe_base(base),
    )
    with atomic_path(folder / WEIGHTS_NAME) as path:
        save_file(trained, path)
    with atomic_path(folder / COUPLED_CONFIG) as path:
        path.write_text(json.dumps(dataclasses.asdict(settings), indent=2, sort_keys=True) + "\n", "utf-8")


def read_settings(folder: Path) -> Settings:
    """Read how the layers of saved adapters are coupled.

    Raises:
        UsageError: the folder has no adapters.
        MismatchError: the file is damaged, or of another schema.
    """
    path = folder / COUPLED_CONFIG
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {COUPLED_CONFIG}, so it holds no reversible adapters: pass a folder that "
            "Reversible.save wrote."
        )
    content = read_json(path, advice=_ADVICE)
    version = content.get("schema_version") if isinstance(content, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise MismatchError(
            f"{path} has schema {str(version)[:40]}, this trimserve reads {SCHEMA_VERSION}: update trimserve."
        )
    return convert_json(content, Settings, str(path), advice=_ADVICE)


def read_adapters(model: "PreTrainedModel", folder: Path) -> None:
    """Copy saved adapters and other trained parameters into a coupled model.

    Raises:
        MismatchError: another class of models, or names or shapes that differ.
    """
    import torch

    settings = read_settings(folder)
    if settings.architecture != type(model).__name__:
        raise MismatchError(
            f"the adapters in {folder} were trained in a {settings.architecture}, this is a "
            f"{type(model).__name__}: load the model in that class."
        )
    with foreign(f"{folder / WEIGHTS_NAME} cannot be read", advice=_ADVICE):
        specs = read_header(folder / WEIGHTS_NAME)[0]
    parameters = dict(model.named_parameters())
    needed = {name for name in parameters if ".adapters." in name}
    missing = sorted(needed - specs.keys())
    unknown = sorted(specs.keys() - parameters.keys())
    shaped = sorted(
        name for name, spec in specs.items() if name in parameters and spec.shape != parameters[name].shape
    )
    if missing or unknown or shaped:
        first = (missing or unknown or shaped)[0]
        what = "is missing" if missing else "is not in the model" if unknown else "has another shape"
        raise MismatchError(
            f"the adapters in {folder} do not fit the model: {first} {what}. Pass the model that "
            "they were trained on."
        )
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS_NAME).items():
            parameters[name].copy_(tensor)
