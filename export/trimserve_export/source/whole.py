"""Give any model as one that libraries load: restored, adapters merged, dequantised, wrappers' names off."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from trimserve.errors import MissingExtraError, UsageError
from trimserve.files.scratch import scratch_folder
from trimserve.files.tensors import TensorSource, WholeTensor, exhaust, write_tensors
from trimserve.finetune.restoring import full_source, is_compact
from trimserve.folder.names import ADAPTER_CONFIG, COUPLED_CONFIG
from trimserve.model.packed.checkpoint import PackedCheckpoint
from trimserve.model.packed.settings import PACKED_CONFIGS
from trimserve.model.resolve import resolve_model
from trimserve.model.source import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, ModelSource


@contextlib.contextmanager
def whole_source(
    source: ModelSource,
    base: str | Path | ModelSource | None = None,
    *,
    adapter: str | Path | None = None,
    near: Path | None = None,
    renamed: bool = False,
    dequantize: bool = True,
    trust_remote_code: bool = False,
) -> Iterator[ModelSource]:
    """Give a model as a full one; what has to be made lies in a temporary folder for the block.

    Args:
        source: a model, a compact checkpoint of fine-tuning, or an adapter, which is merged into the model
            that its config names.
        base: see `trimserve.finetune.restoring`.
        adapter: a folder or hub id of an adapter to merge into the model.
        near: the folder to make the temporary one in; the system's by default.
        renamed: also write a checkpoint anew whose tensors have names of a wrapper, for other libraries.
        dequantize: make floats of a GGUF file, as of all other integers; else it stays what it is, unless
            an adapter is merged.
        trust_remote_code: allow code that the model folder brings.

    Raises:
        TrimserveError: see `trimserve.finetune.restoring` and `trimserve_export.source.adapter`.
    """
    beside = near if near is not None and os.access(near, os.W_OK) else None
    with contextlib.ExitStack() as stack:

        def scratch() -> Path:
            return stack.enter_context(scratch_folder("source", beside))

        if source.has_quantized_rows and (dequantize or adapter is not None):
            source = _dequantized(source, scratch)
        elif (packed := source.packed_checkpoint()) is not None:
            source = _unpacked(source, packed, scratch())
        own, brought = _parts_of(source, adapter)
        if brought is not None:
            merged = _merged(own, brought, scratch(), trust_remote_code=trust_remote_code)
            # An adapter that names its base is a model by itself, and found again by its own name.
            own = merged if adapter is not None else replace(merged, name=source.name, adapter=None)
        whole = stack.enter_context(full_source(own, base, near=near))
        if is_multimodal(whole):
            from trimserve_export.source.language_model import language_model_of

            whole = language_model_of(whole, scratch(), trust_remote_code=trust_remote_code)
        if renamed and whole.graph is None and whole.is_wrapped:
            whole = _write_renamed(whole, scratch())
        yield whole


def _dequantized(source: ModelSource, scratch: Callable[[], Path]) -> ModelSource:
    """A GGUF file's model as a checkpoint of float32."""
    if source.gguf is None:
        return source
    folder = scratch()
    for file in source.path.iterdir():
        shutil.copyfile(file, folder / file.name)
    source.gguf.write_weights(folder / WEIGHTS_NAME)
    return replace(source, path=folder)


def _unpacked(source: ModelSource, packed: PackedCheckpoint, folder: Path) -> ModelSource:
    """A model of AWQ, GPTQ or compressed-tensors as a checkpoint of float32."""
    weights = (*(path.name for path in source.weight_files), INDEX_NAME)
    link_files(source.path, folder, (*weights, CONFIG_NAME, *PACKED_CONFIGS))
    left_out = ("quantization_config", "compression_config", "torch_dtype")
    config = {key: value for key, value in source.config.items() if key not in left_out}
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", "utf-8")
    packed.write_weights(folder / WEIGHTS_NAME)
    return replace(source, path=folder, made_of=source.recorded_files, packed=packed)


