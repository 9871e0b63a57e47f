"""The ids of a head with rows of its own: which are chosen, what they cost, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.profiles import make_profile
from tests.support.tiny_tokenizers import save_model_folder
from trimserve.cli.main import main
from trimserve.errors import UsageError
from trimserve.model.prize import WeightBytes
from trimserve.profiles.merging import merge
from trimserve.profiles.profiling import profile
from trimserve.selection.prediction import predict
from trimserve.selection.select_ids import select
from trimserve.vocab.file import load_vocab

COUNTS = [0, 50, 30, 10, 5, 3, 1, 1, 0]  # id 0 is structural


@pytest.fixture(scope="module")
def counted():
    spoken = np.array([0, 0, 10, 0, 5, 0, 1, 0, 0])
    return dataclasses.replace(make_profile(COUNTS), output_counts=spoken)


def test_the_head_keeps_the_most_frequent_ids_of_completions(counted):
    vocab = select(counted, coverage=0.97, output_coverage=0.9, separate_output=True, multiple_of=1)
    assert vocab.kept_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert vocab.output_ids.tolist() == [0, 2, 4]
    assert vocab.rule["head_rows"] == 3
    assert vocab.rule["head_coverage"] == vocab.rule["output_coverage"] == pytest.approx(15 / 16)
    assert vocab.rule["options"]["separate_output"] is True


def test_completions_are_covered_as_the_whole_is_unless_told(counted):
    vocab = select(counted, coverage=1.0, separate_output=True, multiple_of=1)
    assert vocab.output_ids.tolist() == [0, 2, 4, 6]
    # 6 stays for the completions, though the whole would do without it.
    vocab = select(counted, coverage=0.5, output_coverage=1.0, separate_output=True, multiple_of=1)
    assert (vocab.kept_ids.tolist(), vocab.output_ids.tolist()) == ([0, 1, 2, 4, 6], [0, 2, 4, 6])


def test_explicit_ids_stay_and_rounding_fills_up_with_ids_that_prompts_use(counted):
    options = {"coverage": 0.97, "output_coverage": 0.5, "separate_output": True}
    vocab = select(counted, **options, keep_ids=[8], multiple_of=1)
    assert vocab.output_ids.tolist() == [0, 2, 8]
    vocab = select(counted, **options, multiple_of=4)
    assert vocab.kept_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert vocab.output_ids.tolist() == [0, 2, 4, 6]


def test_one_set_remains_where_completions_need_all_of_it(counted):
    vocab = select(counted, coverage=0.97, separate_output=True, multiple_of=128)
    assert vocab.output_ids is None
    assert vocab.head is vocab
    assert "head_rows" not in vocab.rule


def test_completions_must_have_been_counted(counted):
    silent = dataclasses.replace(counted, output_counts=np.zeros(9, np.int64))
    for told in (make_profile(COUNTS), silent):
        with pytest.raises(UsageError, match="completions counted apart"):
            select(told, separate_output=True)


def test_weights_and_speed_follow_the_heads_rows():
    weights = WeightBytes(vocab_size=100, rows=1200, head=800, body=1000)
    assert weights.at(50) == 1600
    assert weights.at(50, 25) == 1000 + 200 + 200
    assert weights.decode_ratio(25) == pytest.approx(1800 / 1200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tied and an untied generator of 1,000 x 8 rows, each with a profile of prompts and completions."""
    root = tmp_path_factory.mktemp("outputs")
    rows = [{"q": f"the cat sat on mat {n}", "a": "the dog"} for n in range(40)]
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for name, head in (("tied", {}), ("untied", {"lm_head.weight": (1000, 8)})):
        model = save_model_folder(
            "byte_level_bpe", root / name, vocab_size=1000, architectures=["LlamaForCausalLM"]
        )
        shapes = {"model.embed_tokens.weight": (1000, 8), "model.norm.weight": (500,)} | head
        tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        save_file(tensors, model / "model.safetensors")
        options = {"text_column": "q", "output_column": "a", "progress": False}
        profile([root / "chats.jsonl"], model, **options).save(root / f"{name}.safetensors")
    return root


def test_a_tied_model_is_refused_where_it_is_at_hand(folders, capsys):
    path = folders / "tied.safetensors"
    assert main(["select", str(path), "--separate-output", "--dry-run"]) == 2
    assert "is tied: its head is its embedding" in capsys.readouterr().err
    # Anywhere else `export` refuses it.
    away = dataclasses.replace(merge_of(path), tokenizer_name="some/model")
    assert select(away, separate_output=True, multiple_of=1).output_ids is not None


def merge_of(path):
    from trimserve.profiles.profile import Profile

    return merge([Profile.load(path)])


def test_what_it_brings_is_predicted(folders):
    counted = merge_of(folders / "untied.safetensors")
    vocab = select(counted, separate_output=True, output_coverage=0.5, multiple_of=1)
    kept, head = len(vocab), len(vocab.output_ids)
    assert head < kept
    found = predict(counted, vocab, None)
    assert found["weight_bytes_after"] == 4 * (8 * (kept + head) + 500)
    assert found["decode_ratio"] == pytest.approx((8_000 + 500) / (8 * head + 500))


def test_the_command_writes_and_tells_both_sets(folders, tmp_path, capsys, monkeypatch):
    import trimserve.selection.select_ids as selection

    # The byte alphabet alone makes K 384: a tiny vocab is not rounded here.
    monkeypatch.setattr(selection, "round_up", lambda size, *_: size)
    monkeypatch.setattr("trimserve.selection.head_ids.round_up", lambda size, *_: size)
    out = tmp_path / "vocab.safetensors"
    arguments = ["select", str(folders / "untied.safetensors"), "--separate-output", "-o", str(out)]
    assert main([*arguments, "--output-coverage", "0.5", "--format", "json"]) == 0
    told, vocab = json.loads(capsys.readouterr().out), load_vocab(out)
    assert told["head_rows"] == len(vocab.output_ids) < told["kept"] == len(vocab)
    assert told["bytes_kept"] == 32 * (len(vocab) + len(vocab.output_ids))
