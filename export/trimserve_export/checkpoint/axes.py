"""Which tensors of a model have a vocab axis: asked of the model's class on the meta device.

A dimension that happens to equal V proves nothing (V = 512 is also a position table, a compact V may be
a Linear's width). So the class is built twice, with V and with V + 1 rows and without any memory: what
changes its shape has a vocab axis, and parameter identity tells which of these are one tied tensor.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimserve.errors import UnsupportedModelError
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.configs import PER_LAYER_KEY
from trimserve_export.checkpoint.library import transformers_border

Role = Literal["embedding", "embedding.1", "head", "head_bias"]
# The second table that token ids are looked up in: per-layer embeddings (`cold_rows.table_name`).
PER_LAYER: Final = "embedding.1"
# A PreTrainedModel class or an AutoModelFor... class; they share `from_pretrained`, and no base.
ModelClass: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class VocabTensor:
    """One tensor with a vocab axis, under every name that a checkpoint may store it by.

    Attributes:
        role: what it is for.
        names: parameter names that share this one tensor (its ties), preferred name first.
        axis: the vocab axis; every axis before it has length 1.
    """

    role: Role
    names: tuple[str, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class VocabAxes:
    """The vocab tensors of a model class.

    Attributes:
        tensors: one entry a role at most.
        tied: the head is the embedding itself.
        prefix: the class's `base_model_prefix`: a checkpoint may leave it out or put it in.
        pad_moves_positions: names of tables other than the token embedding that are indexed from the
            pad id (RoBERTa counts positions from it), so that the pad id must keep its number.
        renames: how names begin in a checkpoint, and the parameters' own that they stand for (Gemma 3n).
    """

    tensors: tuple[VocabTensor, ...]
    tied: bool
    prefix: str
    pad_moves_positions: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()

    def stored_as(self, names: Iterable[str]) -> list[str]:
        """The names that the class saves parameters by, beside their own."""
        return [
            stored + name.removeprefix(own)
            for name in names
            for stored, own in self.renames
            if name.startswith(f"{own}.")
        ]

    def get(self, role: Role) -> VocabTensor | None:
        """Return the tensor of a role, or None."""
        return next((tensor for tensor in self.tensors if tensor.role == role), None)


def load_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model folder's config.json.

    Raises:
        MismatchError: it is not a JSON object.
        UnsupportedModelError: there is none, transformers does not know the model type or cannot read its
            config, or it needs remote code.
    """
    raw = ModelSource(str(path), None, path).config
    if not raw:
        raise UnsupportedModelError(
            f"{path} has no config.json, which tells the model's class: fetch it again."
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"{path}/config.json has no model_type, which tells the model's class: fetch the config of the "
            "model again, or pass the folder that has it."
        )
    if model_type not in CONFIG_MAPPING and "auto_map" in raw and not trust_remote_code:
        raise UnsupportedModelError(
            f"{path} brings its own Python code for model type {model_type!r}: "
            "read that code, then pass --trust-remote-code to run it."
        )
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} does not know model type {model_type!r}, "
            "so its vocab tensors cannot be told: this model cannot be trimmed."
        )
    with transformers_border(f"cannot read the {model_type!r} config of {path}", advice="fetch it again."):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise UnsupportedModelError(f"{path}: a {model_type!r} model has no vocab_size: nothing to trim.")
    return config


def find_vocab_axes(
    config: PretrainedConfig, model_class: ModelClass, *, trust_remote_code: bool = False
) -> VocabAxes:
    """Find the vocab tensors of a model class.

    Args:
        config: the model's config.
        model_class: a `PreTrainedModel` class or an `AutoModelFor...` class.
        trust_remote_code: let an Auto class run code that the model folder brings.

    Raises:
        UnsupportedModelError: a tensor with a vocab axis is neither embedding nor head nor its bias.
    """
    if not getattr(config, "share_encoder_decoder_embeddings", True):  # Marian
        raise UnsupportedModelError(
            f"this {config.model_type!r} model's encoder and decoder have vocabs of their own: two vocabs "
            "cannot be trimmed yet."
        )
    model = build_on_meta(config, model_class, trust_remote_code=trust_remote_code)
    axes, per_layer = _changed_axes(config, model, model_class, trust_remote_code)
    tensors = tuple(_vocab_tensors(model, axes, per_layer))
    head, embedding = _head_of(model), model.get_input_embeddings()
    return VocabAxes(
        tensors=tensors,
        tied=head is not None and head.weight is embedding.weight,
        prefix=model.base_model_prefix,
        pad_moves_positions=tuple(_pad_indexed_tables(model, embedding, axes)),
        renames=tuple(_renames(model)),
    )


