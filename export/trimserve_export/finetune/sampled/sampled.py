"""`sampled_gradients`: linear layers that keep a part of their rows for the gradient of their weight."""

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from msgspec import Meta
from torch import nn

from trimserve.arguments import Count, checked
from trimserve.errors import UsageError
from trimserve_export.finetune.models import transformers_model
from trimserve_export.finetune.sampled.linear import NormSlot, SharedRows, sampled_linear
from trimserve_export.finetune.sampled.norms import NormCache, sample_places
from trimserve_export.finetune.sampled.selection import choose_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Of a LoRA pair the second matrix has a narrow input: nothing to save, and its variance for it.
_LEFT_OUT = "lora_B"


class Sampler:
    """What the sampled layers of a model share: budget, random numbers, norms, the batch that runs.

    Attributes:
        keep: share of the rows that are kept.
        cache: gradient norms of the previous epoch.
    """

    def __init__(self, keep: float, cache: NormCache, seed: int) -> None:
        self.keep = keep
        self.cache = cache
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._places: Tensor | None = None
        self._last: tuple[weakref.ref[Tensor], int, int, SharedRows] | None = None
        # By the layer that chose: the layers that read the same input in the last pass.
        self._readers: dict[int, set[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a pass, so that a model can be copied and pickled."""
        return self.__dict__ | {"_generators": {}, "_places": None, "_last": None}

    def note_batch(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Find the places of a batch's samples; a hook before the model's forward."""
        ids = named.get("input_ids", args[0] if args else None)
        mask = named.get("attention_mask")
        self._places = None
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            self._places = sample_places(ids, mask, self.cache.places)
        self._last = None

    def linear(self, layer: int, module: nn.Linear, x: "Tensor") -> "Tensor":
        """A layer's output; its rows are chosen by the first layer that reads them."""
        count = int(x.shape[:-1].numel() * self.keep + 0.5)
        trains = torch.is_grad_enabled() and module.weight.requires_grad
        if not trains or x.ndim < 2 or not 1 <= count < x.shape[:-1].numel():
            return nn.functional.linear(x, module.weight, module.bias)
        places = self._places
        if places is not None and x.shape[:-1].numel() % len(places):
            places = None
        slot = NormSlot(self.cache, layer, places)
        return sampled_linear(x, module.weight, module.bias, self._rows(layer, x, count, places), slot)

    def _rows(self, layer: int, x: "Tensor", count: int, places: "Tensor | None") -> SharedRows:
        if self._last is not None:
            seen, version, chooser, shared = self._last
            if seen() is x and version == x._version:
                self._readers[chooser].add(layer)
                return shared
        with torch.no_grad():
            sizes = torch.linalg.vector_norm(x.detach().flatten(0, -2).float(), dim=-1)
            if places is not None:
                readers = sorted(self._readers.get(layer, {layer}))
                norms = self.cache.get(readers, places).to(x.device)
                sizes = (sizes.view(len(places), -1) * norms[:, None]).flatten()
            shared = SharedRows(choose_rows(sizes, count, self._generator(x.device)))
        self._readers.setdefault(layer, set()).add(layer)
        self._last = (weakref.ref(x), x._version, layer, shared)
        return shared

    def _generator(self, device: torch.device) -> torch.Generator:
        """Random numbers of its own: dropout draws as it does without sampling."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class SampledForward:
    """Stands in for a Linear's `forward`: its parameters and names stay, and it can be copied."""

    def __init__(self, sampler: Sampler, layer: int, module: nn.Linear) -> None:
        self._sampler = sampler
        self._layer = layer
        self._module = module

    def __call__(self, input: "Tensor") -> "Tensor":
        """The product."""
        return self._sampler.linear(self._layer, self._module, input)


class Sampled:
    """A model with sampled gradients; made by `make_sampled` or `sampled_gradients`.

    Attributes:
        model: the model that was passed, changed in place.
        modules: the Linear layers that keep a part of their rows, by name.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Linear], sampler: Sampler) -> None:
        """Put the forwards in their places."""
        self.model = model
        self.modules = modules
        for number, module in enumerate(modules.values()):
            object.__setattr__(module, "forward", SampledForward(sampler, number, module))
        self._hook: Any = model.register_forward_pre_hook(sampler.note_batch, with_kwargs=True)

    def restore(self) -> None:
        """Let the layers compute exact gradients again. A second call does nothing."""
        if self._hook is None:
            return
        for module in self.modules.values():
            if isinstance(vars(module).get("forward"), SampledForward):
                del vars(module)["forward"]
        self._hook.remove()
        self._hook = None


@checked
def make_sampled(
    model: "PreTrainedModel",
    *,
    keep: Annotated[float, Meta(gt=0, le=1)] = 0.3,
    modules: Sequence[str] | None = None,
    samples: Count = 65_536,
    seed: int = 0,
) -> Sampled:
    """Let a model's Linear layers keep a part of their rows; `restore()` of what is returned ends that.

    WTA-CRS of Liu et al. (2023, arXiv:2305.15265): outputs and the gradients of inputs and biases are exact,
    the gradient of a weight is estimated without bias from the kept rows. Rows are chosen by the norm of the
    activation times that of the sample's gradient when it was last seen.

    Args:
        model: a transformers model, or what PEFT made of it; not wrapped otherwise.
        keep: share of the rows (tokens of the batch) that are kept; 1 is exact.
        modules: endings of the names of the Linear layers, whole parts of them (`"query"`,
            `"output.dense"`); by default all in the model's lists of layers, but LoRA's second matrices. A
            layer whose weight is frozen keeps nothing anyway.
        samples: about how many texts the training set has; their norms take four bytes a text and layer.
        seed: of the draws; dropout's are not touched.

    Raises:
        UsageError: not such a model, no such layers, or sampled already.
    """
    inner = transformers_model(model, "sampled_gradients", adapted=True)
    chosen = _choose(inner, modules)
    if any(isinstance(vars(module).get("forward"), SampledForward) for module in chosen.values()):
        raise UsageError("the model's gradients are sampled already: restore it first.")
    cache = NormCache(len(chosen), 2 * samples)
    logger.info("%d linear layers keep %g of their rows", len(chosen), keep)
    return Sampled(inner, chosen, Sampler(keep, cache, seed))


def _choose(model: nn.Module, endings: Sequence[str] | None) -> dict[str, nn.Linear]:
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }
    if endings is None:
        lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        chosen = {
            name: module
            for name, module in linears.items()
            if name.startswith(tuple(lists)) and _LEFT_OUT not in name
        }
    else:
        chosen = {}
        for ending in endings:
            found = {name: linears[name] for name in linears if f".{name}".endswith(f".{ending}")}
            if not found:
                raise UsageError(
                    f"no Linear layer of {type(model).__name__} is called {ending}: pass endings such as "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in linears})[:6])}."
                )
            chosen |= found
    if not chosen:
        raise UsageError(
            f"{type(model).__name__} has no Linear layers in a list of layers: name some in modules."
        )
    return chosen


@contextlib.contextmanager
@checked
def sampled_gradients(
    model: "PreTrainedModel",
    *,
    keep: Annotated[float, Meta(gt=0, le=1)] = 0.3,
    modules: Sequence[str] | None = None,
    samples: Count = 65_536,
    seed: int = 0,
) -> Iterator[Sampled]:
    """Let a model's Linear layers keep a part of their rows for a block.

    Args:
        model: see `make_sampled`, as the others.
        keep: see `make_sampled`.
        modules: see `make_sampled`.
        samples: see `make_sampled`.
        seed: see `make_sampled`.

    Yields:
        What knows the layers.

    Raises:
        UsageError: see `make_sampled`.
    """
    made = make_sampled(model, keep=keep, modules=modules, samples=samples, seed=seed)
    try:
        yield made
    finally:
        made.restore()
