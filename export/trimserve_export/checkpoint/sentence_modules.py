"""Read what modules.json lists: the modules of a sentence-transformers folder, their configs and tensors.

Every key is either honoured or refused by name: an embedding made without it would silently be another one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta

from trimserve.arrays import Floats
from trimserve.encoder.activations import ACTIVATIONS
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.inner import inner_path
from trimserve.files.model_json import ListedModule, read_section
from trimserve.files.model_json import read_modules as read_listed
from trimserve.files.tensors import map_tensor, read_header, to_float32
from trimserve.folder.names import check_plain_name
from trimserve.folder.sentence import (
    POOLING_MODES,
    SENTENCE,
    TOKENS,
    Dense,
    LayerNorm,
    Module,
    Normalize,
    Pooling,
    SpladePooling,
)
from trimserve.foreign import foreign
from trimserve.model.sentence import MODULES_NAME
from trimserve.model.source import ModelSource

# Modules that stand for the transformer itself, or for its embedding alone.
TRANSFORMERS = ("Transformer", "MLMTransformer")
STATIC = "StaticEmbedding"
_SERVED = (*TRANSFORMERS, STATIC, "Pooling", "SpladePooling", "Dense", "LayerNorm", "Normalize", "Dropout")
# Keys of sentence-transformers before 5.3, in the order in which the results stand side by side.
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WIDTHS = {"embedding_dimension", "word_embedding_dimension"}
_TORCH_HOMES = ("torch.nn", "torch.nn.modules", "torch.nn.modules.activation", "torch.nn.modules.linear")
_FLOATS = ("F32", "F16", "BF16", "F64")


Width = Annotated[int, Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, slots=True)
class _PoolingConfig:
    """config.json of a Pooling, of new and of older versions."""

    word_embedding_dimension: Width | None = None
    embedding_dimension: Width | None = None
    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool | None = None
    pooling_mode_max_tokens: bool | None = None
    pooling_mode_mean_tokens: bool | None = None
    pooling_mode_mean_sqrt_len_tokens: bool | None = None
    pooling_mode_weightedmean_tokens: bool | None = None
    pooling_mode_lasttoken: bool | None = None
    include_prompt: bool | None = None


@dataclass(frozen=True, slots=True)
class _SpladeConfig:
    """config.json of a SpladePooling."""

    pooling_strategy: str = "max"
    activation_function: str = "relu"


@dataclass(frozen=True, slots=True)
class _DenseConfig:
    """config.json of a Dense."""

    in_features: Width
    out_features: Width
    bias: bool = True
    activation_function: str | None = None
    use_residual: bool | None = None
    module_input_name: str = SENTENCE
    module_output_name: str | None = None


@dataclass(frozen=True, slots=True)
class _LayerNormConfig:
    """config.json of a LayerNorm."""

    dimension: Width | None = None


_CONFIGS: dict[str, type] = {
    "Pooling": _PoolingConfig,
    "SpladePooling": _SpladeConfig,
    "Dense": _DenseConfig,
    "LayerNorm": _LayerNormConfig,
}


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of modules.json.

    Attributes:
        kind: the class's name, e.g. ``"Pooling"``.
        folder: where its files lie.
    """

    kind: str
    folder: Path


def is_sentence_transformers(source: ModelSource) -> bool:
    """Tell whether a folder is a sentence-transformers model (it has a modules.json)."""
    return (source.root / MODULES_NAME).is_file()


def list_modules(source: ModelSource) -> tuple[Listed, ...]:
    """Read modules.json, whose first entry is the transformer or a static embedding.

    Raises:
        MismatchError: it is not a list of modules in folders beside it.
        UnsupportedModelError: a module that the runtime cannot run; the message names it.
    """
    path = source.root / MODULES_NAME
    entries = read_listed(path)
    names = [entry.name for entry in entries]
    listed = tuple(_listed(source, entry) for entry in entries)
    if len(set(names)) < len(names):
        raise UnsupportedModelError(f"{path} has two modules of one name ({', '.join(names)}): name them.")
    if not listed or listed[0].kind not in (*TRANSFORMERS, STATIC):
        found = listed[0].kind if listed else "nothing"
        raise UnsupportedModelError(f"{path} begins with {found}: expected Transformer or {STATIC}.")
    if misplaced := [one.kind for one in listed[1:] if one.kind in (*TRANSFORMERS, STATIC)]:
        raise UnsupportedModelError(
            f"{path} has a {misplaced[0]} behind its first module: only one is served."
        )
    return listed


