"""`trimserve chat`: a conversation with history, what is piped in a message a line."""

import io
import json

import pytest

pytest.importorskip("torch")

from trimserve.cli.main import main
from trimserve.loading import load

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.support.served_models import KINDS

    return KINDS["chat"].export(tmp_path_factory.mktemp("chat"))


def test_a_conversation(folder, monkeypatch, capsys):
    model, messages = load(folder, threads=1), [{"role": "system", "content": "sat"}]
    for line in ("the cat", "the dog"):
        messages.append({"role": "user", "content": line})
        text = model.chat(messages, max_new_tokens=5, temperature=0).text
        messages.append({"role": "assistant", "content": text})
    words = ["chat", str(folder), "--system", "sat", "--max-new-tokens", "5", "--temperature", "0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nthe dog\n"))
    assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"messages": messages}
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nthe dog"))
    assert main(words) == 0
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
