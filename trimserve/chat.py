"""Render a folder's own chat template, as transformers does, without transformers.

A template is a program that came with the model, so it runs in Jinja2's sandbox. The environment below is
the documented one of https://huggingface.co/docs/transformers/chat_templating_writing: trimmed blocks, loop
controls, `tojson`, `raise_exception`, `strftime_now` and the `generation` block.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trimserve.errors import UsageError, require
from trimserve.folder import TrimmedFolder
from trimserve.source import ModelSource
from trimserve.text import read_json, tokenizer_settings
from trimserve.tokenizer_settings import declared_settings

if TYPE_CHECKING:
    import jinja2

TEMPLATE_NAME = "chat_template.jinja"
# A message: {"role": "user", "content": "..."} and whatever else the template reads.
Message = Mapping[str, Any]


def render_chat(
    folder: TrimmedFolder,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,  # noqa: ANN401 - whatever the template reads
) -> str:
    """Render messages to the prompt that the model was trained on.

    Args:
        folder: a folder with a chat template, in its own file or in tokenizer_config.json.
        messages: role and content each, oldest first.
        add_generation_prompt: end with the opening of the assistant's answer.
        **variables: further variables of the template, such as ``tools`` or ``enable_thinking``.

    Raises:
        UsageError: there is no chat template, or it refuses these messages.
        MissingExtraError: jinja2 is not installed.
    """
    template = ChatTemplate(find_template(folder, tools=bool(variables.get("tools"))), special_tokens(folder))
    return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template by itself.

    Attributes:
        source: the Jinja program.
        special_tokens: the texts of bos_token and others, which it can print.
    """

    source: str
    special_tokens: Mapping[str, str]

    @classmethod
    def of_model(cls, model: ModelSource) -> Self:
        """The template of a model's folder.

        Raises:
            UsageError: it has none.
        """
        config = model.read_json("tokenizer_config.json")
        tokens = declared_settings(config, model.read_json("special_tokens_map.json"))["special_tokens"]
        if (model.path / TEMPLATE_NAME).is_file():
            return cls((model.path / TEMPLATE_NAME).read_text("utf-8"), tokens)
        return cls(_declared_template(config, model.path), tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,  # noqa: ANN401 - whatever the template reads
    ) -> str:
        """Render messages; see `render_chat`."""
        jinja = require("jinja2", extra="chat", purpose="a chat template")
        context = {**self.special_tokens, "tools": None, "documents": None} | variables
        try:
            template = _compiled(self.source)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except jinja.TemplateError as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error


@cache
def _compiled(source: str) -> "jinja2.Template":
    return _environment().from_string(source)


def find_template(folder: TrimmedFolder, *, tools: bool = False) -> str:
    """The template's source: `chat_template.jinja`, else the entry of tokenizer_config.json.

    Of several named templates "default" is taken, or "tool_use" where tools are given.

    Raises:
        UsageError: the folder has none.
    """
    if TEMPLATE_NAME in folder.manifest.files:
        return folder.file(TEMPLATE_NAME).read_text("utf-8")
    return _declared_template(read_json(folder, "tokenizer_config.json"), folder.path, tools=tools)


def _declared_template(config: Mapping[str, Any], path: Path, *, tools: bool = False) -> str:
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        entry = named.get("tool_use" if tools and "tool_use" in named else "default")
    if not isinstance(entry, str):
        raise UsageError(f"{path} has no chat template: pass the prompt as text instead.")
    return entry


def special_tokens(folder: TrimmedFolder) -> dict[str, str]:
    """The tokenizer's special tokens by name, which templates use as variables."""
    tokens: dict[str, str] = tokenizer_settings(folder)["special_tokens"]
    return tokens


def _environment() -> "jinja2.Environment":
    from jinja2 import ext, nodes, sandbox  # present: render_chat asked for it

    class GenerationBlock(ext.Extension):
        """``{% generation %}`` marks the assistant's text for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

        def parse(self, parser: Any) -> Any:  # noqa: ANN401 - jinja2's own signature
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    return environment


def _to_json(
    value: Any,  # noqa: ANN401 - any JSON value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without Jinja2's HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as templates expect
