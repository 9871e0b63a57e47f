"""Chat templates rendered without transformers: the same strings as transformers gives."""

import json

import pytest

pytest.importorskip("jinja2")

from tests.support.folders import make_folder
from trimserve.errors import UsageError
from trimserve.model.resolve import resolve_model
from trimserve.text.chat import ChatTemplate, render_chat

# Written for these tests after the formats that the models' makers document.
QWEN = """{%- if tools %}
{{- '<|im_start|>system\\n' }}{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

PHI = """{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endgeneration %}
{% else %}
{% continue %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

TEMPLATES = {"qwen": QWEN, "llama3": LLAMA3, "gemma": GEMMA, "phi": PHI}
CONVERSATIONS = [
    [{"role": "user", "content": "  What is 2 < 3 & 'x'? 数学 🎉\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!\n\n"},
        {"role": "user", "content": ""},
    ],
]
SETTINGS = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}


def folder_with(tmp_path, template, *, in_file=False, settings=SETTINGS):
    files = {
        "tokenizer_config.json": json.dumps(settings if in_file else settings | {"chat_template": template})
    }
    if in_file:
        files["chat_template.jinja"] = template
    contents = {name: text.encode() for name, text in files.items()}
    return make_folder(tmp_path / "folder", [0, 1, 2], 5, files=contents)


@pytest.mark.export
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("family", TEMPLATES)
def test_renders_what_transformers_renders(tmp_path, family, prompt, in_file):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    folder = folder_with(tmp_path, TEMPLATES[family], in_file=in_file)
    for messages in CONVERSATIONS:
        found = render_chat(folder, messages, add_generation_prompt=prompt)
        expected, _ = utils.render_jinja_template(
            [messages],
            chat_template=TEMPLATES[family],
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
        assert [found] == expected


@pytest.mark.export
def test_tools_and_further_variables_reach_the_template(tmp_path):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    folder = folder_with(tmp_path, QWEN)
    tools = [
        {"type": "function", "function": {"name": "wetter", "description": "Wie warm <ist> es in Köln?"}}
    ]
    (messages, _) = CONVERSATIONS
    found = render_chat(folder, messages, tools=tools, enable_thinking=False)
    expected, _ = utils.render_jinja_template(
        [messages], tools=tools, chat_template=QWEN, add_generation_prompt=True, enable_thinking=False
    )
    assert [found] == expected
    assert "Köln" in found  # not escaped as in HTML or ASCII


def test_of_named_templates_default_is_taken_and_tool_use_with_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = folder_with(tmp_path, named)
    assert ChatTemplate.of(folder).source == "plain"
    assert ChatTemplate.of(folder, tools=True).source == "tools"


def test_a_model_and_its_trimmed_folder_find_the_same_template(tmp_path):
    """The files by rank: transformers' own, tokenizer_config.json's entry, that of older processors."""
    folder = tmp_path / "model"
    folder.mkdir()
    source = resolve_model(folder)
    for name in ("chat_template.json", "tokenizer_config.json", "chat_template.jinja"):
        content = name if name.endswith(".jinja") else json.dumps({"chat_template": name})
        (folder / name).write_text(content)
        assert ChatTemplate.of(source).source == name
        assert ChatTemplate.of(resolve_model(folder)).source == name


def test_what_a_template_refuses_is_the_users_to_read(tmp_path):
    folder = folder_with(tmp_path, GEMMA)
    with pytest.raises(UsageError, match="roles must alternate"):
        render_chat(folder, [{"role": "assistant", "content": "me first"}])


def test_a_folder_without_a_template_says_so(tmp_path):
    folder = make_folder(tmp_path / "folder", [0, 1], 5, files={"tokenizer_config.json": b"{}"})
    with pytest.raises(UsageError, match="has no chat template"):
        render_chat(folder, CONVERSATIONS[0])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path, attack):
    folder = folder_with(tmp_path, attack)
    with pytest.raises(UsageError, match=r"fails on these messages \(line 1: .*unsafe"):
        render_chat(folder, CONVERSATIONS[0])
