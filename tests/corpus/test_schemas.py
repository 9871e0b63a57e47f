"""Rows of conversations in every shape: rendered as transformers renders plain messages, or refused."""

import json
import logging

import pytest

pytest.importorskip("jinja2")

from tests.support.tiny_tokenizers import save_model_folder
from trimserve.cli.main import main
from trimserve.corpus.corpus import Corpus, Reading
from trimserve.errors import UsageError
from trimserve.text.chat import ChatTemplate

CHATML = (
    "{%- if tools %}{{- '<tools>' + tools | tojson + '\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if 'tool_calls' in message %}{{- 'calls ' }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Takes content in parts, and puts the system's text into the user's turn.
PARTS = (
    "{%- for message in messages %}{{- '[' + message.role + ']' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}"
    "{{- '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"
)
# Forgets what a tool said.
FORGETFUL = (
    "{%- for message in messages %}{%- if message.role != 'tool' %}"
    "{{- message.role + ': ' + message.content + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
SAID = [("system", "Be brief."), ("user", "Where is my card?"), ("assistant", "On its way.")]
MESSAGES = [{"role": role, "content": text} for role, text in SAID]
SHAREGPT = [
    {"from": role, "value": text} for role, (_, text) in zip(("system", "human", "gpt"), SAID, strict=True)
]
PARTED = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in SAID]
# What parquet makes of records of which some have more keys.
FILLED = [message | {"tool_calls": None, "name": None} for message in MESSAGES]
SHAPES = {
    "messages": {"messages": MESSAGES},
    "as JSON": {"messages": json.dumps(MESSAGES)},
    "keys of parquet": {"messages": FILLED},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT as JSON": {"conversations": json.dumps(SHAREGPT)},
    "roles of ShareGPT": {"conversations": [{"role": m["from"], "content": m["value"]} for m in SHAREGPT]},
    "system beside": {"conversations": SHAREGPT[1:], "system": "Be brief."},
    "parts": {"messages": PARTED},
    "prompt and completion, text": {"system": "Be brief.", "prompt": SAID[1][1], "completion": SAID[2][1]},
    "prompt and completion, messages": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    "prompt and completion, as JSON": {
        "prompt": json.dumps(MESSAGES[:2]),
        "completion": json.dumps(MESSAGES[2:]),
    },
}


def read(path, template, **options):
    reading = Reading(template=ChatTemplate(template, {}), **options)
    return [(document.text, document.output) for document in Corpus([str(path)], reading=reading).documents()]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.export
@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["text", "parts"])
def test_every_shape_is_rendered_as_its_plain_messages_are(tmp_path, template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (whole,), _ = utils.render_jinja_template([MESSAGES], chat_template=template)
    (opened,), _ = utils.render_jinja_template(
        [MESSAGES[:2]], chat_template=template, add_generation_prompt=True
    )
    for name, row in SHAPES.items():
        found = read(write(tmp_path / "x.jsonl", row), template)
        assert found == [(opened, False), (whole.removeprefix(opened), True)], name
    # All of them in one file: each row is read by its own shape.
    mixed = read(write(tmp_path / "x.jsonl", *SHAPES.values()), template)
    assert mixed == found * len(SHAPES)


@pytest.mark.export
def test_tools_of_a_row_reach_the_template(tmp_path):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"type": "function", "function": {"name": "card", "description": "Find <a> card"}}]
    (whole,), _ = utils.render_jinja_template([MESSAGES], tools=tools, chat_template=CHATML)
    for given in (tools, json.dumps(tools)):
        found = read(write(tmp_path / "x.jsonl", {"messages": MESSAGES, "tools": given}), CHATML)
        assert "".join(text for text, _ in found) == whole


