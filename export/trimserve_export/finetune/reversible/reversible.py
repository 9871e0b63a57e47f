"""`reversible`: a model whose layers are coupled and adapted while it is trained."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from trimserve.arguments import Count, checked
from trimserve.errors import UsageError
from trimserve.model.source import ModelSource
from trimserve_export.coupled.adapters import read_adapters, read_settings, write_adapters
from trimserve_export.coupled.coupling import SCALES, Factor, Form, Variant
from trimserve_export.coupled.model import couple_layers, put, stacks_of
from trimserve_export.finetune.models import transformers_model
from trimserve_export.finetune.reversible.saving import CoupledSaver
from trimserve_export.finetune.reversible.stack import ReversibleStack
from trimserve_export.finetune.saving import find_base

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_EVERYTHING = ("output_hidden_states", "output_attentions")


class Reversible:
    """A model whose layers are coupled; made by `make_reversible` or `reversible`.

    Attributes:
        model: the model that was passed, changed in place.
        form: variant, factors and rank.
    """

    def __init__(
        self, model: "PreTrainedModel", form: Form, *, base: str | Path | ModelSource | None
    ) -> None:
        """Couple the model's layers."""
        self.model = model
        self.form = form
        self._base = find_base(model, base)
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._lists = couple_layers(model, form, ReversibleStack)
        self._saver = CoupledSaver(model, form)
        self._hook: Any = model.register_forward_pre_hook(_refuse_layers, with_kwargs=True)
        self._is_saved = False

    @property
    def stacks(self) -> list[ReversibleStack]:
        """The coupled stacks: one, or encoder and decoder."""
        return [stack for _, stack in stacks_of(self.model) if isinstance(stack, ReversibleStack)]

    @property
    def is_coupled(self) -> bool:
        """Whether the model's layers are coupled at present."""
        return self._hook is not None

    @property
    def inversion_errors(self) -> tuple[tuple[float, ...], ...]:
        """By stack and layer, the relative error of the streams that the inversion in floats gave.

        Measured in the first training step with `exact=False`; exact inversion has none.
        """
        return tuple(stack.inversion_errors for stack in self.stacks)

    @property
    def recompute(self) -> bool:
        """Whether backward recomputes activations; False keeps them all, for comparison: the same numbers."""
        return all(stack.recompute for stack in self.stacks)

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for stack in self.stacks:
            stack.recompute = value

    def freeze(self) -> None:
        """Train the adapters alone, and heads outside the pre-trained model (a new classifier's)."""
        base, head = self.model.base_model, self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        for module in (base, *(() if head is None else (head,))):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        for stack in self.stacks:
            stack.adapters.requires_grad_(True)

    @checked
    def save(self, folder: Path) -> None:
        """Save what is trained, the adapters among it: reversible.safetensors and reversible.json.

        Args:
            folder: made if it is not there. `load_reversible` reads it.
        """
        write_adapters(self.model, self.form, self._base, folder)
        self._is_saved = True

    def restore(self) -> None:
        """Give the model its own layers back, without adapters. A second call does nothing.

        What is trained in the adapters is lost unless it was saved: `save`, or the model's `save_pretrained`.
        """
        if not self.is_coupled:
            return
        if not (self._is_saved or self._saver.is_used) and self._is_trained():
            logger.warning("the trained adapters were not saved: call save(folder) before the block ends.")
        for name, stack in list(stacks_of(self.model)):
            layers = self._lists[name]
            # The layers may be others by now: adapters of PEFT, another device.
            layers._modules.update({str(number): layer for number, layer in enumerate(stack.layers)})
            layers.train(self.model.training)
            put(self.model, name, layers)
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._hook.remove()
        self._hook = None
        self._saver.remove()

    def _is_trained(self) -> bool:
        adapters = [item for stack in self.stacks for item in stack.adapters.named_parameters()]
        return any(bool(parameter.any()) for name, parameter in adapters if name.endswith("up.weight"))


