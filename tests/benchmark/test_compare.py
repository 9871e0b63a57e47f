"""`trimserve bench`: the full model's processes against the trimmed folder's."""

import json

import numpy as np
import pytest

from tests.support.folders import make_folder
from trimserve.benchmark import compare as benchmark
from trimserve.benchmark.compare import Comparison, Measured, Settings, compare
from trimserve.benchmark.measuring import spread
from trimserve.cli.main import main
from trimserve.errors import UsageError
from trimserve.folder.opening import open_folder
from trimserve.process import Memory


def measured(ms, *, resident=100, digest="a"):
    return Measured(
        weight_bytes=10,
        load_ms=spread([1.0]),
        load=Memory(1),
        memory=Memory(resident),
        ms=spread(ms),
        first_ms=None,
        stood=None,
        digests=frozenset([digest]),
        round_ms=tuple(ms),
    )


def test_comparison_holds_rounds_against_each_other():
    found = Comparison(
        {"full": measured([2.0, 20.0, 4.0]), "trimmed": measured([1.0, 10.0, 2.0], resident=40)},
        removed_bytes=80,
    )
    ratio = found.time_ratio("trimmed")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.saved_share("trimmed") == pytest.approx(0.75)
    assert found.same_results("trimmed") is True


@pytest.mark.parametrize(("digest", "expected"), [("b", False), (None, None)])
def test_results_that_differ_are_not_called_the_same(digest, expected):
    found = Comparison({"full": measured([1.0]), "exact": measured([1.0], digest=digest)}, removed_bytes=0)
    assert found.same_results("exact") is expected
    assert found.saved_share("exact") is None


def test_answers_of_one_token_are_an_error(monkeypatch, tmp_path):
    folder = make_folder(tmp_path, [0, 1], 4, task="text-generation-with-past")
    answer = {"ms": None, "first_ms": 1.0, "stood": 1.0, "digest": "", "memory": {}}
    run = benchmark._Run({"load_ms": 1.0, "memory": {}}, [answer])
    monkeypatch.setattr(benchmark, "_round", lambda *_: {"full": run, "compact": run})
    with pytest.raises(UsageError, match="--texts"):
        compare(folder.path, folder.path, ["text"], Settings(rounds=1))


@pytest.mark.parametrize("graphs", [{}, {"model": "model.onnx"}], ids=["no-graph", "tokenizer-layout"])
def test_folders_of_other_runtimes_are_refused(graphs, tmp_path, capsys):
    layout = "tokenizer" if graphs else "runtime"
    make_folder(tmp_path, [0, 1], 4, files={"model.onnx": b"x"}, graphs=graphs, layout=layout)
    assert main(["bench", str(tmp_path)]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_cuda_without_its_runtime_names_the_pip_command(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["bench", str(tmp_path), "--device", "cuda"]) == 2
    assert "pip install 'trimserve[gpu]'" in capsys.readouterr().err


QUICK = ("--rounds", "1", "--steps", "2", "--threads", "1", "--format", "json")


def bench(exported, tmp_path, capsys, texts, *options):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n", "utf-8")
    words = ["bench", str(exported.folder.path), "-m", str(exported.source), "--texts", str(file)]
    assert main([*words, *QUICK, *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.export
def test_encoder_is_measured_against_the_full_model(exported, tmp_path, capsys):
    document = bench(exported("bert_encoder"), tmp_path, capsys, ["the cat sat on the mat", "漢字"])
    assert set(document["variants"]) == {"full", "trimmed"}
    assert document["same_results"] == {"trimmed": True}  # cold tokens too
    assert document["prize"]["decode_ratio"] is None
    full, trimmed = document["variants"]["full"], document["variants"]["trimmed"]
    assert full["weight_bytes"] - trimmed["weight_bytes"] == document["removed_bytes"] > 0
    assert trimmed["ms"]["count"] == 2


@pytest.mark.export
def test_generator_is_measured_in_both_modes(exported, tmp_path, capsys):
    pair = exported("llama")
    document = bench(pair, tmp_path, capsys, ["the cat sat", "a dog"], "--max-new-tokens", "6")
    assert set(document["variants"]) == {"full", "compact", "exact"}
    assert document["same_results"] == {"exact": True}
    assert document["prize"]["decode_ratio"] > 1
    assert document["kept"] == len(open_folder(pair.folder.path).vocab.kept_ids)
    for name, share in document["speed_to_prize"].items():
        ratio = document["time_ratio"][name]["value"]
        assert share == pytest.approx(1 / ratio / document["prize"]["decode_ratio"])
    assert np.isfinite(document["variants"]["exact"]["first_ms"]["median"])
