"""The vocab tensors of a model in memory: find them, put other tensors in their places."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimserve.errors import MismatchError, UnsupportedModelError, UsageError, require
from trimserve.vocab.map import VocabMap
from trimserve_export.finetune.models import transformers_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Attributes in which modules repeat the number of rows.
_SIZES = ("num_embeddings", "out_features", "vocab_size")


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """One tensor with a vocab axis.

    Attributes:
        names: every parameter or buffer name that is this one tensor (its ties).
        axis: the vocab axis; every axis before it has length 1.
    """

    names: tuple[str, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class LiveVocab:
    """The vocab tensors of a model.

    Attributes:
        tensors: each tensor once.
        has_head: the model gives logits over the vocab, so its labels are token ids.
        prefix: the class's `base_model_prefix`, which a checkpoint's names may lack or add.
    """

    tensors: tuple[LiveTensor, ...]
    has_head: bool
    prefix: str


def find_live_vocab(model: "PreTrainedModel", vocab: VocabMap) -> LiveVocab:
    """Find the vocab tensors of a model, ties by identity of what is in memory, not by its config.

    Args:
        model: a transformers model, not wrapped.
        vocab: the kept ids, made for this model.

    Raises:
        UsageError: not a transformers model, or a tensor is not where its class puts it (adapters).
        UnsupportedModelError: a vocab tensor that is not understood, or a pad id that may not move.
        MismatchError: the vocab was made for another vocab size.
    """
    transformers_model(model, "partial_vocab")
    axes_module = require("trimserve_export.checkpoint.axes", extra="finetune", purpose="trimserve.finetune")
    checkpoint = require("trimserve_export.checkpoint.trim", extra="finetune", purpose="trimserve.finetune")
    config = copy.deepcopy(model.config)
    axes = axes_module.find_vocab_axes(config, type(model))
    if axes.get("embedding.1") is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has per-layer embeddings, a second vocab table: partial_vocab cuts "
            "models with one table alone."
        )
    checkpoint.check_pad(config, axes, vocab)
    tensors = tuple(
        found for declared in axes.tensors for found in _by_identity(model, declared.names, declared.axis)
    )
    for live in tensors:
        _check(live, get_tensor(model, live.names[0]), vocab)
    return LiveVocab(tensors, axes.tied or axes.get("head") is not None, axes.prefix)


def _by_identity(model: "nn.Module", names: tuple[str, ...], axis: int) -> Iterator[LiveTensor]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(get_tensor(model, name)), []).append(name)
    yield from (LiveTensor(tuple(group), axis) for group in groups.values())


def _check(live: LiveTensor, tensor: "Tensor", vocab: VocabMap) -> None:
    rows = tensor.shape[live.axis]
    if rows != vocab.vocab_size:
        raise MismatchError(
            f"{live.names[0]} has {rows:,} rows but the vocab was selected for {vocab.vocab_size:,}: "
            "profile and select with this model."
        )
    plain = tensor.data.__class__.__name__ == "Tensor" and tensor.device.type != "meta"
    if not plain or not tensor.is_floating_point():
        raise UnsupportedModelError(
            f"{live.names[0]} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}: only plain "
            "floating-point tensors can be cut, so cut the model before it is quantised or sharded."
        )


def get_tensor(model: "nn.Module", name: str) -> "Tensor":
    """The parameter or buffer of this name.

    Raises:
        UsageError: there is none: something replaced the module that held it.
    """
    module, attribute = _owner(model, name)
    tensor: Tensor | None = (module._parameters | module._buffers).get(attribute)
    if tensor is None:
        raise UsageError(
            f"{name} is not where {type(model).__name__} has it (found {type(module).__name__}): cut the "
            "model before adapters are put on its embedding or head, and merge_and_unload() them before the "
            "full model is restored."
        )
    return tensor


def replace_tensor(model: "nn.Module", names: tuple[str, ...], tensor: "Tensor") -> "Tensor":
    """Put a tensor in the place of another under each of its names; ties stay ties.

    Returns:
        What stands there: a Parameter with the old one's flag and attributes, or the tensor as a buffer.
    """
    import torch

    old = get_tensor(model, names[0])
    if isinstance(old, torch.nn.Parameter):
        parameter = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        parameter.__dict__.update(old.__dict__)
        tensor = parameter
    for name in names:
        module, attribute = _owner(model, name)
        setattr(module, attribute, tensor)
    return tensor


def identical(model: "nn.Module", live: LiveTensor) -> list[LiveTensor]:
    """Split a tensor into the tensors that its names stand for at present: one, unless a tie was broken."""
    return list(_by_identity(model, live.names, live.axis))


def _owner(model: "nn.Module", name: str) -> "tuple[nn.Module, str]":
    path, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(path), attribute
    except AttributeError:
        return model, name  # `get_tensor` says what is wrong


@dataclass(frozen=True, slots=True)
class SizeAttribute:
    """A module's attribute that follows the vocab, with its value in the full and in the compact model."""

    module: "nn.Module"
    name: str
    full: int
    compact: int | None

    def set(self, *, compact: bool) -> None:
        """Write one of the values."""
        setattr(self.module, self.name, self.compact if compact else self.full)


def size_attributes(
    model: "PreTrainedModel", tensors: tuple[LiveTensor, ...], vocab: VocabMap
) -> list[SizeAttribute]:
    """Numbers of rows and pad ids that modules keep beside their tensors."""
    owners = {id(_owner(model, name)[0]) for live in tensors for name in live.names}
    pad = model.config.get_text_config().pad_token_id
    found: list[SizeAttribute] = []
    for module in model.modules():
        found += [
            SizeAttribute(module, name, vocab.vocab_size, len(vocab))
            for name in (_SIZES if id(module) in owners else ("vocab_size",))
            if _own(module, name) == vocab.vocab_size
        ]
        # A pad id that positions are counted from does not move (see `check_pad`).
        padding = _own(module, "padding_idx")
        if padding is not None and (padding == pad or id(module) in owners):
            found.append(SizeAttribute(module, "padding_idx", padding, compact_id(vocab, padding)))
    return found


def _own(module: "nn.Module", name: str) -> Any:  # noqa: ANN401
    value = module.__dict__.get(name)
    return value if isinstance(value, int) else None


def compact_id(vocab: VocabMap, token_id: int) -> int | None:
    """The compact id of a token id, None if it is not kept."""
    kept = 0 <= token_id < vocab.vocab_size and bool(vocab.is_kept(token_id))
    return int(vocab.to_compact(token_id)) if kept else None
