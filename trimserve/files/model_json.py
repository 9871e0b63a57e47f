"""The JSON files of a model's folder: one reader, and what the keys that are used must hold.

A model's own files have many keys that nothing here reads; those may hold anything that is JSON. Infinity and
NaN are allowed in them, because transformers writes them (`time_step_limit`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta

from trimserve.errors import MismatchError
from trimserve.files.checked_json import convert_json, read_json
from trimserve.files.content import check_content

# Rows of the largest vocab that is taken: arrays of this length are made from what a small file says. The
# largest known has about a million.
MOST_ROWS: Final = 1 << 24
FETCH: Final = "fetch the model again."
# Sub-configs that can hold the language model's sizes in a composite model.
TEXT_SECTIONS: Final = ("text_config", "llm_config", "language_config", "decoder", "encoder")

Json: TypeAlias = dict[str, Any]
Rows = Annotated[int, Meta(ge=1, le=MOST_ROWS)]
# A model is built of so many objects before its weights are looked at; known ones have up to 200 layers.
Layers = Annotated[int, Meta(ge=0, le=2_000)]
Experts = Annotated[int, Meta(ge=0, le=4_096)]
Labels = Annotated[int, Meta(ge=0, le=1 << 18)]
# Some configs have -1 for "no such token".
TokenId = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
Ids = TokenId | list[TokenId] | None
Size = Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)]
Number = Size | float
Name = Annotated[str, Meta(max_length=200)]


@dataclass(frozen=True, slots=True)
class _ModelConfig:
    """config.json, and a section of it that describes a language model."""

    model_type: Name | None = None
    architectures: list[Name] | None = None
    tokenizer_class: Name | None = None
    auto_map: Json | None = None
    dtype: str | Json | None = None
    torch_dtype: str | Json | None = None
    vocab_size: Rows | None = None
    vocab_size_per_layer_input: Rows | None = None
    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None
    sep_token_id: Ids = None
    cls_token_id: Ids = None
    decoder_start_token_id: Ids = None
    forced_bos_token_id: Ids = None
    forced_eos_token_id: Ids = None
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool | None = None
    is_causal: bool | None = None
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None
    num_labels: Labels | None = None
    num_hidden_layers: Layers | None = None
    num_layers: Layers | None = None
    num_decoder_layers: Layers | None = None
    encoder_layers: Layers | None = None
    decoder_layers: Layers | None = None
    n_layer: Layers | None = None
    n_layers: Layers | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    n_routed_experts: Experts | None = None
    id2label: dict[str, str | Number | None] | None = None
    problem_type: str | None = None
    rope_scaling: Json | None = None
    rope_parameters: Json | None = None
    sentence_transformers: Json | None = None


@dataclass(frozen=True, slots=True)
class _GenerationConfig:
    """generation_config.json; `generation.fields` says which of its values are served."""

    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None
    decoder_start_token_id: Ids = None
    forced_bos_token_id: Ids = None
    forced_eos_token_id: Ids = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bad_words_ids: list[list[TokenId]] | None = None
    forced_decoder_ids: list[tuple[TokenId, TokenId | None]] | None = None
    sequence_bias: list[tuple[list[TokenId], Number]] | Json | None = None
    do_sample: bool | None = None
    temperature: Number | None = None
    top_k: Size | None = None
    top_p: Number | None = None
    repetition_penalty: Number | None = None
    max_length: Size | None = None
    max_new_tokens: Size | None = None
    num_beams: Size | None = None


@dataclass(frozen=True, slots=True)
class _AddedToken:
    content: str
    special: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None
    normalized: bool | None = None
    single_word: bool | None = None


@dataclass(frozen=True, slots=True)
class _Template:
    name: str
    template: str


@dataclass(frozen=True, slots=True)
class _SpecialTokens:
    """special_tokens_map.json."""

    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    sep_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    cls_token: str | _AddedToken | None = None
    mask_token: str | _AddedToken | None = None
    additional_special_tokens: list[str | _AddedToken] | dict[str, str | _AddedToken] | None = None
    extra_special_tokens: list[str | _AddedToken] | dict[str, str | _AddedToken] | None = None


@dataclass(frozen=True, slots=True)
class _TokenizerConfig(_SpecialTokens):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    auto_map: Json | None = None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern=r"^\d{1,9}$")], _AddedToken] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    # Without a limit it is an integer of 31 digits.
    model_max_length: int | float | None = None
    max_len: int | float | None = None
    extra_ids: Annotated[int, Meta(ge=0, le=10_000)] | None = None  # T5 makes so many tokens
    padding_side: str | None = None
    truncation_side: str | None = None
    chat_template: str | list[_Template] | dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Processor:
    """chat_template.json, of older processors."""

    chat_template: str | list[_Template] | dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Index:
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]
    metadata: Json | None = None


@dataclass(frozen=True, slots=True)
class _Prompts:
    """config_sentence_transformers.json."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: Name | None = None
    similarity_fn_name: Name | None = None
    model_type: Name | None = None
    activation_fn: Name | None = None
    truncate_dim: Size | None = None