def _refuse_layers(model: "nn.Module", _: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse what the loop over the layers would collect of each: there is one stack in it."""
    config: Any = model.config
    for name in _EVERYTHING:
        asked = named.get(name)
        if getattr(config, name, False) if asked is None else asked:
            raise UsageError(f"a reversible model has no {name}: its layers are one stack. Leave it out.")


@checked
def make_reversible(
    model: "PreTrainedModel",
    *,
    variant: Variant = 1,
    scales: tuple[Factor, Factor] | None = None,
    rank: Count = 64,
    exact: bool = True,
    checkpointed: Annotated[int, Meta(ge=0)] | None = None,
    freeze: bool = True,
    base: str | Path | ModelSource | None = None,
) -> Reversible:
    """Couple a model's layers in place; `restore()` of what is returned gives them back.

    MEFT of Liao, Tan & Monz (2023, arXiv:2306.00477): backward recomputes the activations of the layers
    instead of keeping them. Sentences about the three variants are in `trimserve_export.coupled.coupling`.

    Args:
        model: a transformers model, not wrapped, of BERT's, RoBERTa's, XLM-R's, BART's, OPT's, Llama's,
            Mistral's or Qwen's (2, 2.5, 3) layers. Wrap it (DistributedDataParallel) afterwards.
        variant: 1, 2 or 3.
        scales: lambda and beta, 1/250 to 1; the paper's by default. The difference from the pre-trained
            model at the beginning is proportional to the factors below 1.
        rank: width of the adapters.
        exact: keep the digits that the factors drop, four bits a number and layer (eight for factors below
            1/15), so that the inversion is exact at any depth. Otherwise floats alone, as in the paper: with
            0.1 each layer loses a decimal digit.
        checkpointed: with `exact=False`, the layers at the beginning whose streams are kept instead; by
            default those whose inversion has a relative error above 1e-5 in the first step.
        freeze: train the adapters and new heads alone, as the paper does; otherwise what was trainable.
        base: the folder or hub id that the model was loaded from; by default what the model remembers. It is
            named in saved adapters.

    Raises:
        UsageError: the model is wrapped or coupled already, or arguments contradict each other.
        UnsupportedModelError: no layers that are known.
    """
    transformers_model(model, "reversible")
    if next(stacks_of(model), None) is not None:
        raise UsageError("the model's layers are coupled already: restore it first.")
    if exact and checkpointed:
        raise UsageError("checkpointed belongs to exact=False: an exact inversion needs no checkpoints.")
    made = Reversible(model, Form(variant, scales or SCALES[variant], rank), base=base)
    for stack in made.stacks:
        stack.exact, stack.checkpointed = exact, checkpointed
    if freeze:
        made.freeze()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%s parameters are trained", f"{trained:,}")
    return made


@contextlib.contextmanager
@checked
def reversible(
    model: "PreTrainedModel",
    *,
    variant: Variant = 1,
    scales: tuple[Factor, Factor] | None = None,
    rank: Count = 64,
    exact: bool = True,
    checkpointed: Annotated[int, Meta(ge=0)] | None = None,
    freeze: bool = True,
    base: str | Path | ModelSource | None = None,
) -> Iterator[Reversible]:
    """Couple a model's layers for a block; its own layers are back when it ends, by an exception too.

    Args:
        model: see `make_reversible`, as the others.
        variant: see `make_reversible`.
        scales: see `make_reversible`.
        rank: see `make_reversible`.
        exact: see `make_reversible`.
        checkpointed: see `make_reversible`.
        freeze: see `make_reversible`.
        base: see `make_reversible`.

    Yields:
        What saves the adapters.

    Raises:
        UsageError: see `make_reversible`.
        UnsupportedModelError: see `make_reversible`.
    """
    made = make_reversible(
        model,
        variant=variant,
        scales=scales,
        rank=rank,
        exact=exact,
        checkpointed=checkpointed,
        freeze=freeze,
        base=base,
    )
    try:
        yield made
    finally:
        made.restore()


@checked
def load_reversible(model: "PreTrainedModel", folder: Path) -> Reversible:
    """Couple a model's layers as saved adapters say, and load them.

    Args:
        model: the model that they were trained on, as `make_reversible` takes it.
        folder: what `Reversible.save` wrote.

    Raises:
        UsageError: the folder has no such adapters; see `make_reversible` too.
        MismatchError: they are damaged or do not fit the model.
        UnsupportedModelError: see `make_reversible`.
    """
    form = read_settings(folder).form
    made = make_reversible(model, variant=form.variant, scales=form.scales, rank=form.rank)
    try:
        read_adapters(model, folder)
    except BaseException:
        made.restore()
        raise
    made._is_saved = True
    return made
