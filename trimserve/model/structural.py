"""Structural ids: those that a model needs whatever the domain says, and that are never dropped."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.folder.positions import PAD_POSITION_MODELS
from trimserve.model.sentence import PROMPTS_NAME
from trimserve.model.source import ModelSource
from trimserve.text.chat import chat_templates
from trimserve.text.tokenizer import ids_of_tokens, newline_ids, tokenizer_border, tokenizer_ids

CONFIG_NAMES = ("config.json", "generation_config.json", "genai_config.json")
TOKEN_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
# fmt: off
# Keys of (generation) configs that hold token ids under names without `token_id`.
_ID_KEYS = frozenset({
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
    "image_token_index", "audio_token_index", "video_token_index",
})
# fmt: on
_ID_KEY = re.compile(r"_token_ids?$")
_ROLES = ("system", "user", "assistant", "tool", "developer", "model", "function", "ipython")
_TAG = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


@tokenizer_border
def structural_ids(source: ModelSource, tokenizer: Tokenizer | None = None) -> Ids:
    """Find the ids that must stay.

    Special and added tokens; the byte alphabet or byte-fallback pieces; unk; ids named in the configs of
    model, generation and tokenizer and in the post-processor; newline tokens; the chat template's
    literals; sentence-transformers' prompts; and 0..pad where the model computes positions from the pad id.

    Args:
        source: the model's files.
        tokenizer: its tokenizer, if already loaded.

    Returns:
        int32 token ids, strictly increasing, all below ``source.vocab_size``.
    """
    tokenizer = tokenizer or source.tokenizer()
    ids = chain(
        tokenizer.get_added_tokens_decoder(),
        tokenizer_ids(tokenizer),
        (id_ for name in CONFIG_NAMES for id_ in config_ids(source.read_json(name))),
        ids_of_tokens(
            tokenizer, (token for name in TOKEN_NAMES for token in named_tokens(source.read_json(name)))
        ),
        newline_ids(tokenizer),
        template_ids(tokenizer, all_templates(source)),
        prompt_ids(tokenizer, sentence_prompts(source)),
        pad_position_ids(source),
    )
    found = np.unique(np.fromiter(ids, np.int64))
    return found[(found >= 0) & (found < source.vocab_size)].astype(np.int32)


def config_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield the token ids that a config names, nested configs included."""
    for key, value in config.items():
        if key == "forced_decoder_ids":  # pairs of position and id
            yield from (id_ for _, id_ in value or () if isinstance(id_, int))
        elif key in _ID_KEYS or _ID_KEY.search(key):
            yield from _integers(value)
        elif isinstance(value, dict):
            yield from config_ids(value)


def _integers(value: object) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_integers, value))


def named_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """Yield the tokens that a tokenizer_config.json or special_tokens_map.json names, such as eos."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for value in chain(named, settings.get("additional_special_tokens") or ()):
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            yield content


def all_templates(source: ModelSource) -> list[str]:
    """The chat templates that a folder can be asked for, those in a folder of their own too."""
    others = sorted(source.path.glob("additional_chat_templates/*.jinja"))
    texts = (source.read_text(file.relative_to(source.path).as_posix()) for file in others)
    return [*chat_templates(source).values(), *filter(None, texts)]


def template_ids(tokenizer: Tokenizer, templates: Iterable[str]) -> Iterator[int]:
    """Yield the ids that the tokenizer gives for the literals of chat templates and the roles' names."""
    literals = {literal for template in templates for literal in template_literals(template)}
    if not literals:
        return
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    # A literal follows a special token, a newline or a space; each can change its first token.
    leads = ("", "\n", " ", *special[:1])
    texts = {lead + text for text in literals | set(_ROLES) for lead in leads}
    texts |= {text.strip() for text in literals} | {role + "\n" for role in _ROLES}
    for encoding in tokenizer.encode_batch_fast(sorted(texts), add_special_tokens=False):
        yield from encoding.ids


def sentence_prompts(source: ModelSource) -> list[str]:
    """The prompts that sentence-transformers puts before a folder's texts."""
    prompts = source.read_root_json(PROMPTS_NAME).get("prompts")
    named = prompts.values() if isinstance(prompts, dict) else ()
    return [text for text in named if isinstance(text, str) and text]


def prompt_ids(tokenizer: Tokenizer, prompts: Iterable[str]) -> Iterator[int]:
    """Yield the ids that the tokenizer gives for prompts, which stand at the start of many texts."""
    texts = sorted({text for prompt in prompts for text in (prompt, prompt.strip())})
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield from encoding.ids


def template_literals(template: str) -> set[str]:
    """Find the texts a Jinja template can print: what stands outside tags, and strings inside them.

    Example:
        >>> sorted(template_literals("<s>{{ message['role'] + ':' }}"))
        [':', '<s>', 'role']
    """
    outside = _TAG.split(template)
    tags = (tag for tag in _TAG.findall(template) if not tag.startswith("{#"))
    strings = (match for tag in tags for match in _STRING.findall(tag))
    inside = (_ESCAPE.sub(_unescape, single or double) for single, double in strings)
    return {text for text in chain(outside, inside) if text}


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[1], match[1])


def pad_position_ids(source: ModelSource) -> range:
    """0..pad where the model computes position ids from the pad id, else nothing."""
    for config in source.text_configs():
        pad = config.get("pad_token_id")
        if config.get("model_type") in PAD_POSITION_MODELS:
            return range((pad if isinstance(pad, int) else 1) + 1)  # 1 is these models' default
    return range(0)
