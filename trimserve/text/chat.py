"""Render a folder's own chat template, as transformers does, without transformers.

A template is a program that came with the model, so it runs in a sandbox (`trimserve.text.sandbox`) and on a
budget (`trimserve.text.budget`), and whatever it raises is its own fault, said in one sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from trimserve.errors import MismatchError, UsageError, require
from trimserve.foreign import foreign, reason

if TYPE_CHECKING:
    import jinja2

# transformers' own file, before the entry of tokenizer_config.json, before the file of older processors.
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json")
_COMPILED = 32  # templates
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
    check_messages(messages)
    template = ChatTemplate.of(folder, tools=bool(variables.get("tools")))
    return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


def check_messages(messages: object) -> None:
    """Refuse what is no conversation.

    What a message's content may be (a text, parts, nothing where a tool is called) is the template's to say.

    Raises:
        UsageError: no list of mappings, or one without a role that is a text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(
            f"messages should be a list of {{'role': ..., 'content': ...}}, found {_kind(messages)}: pass "
            "the whole conversation as a list."
        )
    for place, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UsageError(
                f"message {place} should be {{'role': ..., 'content': ...}}, found {_kind(message)}: pass a "
                "dict."
            )
        if not isinstance(message.get("role"), str):
            raise UsageError(
                f"message {place} should have a role that is a text, found {_kind(message.get('role'))}: "
                "give it a role such as 'user'."
            )


def _kind(value: object) -> str:
    return "none" if value is None else type(value).__name__


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template by itself.

    Attributes:
        source: the Jinja program.
        special_tokens: the texts of bos_token and others, which it can print.
        origin: the file that it stands in, for messages; empty if it is not known.
    """

    source: str
    special_tokens: Mapping[str, str]
    origin: str = ""

    @classmethod
    def of(cls, files: ModelFiles, *, tools: bool = False) -> Self:
        """The template of a folder.

        Of several named templates "default" is taken, or "tool_use" where tools are given.

        Raises:
            UsageError: it has none.
            MismatchError: it has one that is not what a template should be.
        """
        file, named = _found(files)
        name = "tool_use" if tools and "tool_use" in named else "default"
        if name not in named:
            raise UsageError(f"{files.path} has no chat template: pass the prompt as text instead.")
        return cls(named[name], files.tokenizer_settings["special_tokens"], str(files.path / file))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,  # noqa: ANN401 - whatever the template reads
    ) -> str:
        """Render messages; see `render_chat`. Any number of threads may do so at once."""
        require("jinja2", extra="chat", purpose="a chat template")
        from trimserve.text import sandbox

        known = {**self.special_tokens, "tools": None, "documents": None, **variables}
        context = known | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        title = f"the chat template in {self.origin}" if self.origin else "the chat template"
        advice = "mend the messages, or the template."
        with foreign(f"{title} fails on these messages", advice=advice, error=UsageError):
            try:
                with sandbox.budgeted():
                    return sandbox.run(_compiled(self.source), context)
            except sandbox.RefusedError as error:
                raise UsageError(f"{title} refuses these messages: {reason(error)}.") from error


@lru_cache(_COMPILED)
def _compiled(source: str) -> "jinja2.Template":
    from trimserve.text.sandbox import compile_template

    return compile_template(source)


def chat_templates(files: ModelFiles) -> dict[str, str]:
    """The chat templates of a folder, name -> Jinja source; a template without a name is "default".

    The first place that has a template counts: `TEMPLATE_NAME`, then the entries of `TEMPLATE_CONFIGS`.

    Raises:
        MismatchError: the entry of a config is neither a text nor named texts.
    """
    return _found(files)[1]


def _found(files: ModelFiles) -> tuple[str, dict[str, str]]:
    """The file that has the templates, and these."""
    if (source := files.read_text(TEMPLATE_NAME)) is not None:
        return TEMPLATE_NAME, {"default": source}
    for name in TEMPLATE_CONFIGS:
        if named := _by_name(files.read_json(name).get("chat_template"), files.path / name):
            return name, named
    return TEMPLATE_NAME, {}


def _by_name(entry: object, origin: Path) -> dict[str, str]:
    if isinstance(entry, str):
        return {"default": entry}
    if not entry:
        return {}
    named: dict[str, str] = {}
    for item in entry if isinstance(entry, list) else [entry]:  # [{"name": "default", "template": ...}, ...]
        match item:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise MismatchError(
                    f"{origin} should have a chat template that is a text, or a list of names and templates, "
                    f"found {_kind(item)}: fetch the file again."
                )
    return named
