"""Models whose layers are coupled: find the lists of layers, put stacks in their places."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.files.checked_json import convert_json
from trimserve_export.coupled.blocks import LAYERS
from trimserve_export.coupled.coupling import Form
from trimserve_export.coupled.stack import CoupledStack

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The entry of a config.json whose checkpoint has coupled layers.
CONFIG_KEY = "trimserve_coupling"


def find_lists(model: "PreTrainedModel") -> list[tuple[str, nn.ModuleList]]:
    """The lists of layers that can be coupled, and their names: one, or two of an encoder-decoder.

    Raises:
        UnsupportedModelError: there is none, or its layers do not all see the same mask.
        UsageError: layers are left out at random.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not isinstance(module, CoupledStack) and len(module)
    }
    found = [(name, module) for name, module in lists.items() if type(module[0]).__name__ in LAYERS]
    if not found:
        candidates = {type(module[0]).__name__: name for name, module in lists.items()}
        seen = ", ".join(f"{name} of {kind}" for kind, name in candidates.items()) or "no list of layers"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers that can be coupled (found {seen}): known are "
            f"{', '.join(sorted(LAYERS))}."
        )
    for name, module in found:
        _check(model, name, module)
    return found


def _check(model: nn.Module, name: str, layers: nn.ModuleList) -> None:
    config: Any = model.config
    kinds = {type(layer).__name__ for layer in layers}
    for several in (kinds, set(getattr(config.get_text_config(), "layer_types", None) or ())):
        if len(several) < 2:
            continue
        described = ", ".join(sorted(several))
        raise UnsupportedModelError(
            f"{name} has layers of several kinds ({described}), which get different masks: they cannot be "
            "coupled as one stack."
        )
    owner = model.get_submodule(name.rpartition(".")[0])
    if getattr(owner, "layerdrop", 0.0):
        raise UsageError(
            f"{name} leaves out layers at random (layerdrop {owner.layerdrop}), which coupled layers cannot: "
            "set it to 0 in the config."
        )


def stacks_of(model: nn.Module) -> Iterator[tuple[str, CoupledStack]]:
    """The stacks of a coupled model and their names."""
    for name, module in model.named_modules():
        if isinstance(module, CoupledStack):
            yield name, module


def put(model: nn.Module, name: str, layers: nn.ModuleList) -> None:
    """Put a list of layers in the place of another."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layers)


def couple_layers(
    model: "PreTrainedModel", form: Form, kind: type[CoupledStack] = CoupledStack
) -> dict[str, nn.ModuleList]:
    """Couple a model's layers in place.

    Args:
        model: a transformers model.
        form: the variant.
        kind: of stacks to make.

    Returns:
        The lists that were there, by name.
    """
    lists = dict(find_lists(model))
    width = model.config.get_text_config().hidden_size
    for name, layers in lists.items():
        put(model, name, kind(layers, form, width))
    return lists


def read_form(config: "PretrainedConfig | Mapping[str, Any]") -> Form | None:
    """How a config says that the layers of its checkpoint are coupled; None if they are not.

    Raises:
        MismatchError: the entry is damaged.
    """
    entry = config.get(CONFIG_KEY) if isinstance(config, Mapping) else getattr(config, CONFIG_KEY, None)
    if entry is None:
        return None
    return convert_json(entry, Form, f"{CONFIG_KEY} of config.json", advice="save the model again.")


def form_entry(form: Form) -> dict[str, Any]:
    """The entry that `read_form` reads."""
    return asdict(form) | {"scales": list(form.scales)}


def coupled_class(model_class: type[Any]) -> type[Any]:
    """A class of models whose layers are coupled as their config says; `from_pretrained` loads into it."""

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
        model_class.__init__(self, config, *args, **options)
        form = read_form(config)
        if form is not None:
            couple_layers(self, form)

    return type(
        model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}
    )
