"""What fine-tuning takes: a transformers model itself, without a wrapper around it."""

from typing import TYPE_CHECKING, Any

from trimserve.errors import UsageError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def transformers_model(model: Any, function: str, *, adapted: bool = False) -> "PreTrainedModel":  # noqa: ANN401
    """The transformers model that a function of fine-tuning was given.

    Args:
        model: what the user passed.
        function: the function's name, for the message.
        adapted: what PEFT made of a model is taken, too; the model in it is given.

    Raises:
        UsageError: something else, a wrapped model among it.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="finetune", purpose="trimserve.finetune")
    inner = model.get_base_model() if adapted and hasattr(model, "get_base_model") else model
    if not isinstance(inner, transformers.PreTrainedModel):
        wrappers = ("DistributedDataParallel", *(() if adapted else ("PEFT",)), "torch.compile")
        raise UsageError(
            f"{function} takes a transformers model but got a {type(model).__name__}: pass the model itself, "
            f"and wrap it ({', '.join(wrappers)}) inside the block."
        )
    return inner  # type: ignore[no-any-return]