def _listed(source: ModelSource, entry: ListedModule) -> Listed:
    name, folder = entry.type, entry.path.rstrip("/")
    space, _, kind = name.rpartition(".")
    if not space.startswith("sentence_transformers.") or kind not in _SERVED:
        raise UnsupportedModelError(
            f"{source.name} has a module {name} in its {MODULES_NAME}, which the runtime cannot run: it has "
            f"{', '.join(_SERVED)}. Remove the file to export the transformer alone, with mean pooling."
        )
    if entry.kwargs:
        raise UnsupportedModelError(
            f"{source.name}: {MODULES_NAME} hands the arguments {entry.kwargs} to {kind}, which the "
            "runtime does not."
        )
    if folder in ("", "."):  # the folder itself; the second is how model2vec writes it
        return Listed(kind, source.root)
    check_plain_name(folder, str(source.root / MODULES_NAME))
    return Listed(kind, inner_path(source.root, folder, str(source.root / MODULES_NAME)))


def read_modules(listed: Iterable[Listed], start: str) -> tuple[tuple[Module, ...], dict[str, Floats]]:
    """Read the modules behind the first one.

    Args:
        listed: those modules.
        start: what the first one hands on: ``"token_embeddings"``, ``"sentence_embedding"`` or ``"scores"``.

    Returns:
        The modules without those that change nothing, and their tensors (see `SentenceSettings`).

    Raises:
        UnsupportedModelError: a setting that the runtime does not honour; the message names it.
        MismatchError: a file is missing or does not fit its config.
    """
    modules: list[Module] = []
    tensors: dict[str, Floats] = {}
    known = {start}
    for one in listed:
        if one.kind == "Dropout":  # does nothing but in training
            continue
        module, weights = _read(one)
        needed = _input_of(module)
        if needed not in known:
            raise UnsupportedModelError(
                f"{one.folder}: {one.kind} reads {needed}, which no module before it makes."
            )
        known.add(_output_of(module))
        tensors |= {f"{len(modules)}.{name}": values for name, values in weights.items()}
        modules.append(module)
    return tuple(modules), tensors


def _input_of(module: Module) -> str:
    if isinstance(module, Dense):
        return module.input
    return TOKENS if isinstance(module, Pooling | SpladePooling) else SENTENCE


def _output_of(module: Module) -> str:
    return module.output if isinstance(module, Dense) else SENTENCE


def _read(one: Listed) -> tuple[Module, dict[str, Floats]]:
    if one.kind == "Normalize":
        return Normalize(), {}
    config = _read_config(one)
    if one.kind == "Pooling":
        return _pooling(one, config), {}
    if one.kind == "SpladePooling":
        return _splade(one, config), {}
    if one.kind == "LayerNorm":
        _check_keys(one, config, {"dimension"})
        return LayerNorm(), _read_weights(one, {"norm.weight": "weight", "norm.bias": "bias"}, set())
    return _dense(one, config)


def _read_config(one: Listed) -> dict[str, Any]:
    path = one.folder / "config.json"
    if not path.is_file():
        raise MismatchError(f"{path} is missing, which {MODULES_NAME} asks for: fetch the model again.")
    return read_section(path, _CONFIGS[one.kind])


