"""Read all that sentence-transformers does around a model: modules, prompts, limits and activation.

As `SentenceTransformer(folder)`, `SparseEncoder(folder)` or `CrossEncoder(folder)` reads it: the class is the
one that config_sentence_transformers.json names.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trimserve.arrays import Floats
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.content import check_content
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.folder.sentence import (
    KINDS,
    SCORES,
    SENTENCE,
    SIMILARITIES,
    TOKENS,
    Dense,
    Kind,
    Pooling,
    PoolingMode,
    SentenceSettings,
    SpladePooling,
)
from trimserve.model.sentence import MODULES_NAME, PROMPTS_NAME, TRANSFORMER_CONFIGS
from trimserve.model.source import ModelSource
from trimserve.text.chat import chat_templates
from trimserve.text.tokenizer import parse_tokenizer
from trimserve_export.checkpoint.sentence_modules import (
    STATIC,
    Listed,
    is_sentence_transformers,
    list_modules,
    read_activation,
    read_modules,
)
from trimserve_export.checkpoint.source_tokenizer import load_tokenizer

_CONFIG_KEYS = {
    "__version__",
    "model_type",
    "prompts",
    "default_prompt_name",
    "similarity_fn_name",
    "truncate_dim",
    "activation_fn",
    "max_active_dims",
    "requirements",
}
_TASKS = {
    "feature-extraction": "feature-extraction",
    "fill-mask": "fill-mask",
    "sequence-classification": "text-classification",
}
_OUTPUTS = {"feature-extraction": "last_hidden_state", "fill-mask": "logits", "text-classification": "logits"}
# Arguments of from_pretrained that change no number in fp32.
_HARMLESS = {
    "trust_remote_code",
    "attn_implementation",
    "torch_dtype",
    "dtype",
    "add_pooling_layer",
    "use_safetensors",
    "low_cpu_mem_usage",
    "use_fast",
    "padding_side",
    "model_max_length",
}
_ARGUMENTS = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "config_args",
    "config_kwargs",
)
# What changes nothing, or is looked at by itself.
_TRANSFORMER_KEYS = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "unpad_inputs",
    *_ARGUMENTS,
}


@dataclass(frozen=True, slots=True)
class Declared:
    """What a folder declares.

    Attributes:
        settings: for the runtime.
        tensors: of its modules.
    """

    settings: SentenceSettings
    tensors: Mapping[str, Floats]


def task_of_modules(source: ModelSource) -> str:
    """The task of the graph that a sentence-transformers folder needs.

    Raises:
        UnsupportedModelError: one that is not served; the message names it.
    """
    first = list_modules(source)[0]
    if first.kind == STATIC:
        return "feature-extraction"
    asked = _transformer_config(first).get("transformer_task") or (
        "fill-mask" if first.kind == "MLMTransformer" else "feature-extraction"
    )
    if asked not in _TASKS:
        raise UnsupportedModelError(
            f"{source.name} asks for the transformer task {asked!r}, which is not served: expected one of "
            f"{', '.join(_TASKS)}."
        )
    return _TASKS[asked]


def read_declared(
    source: ModelSource, task: str, config: PretrainedConfig | None, *, in_graph: bool = False
) -> Declared | None:
    """Read what a folder declares for a task.

    Args:
        source: the model.
        task: what its graph does.
        config: the model's config; None where it has none that transformers knows.
        in_graph: the modules are part of the graph, which gives the embedding itself.

    Returns:
        None where nothing is done around the graph.

    Raises:
        UnsupportedModelError: something that the runtime does not honour; the message names it.
        MismatchError: a file is missing or damaged.
    """
    if is_sentence_transformers(source) and (in_graph or task == task_of_modules(source)):
        return _read_folder(source, task, config, in_graph=in_graph)
    if in_graph:
        return Declared(SentenceSettings(modules=(), graph_output=SENTENCE), {})
    if task == "text-classification":
        return Declared(_cross_encoder(source, config), {})
    if task == "feature-extraction":
        return Declared(SentenceSettings(modules=(Pooling((_default_mode(source),)),)), {})
    return None


def _default_mode(source: ModelSource) -> PoolingMode:
    """The last token for what was trained as a causal language model, as sentence-transformers takes it."""
    name = next(iter(source.config.get("architectures") or ()), "")
    return "lasttoken" if name.endswith("ForCausalLM") and source.config.get("is_causal", True) else "mean"


def _read_folder(
    source: ModelSource, task: str, config: PretrainedConfig | None, *, in_graph: bool
) -> Declared:
    listed = list_modules(source)
    static = listed[0].kind == STATIC
    start = SCORES if task == "text-classification" else SENTENCE if static else TOKENS
    modules, tensors = read_modules(listed[1:], start)
    settings = _with_prompts(SentenceSettings(modules=modules, graph_output=start), source)
    if static:
        settings = _static(settings, source)
        # The mean over tokens stands before the modules, which are counted anew.
        tensors = {_next_name(name): values for name, values in tensors.items()}
    else:
        settings = _with_transformer(settings, source, listed[0], task, config)
    if settings.drops_prompt:
        settings = dataclasses.replace(settings, prompt_ends=_special_ids(source))
    if settings.kind == "CrossEncoder":
        settings = _with_activation(settings, source, _labels(settings, tensors, source, config))
    _check(settings, task, source)
    if not in_graph:
        return Declared(settings, tensors)
    if settings.drops_prompt:
        raise UnsupportedModelError(
            f"{source.name} pools without its prompt (include_prompt), which its graph does not: export the "
            "checkpoint."
        )
    return Declared(dataclasses.replace(settings, modules=(), graph_output=SENTENCE), {})


def _check(settings: SentenceSettings, task: str, source: ModelSource) -> None:
    """Refuse modules that do not end in what the folder's class gives."""
    made = {module.output if isinstance(module, Dense) else SENTENCE for module in settings.modules}
    made.add(settings.graph_output)
    wanted = SCORES if settings.kind == "CrossEncoder" else SENTENCE
    if wanted not in made:
        raise UnsupportedModelError(
            f"{source.root / MODULES_NAME} makes no {wanted}, which a {settings.kind} gives: it makes "
            f"{', '.join(sorted(made))}."
        )
    splade = [index for index, module in enumerate(settings.modules) if isinstance(module, SpladePooling)]
    if splade != ([0] if task == "fill-mask" else []):
        raise UnsupportedModelError(
            f"{source.root / MODULES_NAME}: SpladePooling has to stand right behind a masked language model, "
            "and only there."
        )


