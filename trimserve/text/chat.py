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
from typing import TYPE_CHECKING, Any, Protocol, Self

from trimserve.errors import UsageError, require

if TYPE_CHECKING:
    import jinja2

# transformers' own file, before the entry of tokenizer_config.json, before the file of older processors.
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json")
# A message: {"role": "user", "content": "..."} and whatever else the template reads.
Message = Mapping[str, Any]


class ModelFiles(Protocol):
    """A folder with a model's files: the model's own, or a trimmed one."""

    @property
    def path(self) -> Path:
        """The folder."""

    def read_text(self, name: str) -> str | None:
        """A text file; None where there is none."""

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where there is none."""

    @property
    def tokenizer_settings(self) -> Mapping[str, Any]:
        """See `trimserve.folder.tokenizer_settings`; templates use the special tokens as variables."""


def render_chat(
    folder: ModelFiles,
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
    template = ChatTemplate.of(folder, tools=bool(variables.get("tools")))
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
    def of(cls, files: ModelFiles, *, tools: bool = False) -> Self:
        """The template of a folder.

        Of several named templates "default" is taken, or "tool_use" where tools are given.

        Raises:
            UsageError: it has none.
        """
        named = chat_templates(files)
        name = "tool_use" if tools and "tool_use" in named else "default"
        if name not in named:
            raise UsageError(f"{files.path} has no chat template: pass the prompt as text instead.")
        return cls(named[name], files.tokenizer_settings["special_tokens"])

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


def chat_templates(files: ModelFiles) -> dict[str, str]:
    """The chat templates of a folder, name -> Jinja source; a template without a name is "default".

    The first place that has a template counts: `TEMPLATE_NAME`, then the entries of `TEMPLATE_CONFIGS`.
    """
    if (source := files.read_text(TEMPLATE_NAME)) is not None:
        return {"default": source}
    entries = (files.read_json(name).get("chat_template") for name in TEMPLATE_CONFIGS)
    return next((named for entry in entries if (named := _by_name(entry))), {})


def _by_name(entry: object) -> dict[str, str]:
    if isinstance(entry, str):
        return {"default": entry}
    if not isinstance(entry, list):  # else [{"name": "default", "template": ...}, ...]
        return {}
    return {item["name"]: item["template"] for item in entry if _is_named(item)}


def _is_named(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("name", "template"))


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
