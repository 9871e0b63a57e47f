"""The vocab tensors of a checkpoint: those of the model's class, under the names they are stored by."""

from collections.abc import Mapping
from dataclasses import dataclass

import transformers
from transformers import PretrainedConfig

from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.tensors import TensorSpec
from trimserve.model.source import ModelSource
from trimserve.model.tensor_names import stored_names
from trimserve_export.checkpoint.axes import (
    PER_LAYER,
    ModelClass,
    Role,
    VocabAxes,
    architecture_class,
    find_vocab_axes,
    load_config,
)


@dataclass(frozen=True, slots=True)
class StoredVocab:
    """The vocab tensors as a checkpoint stores them.

    Attributes:
        cut: stored tensor name -> its spec and vocab axis; a tie that is stored twice appears twice.
        roles: role -> the stored tensor that counts; a tied head has no role of its own.
        tied: the head is the embedding.
    """

    cut: dict[str, tuple[TensorSpec, int]]
    roles: dict[Role, str]
    tied: bool


def stored_vocab(
    source: ModelSource, model_class: ModelClass | None = None, *, trust_remote_code: bool = False
) -> StoredVocab:
    """Find the vocab tensors of a model's checkpoint; nothing is read but configs and headers.

    Raises:
        UnsupportedModelError: see `trim_checkpoint`.
        MismatchError: a tensor has fewer than V rows.
    """
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    axes = axes_of(config, model_class, trust_remote_code=trust_remote_code)
    return find_stored_vocab(read_specs(source), axes, source.vocab_size)


def axes_of(
    config: PretrainedConfig, model_class: ModelClass | None, *, trust_remote_code: bool
) -> list[VocabAxes]:
    """The vocab tensors of the class to load the weights in, then of the class they were saved from.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    classes = [cls for cls in (model_class, architecture_class(config)) if cls is not None]
    if not classes:
        raise UnsupportedModelError(
            f"architectures = {config.architectures} names no class of transformers "
            f"{transformers.__version__}, so the vocab tensors cannot be told: this model cannot be trimmed."
        )
    return [find_vocab_axes(config, cls, trust_remote_code=trust_remote_code) for cls in classes]


def read_specs(source: ModelSource) -> dict[str, TensorSpec]:
    """Read the headers of all weight files; tensors by name, in file order."""
    return {name: spec for specs, _ in source.headers.values() for name, spec in specs.items()}


def find_stored_vocab(specs: Mapping[str, TensorSpec], axes: list[VocabAxes], vocab_size: int) -> StoredVocab:
    """Match the vocab tensors of the model classes with the names a checkpoint stores them by.

    Args:
        specs: the checkpoint's tensors.
        axes: the class that the weights will be loaded in first, then the checkpoint's own.
        vocab_size: V; a stored tensor may have more rows, never fewer, unless it is per-layer embeddings.

    Raises:
        UnsupportedModelError: the embedding or the head of the first class is not stored.
        MismatchError: a tensor has fewer than V rows.
    """
    cut: dict[str, tuple[TensorSpec, int]] = {}
    roles: dict[Role, str] = {}
    prefixes = [found.prefix for found in axes]
    for found in axes:
        for tensor in found.tensors:
            known = (*tensor.names, *found.stored_as(tensor.names))
            names = [name for name in stored_names(known, prefixes) if name in specs]
            cut |= {name: (specs[name], tensor.axis) for name in names}
            if names:
                roles.setdefault(tensor.role, names[0])
    for role in ("embedding", PER_LAYER, "head"):
        tensor_of = axes[0].get(role)
        if tensor_of is not None and role not in roles:
            raise UnsupportedModelError(
                f"the checkpoint has no {tensor_of.names[0]}, which this task needs: choose another task."
            )
    for spec, axis in cut.values():
        # The model itself replaces ids that its per-layer embeddings have no row for.
        if spec.shape[axis] < vocab_size and spec.name != roles.get(PER_LAYER):
            raise MismatchError(
                f"{spec.name} has {spec.shape[axis]:,} rows but the model's vocab_size is {vocab_size:,}: "
                "the config does not belong to these weights."
            )
    tied = "head" not in roles and any(found.tied for found in axes)
    return StoredVocab(cut, roles, tied)