def _static(settings: SentenceSettings, source: ModelSource) -> SentenceSettings:
    """A static embedding is the mean of its tokens' rows; its tokenizer cuts as tokenizer.json says."""
    path = source.path / TOKENIZER_NAME
    check_content(path)
    truncation = parse_tokenizer(path.read_bytes(), str(path), as_stored=True).truncation or {}
    if truncation.get("strategy", "longest_first") != "longest_first" or truncation.get("stride", 0):
        raise UnsupportedModelError(f"{path} truncates in an unusual way: {truncation}.")
    return dataclasses.replace(
        settings,
        modules=(Pooling(), *settings.modules),
        graph_output=TOKENS,
        special_tokens=False,
        max_tokens=truncation.get("max_length"),
    )


def _next_name(name: str) -> str:
    index, _, part = name.partition(".")
    return f"{int(index) + 1}.{part}"


def _with_prompts(settings: SentenceSettings, source: ModelSource) -> SentenceSettings:
    """What config_sentence_transformers.json says."""
    config = source.read_root_json(PROMPTS_NAME)
    if unknown := sorted(config.keys() - _CONFIG_KEYS):
        raise UnsupportedModelError(
            f"{source.root / PROMPTS_NAME} has {unknown[0]!r}, which trimserve does not know: expected "
            f"{', '.join(sorted(_CONFIG_KEYS))}."
        )
    kind = config.get("model_type", "SentenceTransformer")
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{source.name} is a {kind}, which is not served: {', '.join(KINDS)} are."
        )
    prompts = _prompts(kind, config, source)
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise UnsupportedModelError(
            f"{source.root / PROMPTS_NAME} names the default prompt {default!r}, but has "
            f"{', '.join(map(repr, prompts)) or 'none'}."
        )
    similarity = config.get("similarity_fn_name") or ("dot" if kind == "SparseEncoder" else "cosine")
    if similarity not in SIMILARITIES:
        raise UnsupportedModelError(
            f"{source.root / PROMPTS_NAME} compares by {similarity!r}: the runtime has "
            f"{', '.join(SIMILARITIES)}."
        )
    return dataclasses.replace(
        settings,
        kind=kind,
        prompts=prompts,
        default_prompt_name=default,
        similarity=similarity,
        truncate_dim=_count(config, "truncate_dim", source.root / PROMPTS_NAME),
        max_active_dims=_count(config, "max_active_dims", source.root / PROMPTS_NAME),
    )


def _prompts(kind: Kind, config: Mapping[str, Any], source: ModelSource) -> dict[str, str]:
    stored = config.get("prompts") or {}
    if not isinstance(stored, dict) or not all(isinstance(text, str | None) for text in stored.values()):
        raise MismatchError(f"{source.root / PROMPTS_NAME}: prompts should map names to texts.")
    # These two exist, empty, in every model that embeds.
    always = {} if kind == "CrossEncoder" else {"query": "", "document": ""}
    return always | {name: text or "" for name, text in stored.items()}


def _count(config: Mapping[str, Any], key: str, path: Path) -> int | None:
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise MismatchError(f"{path}: {key} should be a number above 0, found {value!r}.")
    return value


def _transformer_config(first: Listed) -> dict[str, Any]:
    source = ModelSource(str(first.folder), None, first.folder)
    return next((found for name in TRANSFORMER_CONFIGS if (found := source.read_json(name))), {})