def build_on_meta(
    config: PretrainedConfig, model_class: ModelClass, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model whose tensors have shapes but no memory.

    Raises:
        UnsupportedModelError: the class does not take the config, or keeps its embedding elsewhere.
    """
    subject = f"cannot build {model_class.__name__} from this config, or finds no embedding in it"
    with transformers_border(subject, advice="choose another task, or fetch the model again."):
        with torch.device("meta"):
            if hasattr(model_class, "_model_mapping"):  # an Auto class
                model = model_class.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = model_class._from_config(config)
        model.tie_weights()
        model.get_input_embeddings().weight  # noqa: B018 - some classes have none, or a list of them
    return model  # type: ignore[no-any-return]


def architecture_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that the checkpoint was saved from, if transformers has it."""
    return getattr(transformers, next(iter(config.architectures or ()), ""), None)


def _changed_axes(
    config: PretrainedConfig, model: PreTrainedModel, model_class: ModelClass, trust_remote_code: bool
) -> tuple[dict[str, int], frozenset[str]]:
    """Tensor name -> the one axis whose length follows a vocab size; and names of per-layer embeddings."""
    shapes = {name: tensor.shape for name, tensor in _named_tensors(model)}
    axes: dict[str, int] = {}
    per_layer: set[str] = set()
    for key in _vocab_size_keys(config):
        larger = _with_one_more(config, key)
        other = build_on_meta(larger, model_class, trust_remote_code=trust_remote_code)
        for name, tensor in _named_tensors(other):
            changed = [axis for axis, size in enumerate(shapes[name]) if size != tensor.shape[axis]]
            if changed and key == PER_LAYER_KEY:
                per_layer.add(name)
            elif changed and key != "vocab_size":
                raise UnsupportedModelError(
                    f"{name} is a second vocab table (its rows follow {key}), which cannot be trimmed yet."
                )
            if changed:
                axes[name] = changed[0]
    return axes, frozenset(per_layer)


def _vocab_size_keys(config: PretrainedConfig) -> list[str]:
    # type_vocab_size counts segments, not tokens.
    text = config.get_text_config().to_dict()
    return [key for key, value in text.items() if key.startswith("vocab_size") and isinstance(value, int)]


def _with_one_more(config: PretrainedConfig, key: str) -> PretrainedConfig:
    larger = type(config).from_dict(config.to_dict())
    text = larger.get_text_config()
    setattr(text, key, getattr(text, key) + 1)
    return larger


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # Buffers too: final_logits_bias of BART and Marian is one.
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _vocab_tensors(
    model: PreTrainedModel, axes: dict[str, int], per_layer: frozenset[str]
) -> Iterator[VocabTensor]:
    groups = _by_identity(model, axes)
    embedding = model.get_input_embeddings().weight
    head = getattr(_head_of(model), "weight", None)
    biases = []
    for tensor, names in groups:
        if tensor is embedding:
            yield VocabTensor("embedding", names, axes[names[0]])
        elif tensor is head:
            yield VocabTensor("head", names, axes[names[0]])
        elif per_layer.issuperset(names):
            yield VocabTensor(PER_LAYER, names, axes[names[0]])
        elif names[0].endswith("bias") and tensor.numel() == tensor.shape[axes[names[0]]]:
            biases.append(VocabTensor("head_bias", names, axes[names[0]]))
        else:
            raise UnsupportedModelError(
                f"{names[0]} has a vocab axis but is neither the embedding nor the head of "
                f"{type(model).__name__}: a second table over the vocab cannot be trimmed yet."
            )
    if len(biases) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has more than one bias over the vocab "
            f"({', '.join(bias.names[0] for bias in biases)}): this model cannot be trimmed yet."
        )
    yield from biases


def _head_of(model: PreTrainedModel) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[no-untyped-call, no-any-return]


def _by_identity(model: nn.Module, axes: Iterable[str]) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
    """Group the named tensors that are one object; a tie is nothing else."""
    named = dict(_named_tensors(model))
    groups: dict[int, list[str]] = {}
    for name in axes:
        groups.setdefault(id(named[name]), []).append(name)
    return [(named[names[0]], tuple(names)) for names in groups.values()]


def _renames(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """What transformers 4 writes in the place of a beginning of names, where it has no other rule for it."""
    mapping: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    for stored, own in mapping.items():
        plain = stored.removeprefix("^")
        if re.fullmatch(r"[\w.]+", plain) and re.fullmatch(r"[\w.]+", own):
            yield plain, own


def _pad_indexed_tables(model: nn.Module, embedding: nn.Module, axes: Iterable[str]) -> Iterator[str]:
    # RoBERTa, XLM-R, CamemBERT, MPNet: nn.Embedding(positions, padding_idx=pad); Marian, M2M100 and
    # the like compute a sinusoid table in a class of their own, which keeps the same attribute.
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) or "Positional" in type(module).__name__
        is_table = is_table and f"{name}.weight" not in axes  # per-layer embeddings are of tokens, too
        if is_table and module is not embedding and getattr(module, "padding_idx", None) is not None:
            is_token_table = getattr(module, "weight", None) is embedding.weight
            if not is_token_table:
                yield name
