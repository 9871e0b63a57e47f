"""Checkpoints of coupled models: `save_pretrained` notes the coupling in config.json."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve_export.coupled.coupling import Form
from trimserve_export.coupled.model import CONFIG_KEY, form_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "save_pretrained"


class CoupledSaver:
    """Stands in for a model's `save_pretrained`, or for what stands there already (of `partial_vocab`).

    The checkpoint is the inference form: the model's own weights by their own names, the adapters, and the
    coupling in config.json. An object and not a closure, so that the model can still be copied and pickled.

    Attributes:
        is_used: a checkpoint was written.
    """

    def __init__(self, model: "PreTrainedModel", form: Form) -> None:
        self._model = model
        self._form = form
        self._before: Any = vars(model).get(_METHOD)
        self.is_used = False
        object.__setattr__(model, _METHOD, self)

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """Save as before, with the coupling in the config."""
        config: Any = self._model.config
        setattr(config, CONFIG_KEY, form_entry(self._form))
        try:
            if self._before is None:
                type(self._model).save_pretrained(self._model, save_directory, *args, **options)
            else:
                self._before(save_directory, *args, **options)
        finally:
            delattr(config, CONFIG_KEY)
        self.is_used = True

    def remove(self) -> None:
        """Give the place back."""
        if vars(self._model).get(_METHOD) is not self:
            return
        del vars(self._model)[_METHOD]
        if self._before is not None:
            object.__setattr__(self._model, _METHOD, self._before)