def _with_transformer(
    settings: SentenceSettings, source: ModelSource, first: Listed, task: str, config: PretrainedConfig | None
) -> SentenceSettings:
    """What the transformer's own config says: longest input, lower case, and what is not honoured."""
    declared = _transformer_config(first)
    _check_transformer(declared, first, task)
    tokenizer = declared.get("tokenizer_args") or declared.get("processor_kwargs") or {}
    longest = _count(tokenizer, "model_max_length", first.folder) or _count(
        declared, "max_seq_length", first.folder
    )
    return dataclasses.replace(
        settings,
        max_tokens=_limit(source, config) if longest is None else longest,
        type_ids=_feeds_type_ids(source, pairs=settings.kind == "CrossEncoder"),
    )


def _check_transformer(declared: Mapping[str, Any], first: Listed, task: str) -> None:
    """Refuse by name what the runtime does not do."""
    unknown = [key for key, value in declared.items() if value is not None and key not in _TRANSFORMER_KEYS]
    for arguments in (declared.get(key) or {} for key in _ARGUMENTS):
        unknown += [key for key, value in arguments.items() if value is not None and key not in _HARMLESS]
    if declared.get("processing_kwargs") == {}:
        unknown.remove("processing_kwargs")
    if unknown:
        raise UnsupportedModelError(
            f"the transformer's config in {first.folder} has {unknown[0]!r}, which the runtime does "
            "not honour."
        )
    read = declared.get("modality_config") or {}
    text = {"method": "forward", "method_output_name": _OUTPUTS[task]}
    if read and read != {"text": text}:
        raise UnsupportedModelError(
            f"the transformer's config in {first.folder} reads its input as {', '.join(map(repr, read))}: "
            f"only plain text by {text} is served, chat messages, images and sound are not."
        )
    made = declared.get("module_output_name")
    if made not in (None, SCORES if task == "text-classification" else TOKENS):
        raise UnsupportedModelError(
            f"the transformer's config in {first.folder} makes {made!r}, not {TOKENS}."
        )


def _limit(source: ModelSource, config: PretrainedConfig | None) -> int | None:
    """The tokenizer's limit or the model's positions, whichever is less."""
    settings = source.read_json("tokenizer_config.json")
    positions = source.config if config is None else config.to_dict()
    declared = getattr(config, "max_position_embeddings", positions.get("max_position_embeddings"))
    limits = (settings.get("model_max_length", settings.get("max_len")), declared)
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1 << 24]
    return min(known, default=None)


def _feeds_type_ids(source: ModelSource, *, pairs: bool) -> bool:
    """Whether the tokenizer's type ids reach the model: transformers drops those of some classes."""
    encodings = [source.tokenizer().encode("a", "b" if pairs else None)]
    if not any(type_id for encoding in encodings for type_id in encoding.type_ids):
        return True  # zeros either way
    try:
        names = load_tokenizer(source).model_input_names
    except UnsupportedModelError:  # no class for it: tokenizer.json alone counts
        return True
    return "token_type_ids" in names


def _special_ids(source: ModelSource) -> tuple[int, ...]:
    """What the source's library calls special: the tokens that have a role in its tokenizer."""
    return tuple(sorted(set(load_tokenizer(source).all_special_ids)))


def _cross_encoder(source: ModelSource, config: PretrainedConfig | None) -> SentenceSettings:
    """A classifier without modules.json, which `CrossEncoder(folder)` reads by config.json alone."""
    reason = None
    if chat_templates(source):
        reason = "its tokenizer has a chat template, which sentence-transformers writes each pair with"
    settings = SentenceSettings(
        kind="CrossEncoder",
        modules=(),
        graph_output=SCORES,
        type_ids=_feeds_type_ids(source, pairs=True),
        no_pairs=reason,
    )
    return _with_activation(settings, source, _labels(settings, {}, source, config))


def _with_activation(settings: SentenceSettings, source: ModelSource, labels: int) -> SentenceSettings:
    """The scores' activation: a sigmoid for one label where no config names another."""
    named = (
        source.read_root_json(PROMPTS_NAME).get("activation_fn") if is_sentence_transformers(source) else None
    )
    if named is None:
        own = source.config.get("sentence_transformers")
        if isinstance(own, dict) and "activation_fn" in own:
            named = own["activation_fn"]
        else:
            named = source.config.get("sbert_ce_default_activation_function")
    if named is not None:
        return dataclasses.replace(settings, activation=read_activation(named, source.path))
    return dataclasses.replace(settings, activation="Sigmoid" if labels == 1 else "Identity")


def _labels(
    settings: SentenceSettings,
    tensors: Mapping[str, Floats],
    source: ModelSource,
    config: PretrainedConfig | None,
) -> int:
    """Scores a pair: of the last layer that makes them, else of the model's head."""
    for index, module in reversed(list(enumerate(settings.modules))):
        if isinstance(module, Dense) and module.output == SCORES:
            return int(tensors[f"{index}.weight"].shape[0])
    if config is not None:
        labels: Any = config.num_labels
        return int(labels)
    return len(source.config.get("id2label") or range(int(source.config.get("num_labels", 2))))