def _check_keys(one: Listed, config: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(config.keys() - known):
        raise UnsupportedModelError(
            f"{one.folder / 'config.json'} has {unknown[0]!r}, which trimserve does not know of {one.kind}: "
            f"expected {', '.join(sorted(known))}."
        )


def _pooling(one: Listed, config: Mapping[str, Any]) -> Pooling:
    _check_keys(one, config, {*_WIDTHS, *_LEGACY_MODES, "pooling_mode", "include_prompt"})
    found = config.get("pooling_mode")
    if found is None:
        # sentence-transformers takes the mean where no mode is on.
        found = [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or ["mean"]
    modes = tuple([found] if isinstance(found, str) else found)
    if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
        raise UnsupportedModelError(
            f"{one.folder / 'config.json'} pools by {unknown[0]!r}: the runtime has "
            f"{', '.join(POOLING_MODES)}."
        )
    return Pooling(modes, bool(config.get("include_prompt", True)))


def _splade(one: Listed, config: Mapping[str, Any]) -> SpladePooling:
    _check_keys(one, config, {*_WIDTHS, "pooling_strategy", "activation_function", "chunk_size"})
    made = SpladePooling(config.get("pooling_strategy", "max"), config.get("activation_function", "relu"))
    if made.strategy not in ("max", "sum") or made.activation not in ("relu", "log1p_relu"):
        raise UnsupportedModelError(
            f"{one.folder / 'config.json'} pools by {made.strategy!r} of {made.activation!r}: the runtime "
            "has max and sum of relu and log1p_relu."
        )
    return made


def _dense(one: Listed, config: Mapping[str, Any]) -> tuple[Dense, dict[str, Floats]]:
    known = {"in_features", "out_features", "bias", "activation_function", "use_residual"}
    _check_keys(one, config, known | {"module_input_name", "module_output_name"})
    activation = read_activation(config.get("activation_function", "torch.nn.Tanh"), one.folder)
    reads = config.get("module_input_name", SENTENCE)
    if activation == "Softmax" and reads == TOKENS:
        raise UnsupportedModelError(
            f"{one.folder}: a Softmax of token vectors runs over the texts of a batch in torch, so a text's "
            "result depends on the others."
        )
    residual = bool(config.get("use_residual"))
    module = Dense(activation, reads, config.get("module_output_name") or reads, residual)
    names = {"linear.weight": "weight"} | ({"linear.bias": "bias"} if config.get("bias", True) else {})
    weights = _read_weights(one, names, {"residual.weight"} if residual else set())
    shape = (config.get("out_features"), config.get("in_features"))
    if weights["weight"].shape != shape:
        raise MismatchError(
            f"{one.folder}: linear.weight is {weights['weight'].shape}, its config says {shape}: fetch the "
            "model again."
        )
    return module, weights


def read_activation(name: object, origin: Path) -> str:
    """Tell the class of torch.nn that a config names.

    Raises:
        UnsupportedModelError: another function, or none that the runtime has.
    """
    home, _, found = str(name).rpartition(".")
    if home not in _TORCH_HOMES or found not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{origin} names the activation function {name}, which the runtime has not: it has "
            f"{', '.join(sorted(ACTIVATIONS))} of torch.nn."
        )
    return found


def _read_weights(one: Listed, names: Mapping[str, str], optional: set[str]) -> dict[str, Floats]:
    """Read a module's tensors as float32, by the runtime's names."""
    stored = stored_tensors(one.folder)
    missing, others = names.keys() - stored.keys(), stored.keys() - names.keys() - optional
    if missing or others:
        found = f"lacks {sorted(missing)[0]}" if missing else f"also has {sorted(others)[0]}"
        raise MismatchError(f"{one.folder}: the weights of {one.kind} {found}: fetch the model again.")
    renamed = dict(names) | {name: name.partition(".")[0] for name in optional & stored.keys()}
    return {new: stored[old] for old, new in renamed.items()}


def stored_tensors(folder: Path) -> dict[str, Floats]:
    """Read the weights of a module's folder as float32: model.safetensors, else pytorch_model.bin.

    The pickle is read as sentence-transformers reads it: by torch, tensors alone.

    Raises:
        MismatchError: there are none, or they are no floats.
    """
    path = folder / "model.safetensors"
    if path.is_file():
        specs, _ = read_header(path)
        if wrong := [spec for spec in specs.values() if spec.dtype not in _FLOATS]:
            raise MismatchError(f"{path}: {wrong[0].name} is {wrong[0].dtype}, expected floats.")
        return {name: to_float32(np.array(map_tensor(spec)), spec.dtype) for name, spec in specs.items()}
    pickled = folder / "pytorch_model.bin"
    if not pickled.is_file():
        raise MismatchError(
            f"{folder} has no model.safetensors, which {MODULES_NAME} asks for: fetch the model again."
        )
    with foreign(f"{pickled} holds more than tensors", advice="convert it."):
        found = torch.load(pickled, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in found.items()}
