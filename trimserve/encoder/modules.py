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
            MismatchError: a module's tensor is missing.
        """
        tensors = read_tensors(folder)
        for index, module in enumerate(settings.modules):
            if isinstance(module, Dense | LayerNorm) and f"{index}.weight" not in tensors:
                raise MismatchError(
                    f"{folder.path / SENTENCE_TENSORS_NAME} has no {index}.weight, which its {module.type} "
                    "needs: export the folder again."
                )
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
        product = values @ self._tensors[f"{index}.weight"].T
        if (bias := self._tensors.get(f"{index}.bias")) is not None:
            product = product + bias
        made = activate(module.activation, product)
        if not module.residual:
            return made
        residual = self._tensors.get(f"{index}.residual")
        added: Floats = made + (values if residual is None else values @ residual.T)
        return added

    def _layer_norm(self, index: int, values: Floats) -> Floats:
        centred = values - values.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: Floats = centred / np.sqrt(variance + _EPSILON) * self._tensors[f"{index}.weight"]
        return scaled + self._tensors[f"{index}.bias"]