def _merged(base: ModelSource, adapter: ModelSource, folder: Path, *, trust_remote_code: bool) -> ModelSource:
    """A model with an adapter of peft's merged into it, or reversible adapters put on it."""
    if (adapter.path / COUPLED_CONFIG).is_file():
        from trimserve_export.source.coupled_adapter import put_adapters_on

        return put_adapters_on(base, adapter, folder, trust_remote_code=trust_remote_code)
    from trimserve_export.source.adapter import merge_adapter

    return merge_adapter(base, adapter, folder, trust_remote_code=trust_remote_code)


def is_adapter(source: ModelSource) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    brings = any((source.path / name).is_file() for name in (ADAPTER_CONFIG, COUPLED_CONFIG))
    return brings and not source.has_weights and source.graph is None


def is_multimodal(source: ModelSource) -> bool:
    """Whether a checkpoint is one of several modalities, whose language model generates text."""
    if source.graph is not None or source.config.get("is_encoder_decoder"):
        return False
    architecture = next(iter(source.config.get("architectures") or ()), "")
    has_section = isinstance(source.config.get("text_config"), dict)
    return has_section and architecture.endswith("ForConditionalGeneration")


def _parts_of(source: ModelSource, adapter: str | Path | None) -> tuple[ModelSource, ModelSource | None]:
    """The model itself, and the adapter to merge into it."""
    if adapter is not None:
        if is_adapter(source):
            raise UsageError(
                f"{source.name} is an adapter itself: pass the model that it belongs to with -m, or leave "
                "--adapter out."
            )
        return source, resolve_model(adapter)
    if is_adapter(source):
        return _base_of(source), source
    for config, weights in ((ADAPTER_CONFIG, "adapter_model.*"), (COUPLED_CONFIG, "reversible.safetensors")):
        has_both = (source.path / config).is_file() and any(source.path.glob(weights))
        if has_both and not is_compact(source.path):
            raise UsageError(
                f"{source.name} holds a model and an adapter: pass --adapter {source.name} to merge it, or "
                f"move {config} away."
            )
    return source, None


def _base_of(adapter: ModelSource) -> ModelSource:
    """The model that an adapter belongs to, as its config names it."""
    if (adapter.path / COUPLED_CONFIG).is_file():
        base = adapter.read_json(COUPLED_CONFIG).get("base") or {}
        name, revision = base.get("name"), base.get("revision")
    else:
        config = adapter.read_json(ADAPTER_CONFIG)
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    advice = f"pass -m BASE --adapter {adapter.name}."
    if not isinstance(name, str) or not name:
        raise UsageError(
            f"{adapter.name} is an adapter and does not name the model that it belongs to: {advice}"
        )
    beside = adapter.path / name
    local = next((path for path in (Path(name), beside) if path.is_dir()), None)
    try:
        return resolve_model(local) if local is not None else resolve_model(name, revision=revision)
    except (UsageError, MissingExtraError) as error:
        raise UsageError(
            f"{adapter.name} is an adapter of {name}, which is not at hand ({error}): {advice}"
        ) from error


def link_files(source: Path, folder: Path, left_out: Collection[str]) -> None:
    """Link the files of a folder, but for some of its own, into an empty one."""
    for path in sorted(source.rglob("*")):
        copy = folder / path.relative_to(source)
        if path.is_file() and not (path.parent == source and path.name in left_out):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path.resolve())


def _write_renamed(source: ModelSource, folder: Path) -> ModelSource:
    """Stream a checkpoint into another folder, its tensors by the names that they have in the model."""
    link_files(source.path, folder, (*(path.name for path in source.weight_files), INDEX_NAME))
    for file, (specs, metadata) in source.headers.items():
        tensors: dict[str, TensorSource] = {name: WholeTensor(spec) for name, spec in specs.items()}
        exhaust(write_tensors(folder / file.name, tensors, metadata))
    if index := source.read_json(INDEX_NAME):
        names = {name: file.name for file, (specs, _) in source.headers.items() for name in specs}
        (folder / INDEX_NAME).write_text(json.dumps(index | {"weight_map": names}), "utf-8")
    return replace(source, path=folder, made_of=source.recorded_files)