@dataclass(frozen=True, slots=True)
class _TransformerConfig:
    """sentence_bert_config.json and its kin."""

    max_seq_length: Size | None = None
    do_lower_case: bool | None = None
    modality_config: Json | None = None


@dataclass(frozen=True, slots=True)
class _Genai:
    """genai_config.json."""

    model: Json | None = None
    search: Json | None = None


@dataclass(frozen=True, slots=True)
class _GenaiModel:
    """The section `model` of it."""

    type: str | None = None
    vocab_size: Rows | None = None
    context_length: Size | None = None
    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None
    decoder: Json | None = None
    encoder: Json | None = None


@dataclass(frozen=True, slots=True)
class _Adapter:
    """adapter_config.json."""

    peft_type: Name | None = None
    task_type: Name | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _CoupledBase:
    """The section `base` of reversible.json."""

    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Coupled:
    """reversible.json, as far as it says where the adapters belong."""

    base: _CoupledBase | None = None


@dataclass(frozen=True, slots=True)
class ListedModule:
    """An entry of modules.json."""

    path: Name
    type: Name
    name: Name = ""
    idx: int | None = None
    kwargs: list[str] | Json | None = None


_KINDS: Final[dict[str, type]] = {
    "config.json": _ModelConfig,
    "generation_config.json": _GenerationConfig,
    "tokenizer_config.json": _TokenizerConfig,
    "special_tokens_map.json": _SpecialTokens,
    "chat_template.json": _Processor,
    "model.safetensors.index.json": _Index,
    "config_sentence_transformers.json": _Prompts,
    "genai_config.json": _Genai,
    "adapter_config.json": _Adapter,
    "reversible.json": _Coupled,
}


def read_model_json(path: Path, *, advice: str = FETCH) -> Json:
    """Read a JSON object of a model's folder, its keys checked by the file's name.

    Args:
        path: the file; one that is absent reads as an empty object.
        advice: what a message says to do next.

    Returns:
        The whole object, keys that are not known here included.

    Raises:
        MismatchError: it is empty or a Git LFS pointer, not JSON, no object, or a key that is used holds
            something else than it should.
    """
    if not path.is_file():
        return {}
    return check_model_object(_read(path, advice), path.name, str(path), advice=advice)


def check_model_object(content: object, name: str, origin: str, *, advice: str = FETCH) -> Json:
    """Check what the JSON file of a model's folder holds, by the file's name.

    Args:
        content: what `parse_json` gave.
        name: of the file.
        origin: where it stands, as the subject of the message.
        advice: what a message says to do next.

    Raises:
        MismatchError: see `read_model_json`.
    """
    if not isinstance(content, dict):
        raise MismatchError(f"{origin} should hold a JSON object: {advice}")
    _check(name, content, origin, advice)
    return content


def read_modules(path: Path) -> tuple[ListedModule, ...]:
    """Read modules.json.

    Raises:
        MismatchError: it is no list of modules.
    """
    return convert_json(_read(path, FETCH), tuple[ListedModule, ...], str(path), advice=FETCH, exact=False)


def read_section(path: Path, kind: type[Any]) -> Json:
    """Read a JSON object that has a schema of its own.

    Raises:
        MismatchError: see `read_model_json`.
    """
    content = read_model_json(path)
    convert_json(content, kind, str(path), advice=FETCH, exact=False)
    return content


def _read(path: Path, advice: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    check_content(path)
    return read_json(path, advice=advice, finite=False)


def _check(name: str, content: Json, origin: str, advice: str) -> None:
    if name.startswith("sentence_") and name.endswith("bert_config.json"):
        convert_json(content, _TransformerConfig, origin, advice=advice, exact=False)
    elif name == "added_tokens.json":
        convert_json(content, dict[str, TokenId], origin, advice=advice, exact=False)
    elif name in _KINDS:
        convert_json(content, _KINDS[name], origin, advice=advice, exact=False)
    if name == "genai_config.json" and isinstance(content.get("model"), dict):
        convert_json(content["model"], _GenaiModel, f"{origin}: model", advice=advice, exact=False)
    if name == "config.json":
        sections = {key: content.get(key) for key in TEXT_SECTIONS}
        for key, section in sections.items():
            if isinstance(section, dict):
                convert_json(section, _ModelConfig, f"{origin}: {key}", advice=advice, exact=False)
