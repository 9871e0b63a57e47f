"""Tools: shown to the model by the folder's own template, and its calls read from what it says.

How a model writes a call depends on its family. The template tells which: it has the same marks.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from trimserve.errors import UsageError
from trimserve.serving.fields import ChatRequest
from trimserve.serving.problems import ApiError, bad_field
from trimserve.text.chat import ChatTemplate, ModelFiles


@dataclass(frozen=True, slots=True)
class Format:
    """How a family writes its calls.

    Attributes:
        mark: in its templates.
        opening: what stands before a call; empty where the call is all of the answer.
        closing: what stands behind it.
        arguments: the key of a call's arguments.
        listed: whether the calls are a JSON list.
    """

    mark: str
    opening: str
    closing: str
    arguments: str = "arguments"
    listed: bool = False


# Hermes, Qwen 2.5 and 3, SmolLM3; Mistral; Llama 3.1 and later.
HERMES: Final = Format("<tool_call>", "<tool_call>", "</tool_call>")
MISTRAL: Final = Format("[TOOL_CALLS]", "[TOOL_CALLS]", "", listed=True)
LLAMA: Final = Format('"parameters"', "", "", "parameters")
FORMATS: Final = (HERMES, MISTRAL, LLAMA)
_PYTHON_TAG: Final = "<|python_tag|>"  # Llama 3.1 writes it before some calls


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request.

    Attributes:
        tools: as the template prints them.
        format: how calls are written.
        forced: the names of which one must be called; empty where the model chooses.
        several: whether more than one call may come.
    """

    tools: tuple[dict[str, Any], ...]
    format: Format
    forced: tuple[str, ...] = ()
    several: bool = True

    @classmethod
    def of(cls, fields: ChatRequest, files: ModelFiles) -> Self | None:
        """What a request asks for; None where no tool is to be used.

        Raises:
            ApiError: 400, a tool or a choice that is not what it should be, or a template without tools.
        """
        if not fields.tools:
            if fields.tool_choice not in (None, "none", "auto"):
                raise bad_field("tool_choice", "tool_choice needs tools: send them, or leave it out.")
            return None
        names = [_checked_name(place, tool) for place, tool in enumerate(fields.tools)]
        forced = _forced(fields.tool_choice, names)
        if forced is None:
            return None
        _check_strict(fields.tools, forced)
        if fields.parallel_tool_calls and forced:
            raise bad_field(
                "parallel_tool_calls", "a forced call is one call: leave parallel_tool_calls out."
            )
        several = fields.parallel_tool_calls is not False
        return cls(tuple(fields.tools), _format_of(files), forced, several)

    def grammar(self) -> str | None:
        """A forced call as a Lark grammar; None where the model chooses.

        Raises:
            ApiError: 400, calls of this family cannot be forced.
        """
        if not self.forced:
            return None
        if self.format is MISTRAL:  # its mark is a token that no text has
            raise bad_field("tool_choice", "this model's calls cannot be forced: use tool_choice auto.")
        calls = [
            _call_schema(tool["function"], self.format) for tool in self.tools if _name(tool) in self.forced
        ]
        start = (
            f'"{self.format.opening}\\n" call "\\n{self.format.closing}"' if self.format.opening else "call"
        )
        return f"start: {start}\ncall: %json {json.dumps({'anyOf': calls})}\n"

    def read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text of an answer and its calls, in OpenAI's shape.

        What only looks like a call stays text: nothing that the model said is lost.

        Args:
            text: with special tokens, the one that ended it left out.
        """
        format_ = self.format
        plain, found = text, []
        if not format_.opening:
            found = _calls_of(text.strip().removeprefix(_PYTHON_TAG), format_)
            plain = "" if found else text
        elif format_.opening in text:
            before, *parts = text.split(format_.opening)
            bodies = [part.partition(format_.closing)[0] if format_.closing else part for part in parts]
            read = [_calls_of(body, format_) for body in bodies]
            if all(read):
                plain, found = before.strip(), [call for calls in read for call in calls]
        known = {_name(tool) for tool in self.tools}
        if any(call["name"] not in known for call in found) or (len(found) > 1 and not self.several):
            return text, []
        return plain, [_shown(call) for call in found]


def _calls_of(body: str, format_: Format) -> list[dict[str, Any]]:
    """The calls in a piece of JSON; none where it is something else."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return []
    listed = parsed if format_.listed and isinstance(parsed, list) else [parsed]
    found = []
    for call in listed:
        match call:
            case {"name": str(name), **rest} if isinstance(rest.get(format_.arguments), dict):
                found.append({"name": name, "arguments": rest[format_.arguments]})
            case _:
                return []
    return found


def _shown(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _checked_name(place: int, tool: object) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}} if name:
            if not isinstance(rest.get("parameters", {}), dict):
                raise bad_field(
                    "tools", f"tools[{place}].function.parameters should be a JSON schema: mend it."
                )
            return name
    raise bad_field("tools", f"tools[{place}] should be a function with a name: mend it.")


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _forced(choice: str | dict[str, Any] | None, names: Sequence[str]) -> tuple[str, ...] | None:
    """The names of which one must be called; None where none may be."""
    match choice:
        case None | "auto":
            return ()
        case "none":
            return None
        case "required":
            return tuple(names)
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return (name,)
    raise bad_field("tool_choice", "tool_choice should be none, auto, required or one of the tools: mend it.")


def _check_strict(tools: Sequence[Mapping[str, Any]], forced: tuple[str, ...]) -> None:
    """A call that the model chooses is not bound to its schema: who asks for that must know."""
    if not forced and any(tool["function"].get("strict") for tool in tools):
        raise bad_field(
            "tools", "strict holds for forced calls alone: set tool_choice to required, or leave strict out."
        )


def _format_of(files: ModelFiles) -> Format:
    try:
        source = ChatTemplate.of(files, tools=True).source
    except UsageError as error:
        raise ApiError(400, str(error), param="messages") from error
    if "tools" in source:
        for format_ in FORMATS:
            if format_.mark in source:
                return format_
    raise bad_field("tools", "this model's chat template has no tools of a known form: leave them out.")


def _call_schema(function: Mapping[str, Any], format_: Format) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, format_.arguments: arguments},
        "required": ["name", format_.arguments],
        "additionalProperties": False,
    }