def test_parquet_columns_of_a_shape_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = read(write(tmp_path / "x.jsonl", {"messages": MESSAGES}), CHATML)
    for row in (
        {"conversations": SHAREGPT[1:], "system": "Be brief."},
        {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    ):
        parquet.write_table(pa.Table.from_pylist([row | {"other": 1}]), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet", CHATML) == expected


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1 has the role 'narrator'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 has the role 'alien'"),
        ({"messages": [{"text": "x"}]}, "neither 'role' nor 'from' .it has 'text'"),
        ({"messages": [{"role": "user", "value": "x"}]}, "has no 'content' .it has 'role', 'value'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            "'image_url'",
        ),
        ({"messages": "hello"}, "should hold a list of records.* but is text"),
        ({"messages": ["hello"]}, "a list that holds str"),
        ({"instruction": "a", "output": "b"}, "no field 'messages' .found 'instruction', 'output'"),
        ({"prompt": "a"}, "'prompt' should hold a list"),
    ],
)
def test_what_is_not_understood_is_refused_by_file_and_line(tmp_path, row, match):
    path = write(tmp_path / "x.jsonl", SHAPES["messages"], row)
    with pytest.raises(UsageError, match=rf"x\.jsonl, line 2.*{match}"):
        read(path, CHATML)
    assert len(read(path, CHATML, skip_bad=True)) == 2


def test_a_template_that_prints_nothing_of_a_message_is_an_error(tmp_path):
    said = [{"role": "user", "content": "card?"}, {"role": "tool", "content": "card"}, MESSAGES[2]]
    assert read(write(tmp_path / "x.jsonl", {"messages": [said[0], said[2]]}), FORGETFUL)
    # What the tool said also stands in another message, so a search for it would not miss it.
    with pytest.raises(UsageError, match=r"line 1: .*prints nothing of message 2 \(role 'tool'\)"):
        read(write(tmp_path / "x.jsonl", {"messages": said}), FORGETFUL)
    # The same roles again, of which one text is dropped for what it says.
    picky = CHATML.replace("message.content +", "('' if 'zebra' in message.content else message.content) +")
    rows = [
        {"messages": MESSAGES},
        {"messages": [MESSAGES[0], {"role": "user", "content": "zebra"}, MESSAGES[2]]},
    ]
    assert read(write(tmp_path / "x.jsonl", *rows), picky)  # tried with another text, it is printed
    constant = "{{- 'Answer: ' }}"
    with pytest.raises(UsageError, match="prints nothing of message 1"):
        read(write(tmp_path / "x.jsonl", rows[0]), constant)


@pytest.fixture
def model(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": FORGETFUL}), "utf-8")
    return folder


def test_command_counts_sharegpt_and_warns_of_prompts_alone(tmp_path, model, capsys, caplog):
    words = [{"from": "human", "value": "the cat sat"}, {"from": "gpt", "value": "the dog sat"}]
    path = write(tmp_path / "x.jsonl", {"conversations": words})
    arguments = [
        "profile",
        str(path),
        "--chat",
        "-m",
        str(model),
        "-o",
        str(tmp_path / "p"),
        "--format",
        "json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["output_tokens"] > 0
    assert "completion" not in caplog.text
    write(path, {"conversations": words[:1]})
    with caplog.at_level(logging.WARNING):
        assert main(arguments) == 0
    assert "no token of a completion was counted in 1 texts" in caplog.text


def test_utf_16_without_a_mark_is_refused(tmp_path, model, capsys):
    texts = {"x.txt": "the cat\n", "x.jsonl": '{"text": "the cat"}\n', "x.csv": "text,n\nthe cat,1\n"}
    for name, text in texts.items():
        path = tmp_path / name
        options = ["--text-column", "text"] if name != "x.txt" else []
        for encoding in ("utf-16-le", "utf-16-be"):
            path.write_bytes(text.encode(encoding))
            assert main(["profile", str(path), "-m", str(model), "-o", str(tmp_path / "p"), *options]) == 2
            assert f"{name}, line" in (told := capsys.readouterr().err)
            assert "NUL byte, as UTF-16" in told
    assert not (tmp_path / "p").exists()
