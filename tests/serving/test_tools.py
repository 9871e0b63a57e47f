"""Tools: what the template is shown, what is read as a call, and calls that are forced."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from trimserve.serving.fields import ChatRequest
from trimserve.serving.problems import ApiError
from trimserve.serving.tools import Toolbox

MESSAGES = [{"role": "user", "content": "the weather"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HERMES = "{{ tools }}<tool_call>"
MISTRAL = "{{ tools }}[TOOL_CALLS]"
LLAMA = '{{ tools }}{"name": x, "parameters": y}'


@dataclass
class Files:
    """A folder of which only the template matters."""

    template: str
    path: Path = Path("folder")
    tokenizer_settings: dict = field(default_factory=lambda: {"special_tokens": {}})

    def read_text(self, name):
        return self.template if name == "chat_template.jinja" else None

    def read_json(self, name):  # noqa: ARG002
        return {}


def toolbox(template=HERMES, **fields):
    request = ChatRequest(messages=MESSAGES, tools=[WEATHER, CLOCK], **fields)
    return Toolbox.of(request, Files(template))


@pytest.mark.parametrize(
    ("template", "text", "plain"),
    [
        (
            HERMES,
            'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
            "I look.",
        ),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', ""),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', ""),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}', ""),
        (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', ""),
    ],
)
def test_calls_of_each_family(template, text, plain):
    found, (call,) = toolbox(template).read(text)
    assert found == plain
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}


@pytest.mark.parametrize("template", [HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize(
    "text",
    [
        "it rains",
        '<tool_call>{"name": "weather", "arguments": {"ci',
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '[TOOL_CALLS][{"name": "weather"}]',
        '{"name": "weather", "parameters": 3}',
        "[1, 2]",
    ],
)
def test_what_only_looks_like_a_call_stays_text(template, text):
    assert toolbox(template).read(text) == (text, [])


def test_several_calls():
    text = "".join(
        f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>\n' for name in ("weather", "clock")
    )
    _, calls = toolbox().read(text)
    assert [call["function"]["name"] for call in calls] == ["weather", "clock"]
    assert len({call["id"] for call in calls}) == 2
    assert toolbox(parallel_tool_calls=False).read(text) == (text, [])


def test_choices():
    assert toolbox(tool_choice="none") is None
    assert toolbox(tool_choice="required").forced == ("weather", "clock")
    assert toolbox(tool_choice={"type": "function", "function": {"name": "clock"}}).forced == ("clock",)
    assert toolbox().grammar() is None


@pytest.mark.parametrize(
    ("template", "fields", "param"),
    [
        ("no such thing", {}, "tools"),
        (HERMES, {"tool_choice": "sometimes"}, "tool_choice"),
        (HERMES, {"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ],
)
def test_refusals(template, fields, param):
    with pytest.raises(ApiError) as caught:
        toolbox(template, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    for tool in ({}, {"type": "function", "function": {"name": 3}}, {"type": "web"}):
        with pytest.raises(ApiError):
            Toolbox.of(ChatRequest(messages=MESSAGES, tools=[tool]), Files(HERMES))


@pytest.mark.export
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_through_the_client(server, stream):
    pytest.importorskip("llguidance")
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)
    answer = client.chat.completions.create(
        model="chat",
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=200,
        temperature=1,
        seed=2,
        stream=stream,
        logit_bias={"220": -100, "197": -100, "198": -5},
    )
    if stream:
        *_, last = list(answer)
        message, reason = last.choices[0].delta, last.choices[0].finish_reason
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    (call,) = message.tool_calls
    assert reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
