"""Damaged files of models: each ends in one sentence or does no harm, whatever library meets it first."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import onnx_ir as ir
from safetensors.torch import save_file

from tests.support.counting import Counter, outcome_of
from tests.support.damage import damage
from tests.support.graphs import sketch
from tests.support.models import save_model
from tests.support.sentence_models import HIDDEN, V, encoder_folder, save_weights, write_json
from tests.support.tiny_tokenizers import CHAT_TEMPLATE, KINDS
from trimserve.model.prize import read_weight_bytes
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.process import peak_resident
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve.text.dead_ids import dead_ids
from trimserve.text.names import TokenNames
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.source_tokenizer import ask_library
from trimserve_export.inspection import inspect
from trimserve_export.options import Options
from trimserve_export.pipeline import check_early, export
from trimserve_export.planning import plan_export
from trimserve_export.source.whole import whole_source

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

SEED, TRIED, TRIED_SLOWLY = 15, 1_000, 1_500
WHOLE, WHOLE_SLOWLY = 40, 80
# A tiny model needs none of it; torch and transformers are loaded before the first attempt.
MOST_MEMORY = 1 << 30
TEXTS = ["The cat sat on the mat.\n\nint main() {}", "", "a dog é 世界 🎉"]
ROLES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 1e30}


def decoder(path: Path) -> Path:
    """Everything that a chat model's folder may hold, its weights in two files."""
    save_model("llama_tied", path, tokenizer="byte_level_bpe", max_shard_size="10KB")
    added = {"content": "<think>", "lstrip": False, "normalized": False, "rstrip": False}
    added |= {"single_word": False, "special": False}
    id_ = KINDS["byte_level_bpe"]().token_to_id("<think>")
    write_json(
        path / "tokenizer_config.json",
        ROLES
        | {
            "added_tokens_decoder": {str(id_): added},
            "additional_special_tokens": ["<|turn|>"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}],
        },
    )
    write_json(
        path / "special_tokens_map.json", {"eos_token": added | {"content": "<|endoftext|>", "special": True}}
    )
    write_json(path / "added_tokens.json", {"<think>": id_})
    write_json(
        path / "generation_config.json",
        {"eos_token_id": [3, 4], "temperature": 0.7, "bad_words_ids": [[5]], "sequence_bias": [[[6], 1.5]]},
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


def sentence(path: Path) -> Path:
    """A folder of sentence-transformers."""
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
    dense = {"in_features": HIDDEN, "out_features": 8, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    encoder_folder(path, ("Pooling", pooling), ("Dense", dense), ("Normalize", {}))
    save_weights(path / "2_Dense", linear_weight=(8, HIDDEN), linear_bias=(8,))
    write_json(
        path / "config_sentence_transformers.json",
        {"prompts": {"query": "query: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"},
    )
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    return path


def graph(path: Path) -> Path:
    """A graph with its data beside it, and what onnxruntime-genai and transformers say of it."""
    path.mkdir(parents=True)
    model = sketch("blocks_reshaped", "qdq_int4").model()
    ir.save(model, path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=0)
    KINDS["unigram"]().save(str(path / "tokenizer.json"))
    write_json(
        path / "genai_config.json",
        {
            "model": {
                "type": "decoder",
                "vocab_size": V,
                "eos_token_id": [1],
                "decoder": {"filename": "model.onnx", "inputs": {"input_ids": "input_ids"}},
            },
            "search": {"max_length": 64},
        },
    )
    return path


def static(path: Path) -> Path:
    """A table of vectors."""
    path.mkdir(parents=True)
    KINDS["unigram"]().save(str(path / "tokenizer.json"))
    size = KINDS["unigram"]().get_vocab_size()
    import torch

    save_file({"embedding.weight": torch.rand(size, 8)}, path / "model.safetensors")
    module = "sentence_transformers.models.StaticEmbedding"
    write_json(path / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module}])
    return path


def adapter(path: Path) -> Path:
    """An adapter and its base."""
    import peft
    import transformers

    base = save_model("llama", path / "base", rows=V)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(loaded, config).save_pretrained(path)
    return path


def spiece(path: Path) -> Path:
    """A tokenizer that is a sentencepiece model alone."""
    import sentencepiece

    path.mkdir(parents=True)
    text = path / "text.txt"
    text.write_text("the cat sat on the mat\na dog and a cat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (path / "spiece.vocab").unlink()
    write_json(path / "config.json", {"model_type": "t5", "vocab_size": 64, "d_model": 8})
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 2})
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    made.__name__: made for made in (decoder, sentence, graph, static, adapter, spiece)
}
NEEDS = {"adapter": "peft", "spiece": "sentencepiece"}
OFTEN = {"decoder": 8, "sentence": 5, "graph": 3, "static": 2, "adapter": 1, "spiece": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("damaged")
    made = {name: make for name, make in MAKERS.items() if find_spec(NEEDS.get(name, "torch"))}
    return {name: make(root / name) for name, make in made.items()}


def counted(folder: Path) -> None:
    profile([], folder, texts=TEXTS, progress=False, workers=1)


def chosen(folder: Path) -> None:
    found = profile([], folder, texts=TEXTS, progress=False, workers=1)
    select(found, keep_tokens=["the"], model=folder)


def inspected(folder: Path) -> None:
    inspect(folder)


def reported(folder: Path) -> None:
    source = resolve_model(folder)
    tokenizer = source.tokenizer()
    names = TokenNames(tokenizer)
    dead_ids(tokenizer)
    [names.text(id_) + names.kind(id_) for id_ in range(0, 300, 7)]
    read_weight_bytes(source)


def chatted(folder: Path) -> None:
    from trimserve.text.chat import render_chat

    render_chat(resolve_model(folder), [{"role": "user", "content": "hi"}])


def planned(folder: Path) -> None:
    options = Options(to="safetensors")
    with whole_source(resolve_model(folder), near=folder.parent) as source:
        source = ask_library(check_early(source, options))
        kept = structural_ids(source)
        vocab = VocabMap(kept, np.zeros(kept.size, np.uint8), source.vocab_size, source.tokenizer_sha256)
        if source.graph is None and not source.is_static_embedding:
            plan_export(source, vocab, options)


USES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "decoder": (counted, chosen, inspected, reported, planned, chatted),
    "sentence": (counted, planned, planned, inspected),  # dead ids of BERT's tokenizers take seconds
    "graph": (counted, chosen, inspected, planned),
    "static": (chosen, inspected, planned),
    "adapter": (inspected, planned),
    "spiece": (chosen, reported),
}


