import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.profiles import make_profile
from tests.support.rounding import FLOAT64, gamma
from trimserve.cli.main import main
from trimserve.errors import MismatchError, UsageError
from trimserve.profiles.difference import diff, js_distance
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve.vocab.file import save_vocab

counts = hnp.arrays(np.int64, 6, elements=st.integers(0, 50)).filter(lambda array: array.sum() > 0)


def entropy(shares):
    return -sum(share * math.log2(share) for share in shares if share > 0)


@given(counts, counts)
def test_distance_is_the_entropy_of_the_mixture_less_that_of_the_parts(a, b):
    first, second = (a / a.sum()).tolist(), (b / b.sum()).tolist()
    mixed = [(x + y) / 2 for x, y in zip(first, second, strict=True)]
    divergence = entropy(mixed) - (entropy(first) + entropy(second)) / 2
    found = js_distance(np.array(first), np.array(second))
    # Three entropies of six shares, of at most log2(6) bits; a root is off by the root of its number's error.
    rounding = math.sqrt(2 * gamma(3 * 6, FLOAT64) * 3 * math.log2(6))
    assert found == pytest.approx(math.sqrt(max(divergence, 0)), abs=rounding)
    assert found == pytest.approx(js_distance(np.array(second), np.array(first)))
    assert 0 <= found <= 1


def test_what_a_new_month_brings():
    found = diff(make_profile([6, 4, 0, 0]), make_profile([3, 0, 1, 16]))
    assert found.tokens == (10, 20)
    assert (found.new_ids, found.gone_ids) == (2, 1)
    assert found.new_mass == pytest.approx(17 / 20)
    assert found.gone_mass == pytest.approx(4 / 10)
    assert found.shifted_mass == pytest.approx(17 / 20)  # what id 2 and id 3 gained
    assert [move.token_id for move in found.moved] == [3, 0, 1, 2]
    assert (found.moved[0].before, found.moved[0].after) == (0, 16 / 20)
    assert len(diff(make_profile([6, 4]), make_profile([4, 6]), top=1).moved) == 1


def test_extremes():
    same = diff(make_profile([6, 4]), make_profile([12, 8]))
    assert (same.js_distance, same.shifted_mass, same.moved) == (0, 0, ())
    apart = diff(make_profile([6, 0]), make_profile([0, 8]))
    assert (apart.js_distance, apart.shifted_mass) == (1, 1)
    with pytest.raises(UsageError, match="without a token"):
        diff(make_profile([6, 0]), make_profile([0, 0]))
    with pytest.raises(MismatchError, match="different tokenizers"):
        diff(make_profile([6]), make_profile([6], sha="b" * 64))


def test_chance_is_what_two_samples_of_one_text_are_apart():
    random = np.random.default_rng(1)
    truth = 1 / np.arange(1, 2_001)
    parts = [random.multinomial(size, truth / truth.sum()) for size in (20_000, 5_000)]
    found = diff(*map(make_profile, parts))
    assert found.js_by_chance == pytest.approx(found.js_distance, rel=0.05)
    assert found.js_by_chance == diff(*map(make_profile, parts)).js_by_chance  # the same every time
    moved = diff(make_profile(parts[0]), make_profile(np.roll(parts[1], 40)))
    assert moved.js_distance > 2 * moved.js_by_chance


def test_command_line(tmp_path, monkeypatch, capsys, caplog, model_folders):
    monkeypatch.chdir(tmp_path)
    folder = model_folders["byte_level_bpe"]
    old = profile((), folder, texts=["the cat sat on the mat\n"])
    new = profile((), folder, texts=["the dog sat on the log\n" * 3])
    old.save("old")
    new.save("new")
    vocab = select(old, multiple_of=1)
    save_vocab(vocab, tmp_path / "v")
    assert main(["diff", "old", "new", "--vocab", "v", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["coverage"] == [1.0, pytest.approx(new.coverage(vocab.kept_ids))]
    assert document["js_distance"] == diff(old, new).js_distance
    assert {move["text"] for move in document["moved"]} >= {" cat", " dog"}
    assert main(["diff", "old", "new", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "Jensen-Shannon" in out
    assert len(out.splitlines()) == 5 + 1 + 2 + 2
    # A model that is not at hand is not fetched: ids stand alone.
    moved = make_profile([3, 1], name="owner/far")
    moved.save("far")
    assert main(["diff", "far", "far"]) == 0
    assert "not at hand" in caplog.text
    assert main(["diff", "old", "far"]) == 1
    assert main(["diff", "old", "new", "-m", str(model_folders["wordpiece"])]) == 1
    assert "another tokenizer" in capsys.readouterr().err
    assert Profile.load("old").tokens == old.tokens
