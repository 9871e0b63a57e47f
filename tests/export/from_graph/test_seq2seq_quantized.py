"""Quantised encoder-decoders in the runtime's layout: tokens of the untrimmed folder's own graphs."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnxruntime as ort
from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

from tests.support.folders import make_vocab
from tests.support.graph_folders import fuse
from tests.support.translators import KEPT, TASK, Translator
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve_export import export
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, pytest.mark.optimum(only=True)]

TEXTS = ["the cat sat on the mat", "dog", "a cat ? un latte on a dog .", "lo"]
TOKENS = 20
PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")
# What the generation config would forbid or force; the reference here takes the largest logit.
RULES = ("forced_eos_token_id", "forced_bos_token_id", "bad_words_ids")


def quantize(graph: Path, kind: str) -> None:
    """As a user would with ONNX Runtime's tools, in place."""
    whole = graph.rename(graph.with_name(f"whole_{graph.name}"))
    if kind == "int4":
        logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(str(whole), block_size=16, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(graph), False)
    else:
        options = {"EnableSubgraph": "merged" in graph.name}
        quantize_dynamic(whole, graph, weight_type=QuantType.QUInt8, extra_options=options)
    whole.unlink()
    if kind == "int8_fused":
        fuse(graph)


def quantized_folder(made: Translator, folder: Path, kind: str, *, merged: bool) -> Path:
    """What optimum-onnx exports of a model, each graph quantised; `merged` with the merged decoder, too."""
    shutil.copytree(made.onnx, folder, ignore=shutil.ignore_patterns(*([] if merged else ["*merged*"])))
    for graph in sorted(folder.glob("*.onnx")):
        quantize(graph, kind)
    for name in ("config.json", "generation_config.json"):
        entries = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: entries[key] for key in entries if key not in RULES}))
    return folder


def greedy(folder: Path, source: Sequence[int]) -> list[int]:
    """The largest logit of the folder's graphs, a token at a time."""
    encoder, first, later = (ort.InferenceSession(str(folder / f"{name}.onnx")) for name in PARTS)
    config = json.loads((folder / "config.json").read_text())
    ids = np.array([source], np.int64)
    mask = np.ones_like(ids)
    (hidden,) = encoder.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
    feeds = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden}
    token, output = config["decoder_start_token_id"], []
    while not output or (len(output) < TOKENS and token != config["eos_token_id"]):
        session = later if output else first
        feeds["input_ids"] = np.array([[token]])
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
        made = dict(zip(names, found, strict=True))
        token = int(made.pop("logits")[0, -1].argmax())
        feeds |= {name.replace("present", "past_key_values"): value for name, value in made.items()}
        output.append(token)
    return output


@pytest.mark.parametrize(
    ("family", "kind", "merged"),
    [
        ("t5", "int8", True),
        ("bart", "int4", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("marian", "int8", False),  # two logits that are closer than rounded hidden states
                ("bart", "int8_fused", False),
                ("mt5", "int4", True),
            )
        ),
    ],
)
def test_tokens_are_those_of_the_untrimmed_graphs(translators, tmp_path, family, kind, merged):
    full = quantized_folder(translators(family), tmp_path / "full", kind, merged=merged)
    given = tmp_path / "given"
    left_out = ("decoder_model.onnx", "*_with_past_*") if merged else ()
    shutil.copytree(full, given, ignore=shutil.ignore_patterns(*left_out))
    source = resolve_model(given)
    vocab = make_vocab(KEPT, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "trimmed")
    model = load(tmp_path / "trimmed")
    assert model.folder.manifest.task == TASK
    results = [model.generate(text, max_new_tokens=TOKENS)[0] for text in TEXTS]
    sources = model.codec.encode(TEXTS)
    assert [list(result.ids) for result in results] == [greedy(full, ids.tolist()) for ids in sources]
    produced = np.concatenate([result.ids for result in results])
    assert not model.folder.vocab.is_kept(produced).all(), "a broken check would not be seen"
    result = verify(tmp_path / "trimmed", texts=TEXTS[:2])
    assert result.ok, result.to_dict()