def damages(folders: dict[str, Path], rng: random.Random, root: Path) -> Iterator[tuple[str, Path, str]]:
    """Damaged copies, one at a time: the family, the folder, and what was done to which file."""
    for number in itertools.count():
        (family,) = rng.choices(list(folders), [OFTEN[name] for name in folders])
        files = sorted(file for file in folders[family].rglob("*") if file.is_file())
        file = rng.choice(files)
        copy = root / f"{number}"
        shutil.copytree(folders[family], copy, copy_function=shutil.copyfile)
        path = copy / file.relative_to(folders[family])
        content, what = damage(file.read_bytes(), rng)
        path.write_bytes(content)
        yield family, copy, f"{family}/{path.relative_to(copy)}: {what}"
        shutil.rmtree(copy)


def attack(folders: dict[str, Path], count: int, seed: int, root: Path) -> Counter:
    rng, counter = random.Random(seed), Counter("damaged models", seed)
    for family, folder, what in itertools.islice(damages(folders, rng, root), count):
        use = rng.choice(USES[family])
        before = peak_resident()
        fault = outcome_of(lambda use=use, folder=folder: use(folder))
        if fault is None and peak_resident() - before > MOST_MEMORY:
            fault = "too much memory"
        counter.add(use.__name__, what, fault)
    return counter


def attack_exports(folders: dict[str, Path], count: int, seed: int, root: Path) -> Counter:
    """The same through whole exports."""
    rng, counter = random.Random(seed), Counter("exports of damaged models", seed)
    whole = {name: folders[name] for name in ("decoder", "sentence", "graph", "static")}
    vocabs = {name: select(profile([], path, texts=TEXTS, progress=False)) for name, path in whole.items()}
    for family, folder, what in damages(whole, rng, root):
        target = root / "out"
        to = "onnx" if family == "static" or rng.random() < 0.3 else "safetensors"

        def use(family=family, folder=folder, to=to, target=target) -> None:
            export(folder, vocabs[family], target, to=to, progress=False)

        counter.add(to, what, outcome_of(use))
        shutil.rmtree(target, ignore_errors=True)
        if counter.tried == count:
            return counter
    raise AssertionError


def test_damaged_models(folders, tmp_path):
    attack(folders, TRIED, SEED, tmp_path).check()


def test_exports_of_damaged_models(folders, tmp_path):
    attack_exports(folders, WHOLE, SEED, tmp_path).check()


@pytest.mark.fuzz
def test_many_damaged_models(folders, tmp_path):
    attack(folders, TRIED_SLOWLY, SEED + 1, tmp_path).check()


@pytest.mark.fuzz
def test_many_exports_of_damaged_models(folders, tmp_path):
    attack_exports(folders, WHOLE_SLOWLY, SEED + 1, tmp_path).check()
