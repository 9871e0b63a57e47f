"""Run the modules that sentence-transformers puts after a transformer, in numpy."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Mask
from trimserve.encoder.activations import activate
from trimserve.encoder.pooling import normalize_rows, pool
from trimserve.errors import MismatchError
from trimserve.folder.names import SENTENCE_TENSORS_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.sentence import (
    SENTENCE,
    TOKENS,
    Dense,
    LayerNorm,
    Module,
    Normalize,
    Pooling,
    SentenceSettings,
    SpladePooling,
    read_tensors,
)

_EPSILON = np.float32(1e-5)  # of torch.nn.LayerNorm


class SentenceModules:
    """The modules of a folder with their tensors.

    Attributes:
        settings: what they are.
    """

    def __init__(self, settings: SentenceSettings, tensors: Mapping[str, Floats]) -> None:
        self.settings = settings
        self._tensors = tensors

    @classmethod
    def of_folder(cls, folder: TrimmedFolder, settings: SentenceSettings) -> "SentenceModules":
        """Read the tensors of a folder.

        Raises:
            MismatchError: a module's tensor is missing, or of another shape than the module wants.
        """
        tensors = read_tensors(folder)
        for index, module in enumerate(settings.modules):
            if isinstance(module, Dense | LayerNorm):
                _check_tensors(index, module, tensors, str(folder.path / SENTENCE_TENSORS_NAME))
        return cls(settings, tensors)

    def run(
        self,
        values: npt.NDArray[np.floating],
        mask: Mask,
        *,
        dropped: int = 0,
        result: str = SENTENCE,
        normalize: bool = True,
    ) -> Floats:
        """Make embeddings or scores of what the graph gave for one batch.

        Args:
            values: float (B, T, H) where the graph gives token vectors, else (B, D).
            mask: int64 (B, T), 1 for a token.
            dropped: tokens of the prompt, where a pooling leaves them out.
            result: what is asked for: ``"sentence_embedding"`` or ``"scores"``.
            normalize: run a `Normalize` that comes last.

        Returns:
            float32 (B, D).
        """
        start = SENTENCE if self.settings.is_sparse else self.settings.graph_output
        features = {start: values.astype(np.float32, copy=False)}
        for index, module in self._chosen(normalize=normalize):
            self._apply(index, module, features, mask, dropped)
        return features[result]

    def _chosen(self, *, normalize: bool) -> list[tuple[int, Module]]:
        # Logits over the vocab are pooled before: part of them is not in the graph.
        modules = [
            pair for pair in enumerate(self.settings.modules) if not isinstance(pair[1], SpladePooling)
        ]
        while not normalize and modules and isinstance(modules[-1][1], Normalize):
            modules.pop()
        return modules

    def _apply(
        self, index: int, module: Module, features: dict[str, Floats], mask: Mask, dropped: int
    ) -> None:
        if isinstance(module, Pooling):
            left_out = 0 if module.include_prompt else dropped
            features[SENTENCE] = pool(features[TOKENS], mask, module.modes, left_out)
        elif isinstance(module, Dense):
            features[module.output] = self._dense(index, module, features[module.input])
        elif isinstance(module, LayerNorm):
            features[SENTENCE] = self._layer_norm(index, features[SENTENCE])
        elif isinstance(module, Normalize):
            features[SENTENCE] = normalize_rows(features[SENTENCE])

    def _dense(self, index: int, module: Dense, values: Floats) -> Floats:
        weight = self._tensors[f"{index}.weight"]
        _check_width(index, module, values, weight.shape[1])
        product = values @ weight.T
        if (bias := self._tensors.get(f"{index}.bias")) is not None:
            product = product + bias
        made = activate(module.activation, product)
        if not module.residual:
            return made
        residual = self._tensors.get(f"{index}.residual")
        added: Floats = made + (values if residual is None else values @ residual.T)
        return added

    def _layer_norm(self, index: int, values: Floats) -> Floats:
        _check_width(index, LayerNorm(), values, self._tensors[f"{index}.weight"].shape[0])
        centred = values - values.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: Floats = centred / np.sqrt(variance + _EPSILON) * self._tensors[f"{index}.weight"]
        return scaled + self._tensors[f"{index}.bias"]


def _check_tensors(index: int, module: Dense | LayerNorm, tensors: Mapping[str, Floats], origin: str) -> None:
    weight = tensors.get(f"{index}.weight")
    if weight is None:
        raise MismatchError(
            f"{origin} has no {index}.weight, which its {module.type} needs: export the folder again."
        )
    wanted = {"weight": weight.shape[:2] if isinstance(module, Dense) else weight.shape[:1]}
    wanted |= {"bias": weight.shape[:1], "residual": weight.shape[:2]}
    rank = 2 if isinstance(module, Dense) else 1
    needed = ("weight", "bias") if isinstance(module, LayerNorm) else ("weight",)
    for name, shape in wanted.items():
        tensor = tensors.get(f"{index}.{name}")
        if (tensor is None and name in needed) or (tensor is not None and tensor.shape != shape):
            found = "is missing" if tensor is None else f"has the shape {tensor.shape}"
            raise MismatchError(f"{origin}: {index}.{name} {found}, not {shape}: export the folder again.")
    if weight.ndim != rank:
        raise MismatchError(f"{origin}: {index}.weight has {weight.ndim} axes: export the folder again.")


def _check_width(index: int, module: Module, values: Floats, width: int) -> None:
    if values.shape[-1] != width:
        raise MismatchError(
            f"module {index}, {module.type}, takes {width:,} numbers and is given {values.shape[-1]:,}: "
            "export the folder again."
        )
