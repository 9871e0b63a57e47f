"""Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) in place of a causal LM's logits and loss.

Even K logits a token are the largest activation of a small model. The package cut-cross-entropy computes the
same loss without storing them; it needs a CUDA device, so on any other the model's own loss is used.
"""

import inspect
import logging
from typing import TYPE_CHECKING, Any

from trimserve.errors import MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
PACKAGE = "cut_cross_entropy"


class CutLoss:
    """Stands in for a causal LM's `forward`; an object, so that the model can still be copied and pickled."""

    def __init__(self, model: "PreTrainedModel", *, any_device: bool = False) -> None:
        """Check that the model's logits are the product that Cut Cross-Entropy computes.

        Args:
            model: a decoder with a vocab head.
            any_device: use the package where there is no CUDA device too.

        Raises:
            MissingExtraError: the package is not installed.
            UnsupportedModelError: something else than a soft cap stands between head and logits.
        """
        self._kernel = _load()
        self._model = model
        self._any_device = any_device
        self.is_active = True
        self.__signature__ = inspect.signature(type(model).forward)
        _check_logits(model)

    def __call__(self, *args: Any, **inputs: Any) -> Any:  # noqa: ANN401 - the model's own
        """The model's output; in training with labels, its loss without logits."""
        model: Any = self._model
        labels = inputs.get("labels")
        usable = labels is not None and (labels.is_cuda or self._any_device)
        if not (usable and self.is_active and model.training):
            return type(model).forward(model, *args, **inputs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        count = inputs.pop("num_items_in_batch", None)
        for name in ("labels", "logits_to_keep"):
            inputs.pop(name, None)
        made = model.get_decoder()(*args, **inputs)
        loss = self._kernel(
            made.last_hidden_state,
            _head(model).weight,
            labels,
            softcap=_soft_cap(model),
            reduction="mean" if count is None else "sum",
            shift=True,
        )
        # With gradient accumulation Trainer counts the labels of all batches of a step.
        loss = loss if count is None else loss / count
        return CausalLMOutputWithPast(loss=loss, past_key_values=made.get("past_key_values"))

    def install(self) -> None:
        """Take the place of the model's `forward`."""
        object.__setattr__(self._model, "forward", self)

    def remove(self) -> None:
        """Give the place back; where accelerate wrapped it meanwhile, pass every call on."""
        self.is_active = False
        if self._model.__dict__.get("forward") is self:
            del self._model.__dict__["forward"]


def install_where_possible(model: "PreTrainedModel") -> CutLoss | None:
    """Install Cut Cross-Entropy if the package is there and fits the model; None otherwise."""
    try:
        loss = CutLoss(model)
    except (MissingExtraError, UnsupportedModelError) as error:
        logger.info("the model's own loss is used: %s", error)
        return None
    loss.install()
    return loss


def _load() -> Any:  # noqa: ANN401 - a function of an optional package
    import importlib

    try:
        return importlib.import_module(PACKAGE).linear_cross_entropy
    except ImportError as error:
        raise MissingExtraError(
            "Cut Cross-Entropy is not installed. Install it with: pip install cut-cross-entropy"
        ) from error


def _head(model: Any) -> Any:  # noqa: ANN401 - a Linear, by `_check_logits`
    return model.get_output_embeddings()


def _soft_cap(model: "PreTrainedModel") -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _check_logits(model: Any) -> None:  # noqa: ANN401 - transformers' methods have no types
    """Compare the logits of two tokens with the product: what a class does to them is asked of the class."""
    import torch

    config = model.config
    if config.is_encoder_decoder or not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(f"{type(model).__name__} is no decoder with a vocab head.")
    if hasattr(config, "router_aux_loss_coef"):
        raise UnsupportedModelError(f"{type(model).__name__} adds a router's loss to that of the tokens.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
            logits = type(model).forward(model, input_ids=ids).logits
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state
            product = _capped(hidden @ _head(model).weight.T, _soft_cap(model))
    finally:
        for module, training in modes.items():
            module.training = training
    if not torch.allclose(logits.float(), product.float(), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} are not the product of hidden states and head."
        )


def _capped(logits: "Tensor", cap: float | None) -> "Tensor":
    return logits if cap is None else (logits / cap).tanh() * cap
