"""Put saved reversible adapters (MEFT) on their base: the checkpoint of the coupled model's inference form.

The adapters are not linear, so nothing is added to the weights of the base: they stand beside them, and
config.json says how the layers are coupled (`trimserve_export.coupled`).
"""

from pathlib import Path
from typing import Any, Final

import transformers

from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.tensors import read_header
from trimserve.finetune.provenance import describe_base
from trimserve.folder.names import COUPLED_CONFIG
from trimserve.foreign import foreign
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.coupled.adapters import (
    WEIGHTS_NAME,
    Settings,
    read_adapters,
    read_settings,
)
from trimserve_export.coupled.model import CONFIG_KEY, couple_layers, form_entry, read_form
from trimserve_export.exporters import tracing
from trimserve_export.source.adapter_files import copy_small_files, load_base, set_labels
from trimserve_export.source.admission import check_source

_LABELLED: Final = ("ForSequenceClassification", "ForTokenClassification")


def put_adapters_on(
    base: ModelSource, adapter: ModelSource, target: Path, *, trust_remote_code: bool = False
) -> ModelSource:
    """Write the checkpoint of a model with reversible adapters, in the base's stored dtype.

    Args:
        base: the checkpoint that they were trained on.
        adapter: a folder with reversible.json and reversible.safetensors. Its own tokenizer files replace
            the base's.
        target: an existing empty folder.
        trust_remote_code: allow code that the base's folder brings.

    Raises:
        UnsupportedModelError: the base cannot be read, is quantised, or is of a class that transformers does
            not have.
        MismatchError: the adapters are damaged, or do not fit the base.
        UsageError: the base is a graph or has adapters already, or there are no weights.
    """
    settings = read_settings(adapter.path)
    if not (adapter.path / WEIGHTS_NAME).is_file():
        raise UsageError(f"{adapter.name} has no {WEIGHTS_NAME}: save the adapters again.")
    if base.graph is not None:
        raise UsageError(
            f"{base.name} is an ONNX graph, which no adapters can be put on: pass its checkpoint."
        )
    check_source(base, trust_remote_code=trust_remote_code)
    _check_base(base, adapter, settings)
    with tracing.quiet():
        model = _load(base, adapter, settings, trust_remote_code=trust_remote_code)
        couple_layers(model, settings.form)
        read_adapters(model, adapter.path)
        setattr(model.config, CONFIG_KEY, form_entry(settings.form))
        model.save_pretrained(target)
    copy_small_files(base.path, adapter.path, target)
    files = (*base.weight_files, adapter.path / WEIGHTS_NAME, adapter.path / COUPLED_CONFIG)
    return ModelSource(base.name, base.revision, target, made_of=files, adapter=adapter.name)


def _check_base(base: ModelSource, adapter: ModelSource, settings: Settings) -> None:
    """Refuse another model than the one the adapters were trained on, where they know it."""
    if settings.base is None or (found := describe_base(base).files) == settings.base.files:
        return
    differing = min(
        name
        for name in found.keys() | settings.base.files
        if found.get(name) != settings.base.files.get(name)
    )
    raise MismatchError(
        f"{base.name} is not the model that the adapters in {adapter.name} were trained on: {differing} "
        f"differs from that of {settings.base.name}. Pass that one with -m."
    )


def _load(
    base: ModelSource, adapter: ModelSource, settings: Settings, *, trust_remote_code: bool
) -> transformers.PreTrainedModel:
    """The base in the class that the adapters were trained in."""
    model_class: Any = getattr(transformers, settings.architecture, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise UnsupportedModelError(
            f"the adapters in {adapter.name} were trained in a {settings.architecture}, which transformers "
            "does not have: put them on with load_reversible in the program that has that class."
        )
    config: Any = load_config(base.path, trust_remote_code=trust_remote_code)
    if read_form(config) is not None:
        raise UsageError(
            f"{base.name} has coupled layers already: pass the model that {adapter.name} was trained on."
        )
    with foreign(f"{adapter.path / WEIGHTS_NAME} cannot be read", advice="save the adapters again."):
        specs = read_header(adapter.path / WEIGHTS_NAME)[0]
    labelled = settings.architecture.endswith(_LABELLED) and set_labels(config, specs)
    model, missing = load_base(
        model_class,
        base,
        config,
        specs,
        purpose=f"as {settings.architecture}",
        labelled=labelled,
        trust_remote_code=trust_remote_code,
    )
    if missing is not None:
        raise MismatchError(
            f"neither {base.name} nor the adapters have {missing}, which {settings.architecture} needs: "
            "pass the model that they were trained on with -m."
        )
    return model
