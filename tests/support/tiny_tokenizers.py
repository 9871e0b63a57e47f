"""Tokenizers of every family, built in milliseconds, each with an awkward trait of real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

TEXT = (
    "The cat sat on the mat. The dog sat on the log; a cat and a dog sat.\n"
    "What is the total of 12 and 30? The total is 42.\n\n"
    "user: can I get a latte?\nassistant: one latte, coming up!\n"
    "int main() {\n\treturn 0;\n}\n"
    "Der Hund und die Katze saßen auf der Matte. Le chat est assis.\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)


def _train(tokenizer: Tokenizer, vocab_size: int, alphabet: list[str]) -> dict[str, Any]:
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def byte_level_bpe(merges: int = 60) -> Tokenizer:
    """GPT-2's and Qwen's kind: 256 bytes, merges, and added tokens above the base vocab."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, 256 + merges, sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|turn|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])  # added, but not special
    return tokenizer


def sentencepiece_bpe(merges: int = 60) -> Tokenizer:
    """Llama 2's and Phi-3's kind: no pre-tokenizer, `▁` for spaces, bytes as `<0x0A>` pieces, unk id 0."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    learned = _train(trained, 60 + merges, [])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in learned["vocab"] if piece not in "\n\t"]
    merged = [tuple(pair) for pair in learned["merges"] if not {"\n", "\t"} & set("".join(pair))]
    known = set(pieces)
    pieces = [p for p in pieces if len(p) == 1 or p in pieces[:259] or any("".join(m) == p for m in merged)]
    merged = [pair for pair in merged if {*pair, "".join(pair)} <= known & set(pieces)]
    vocab = {piece: id_ for id_, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merged, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"])
    return tokenizer


_WORDS = ("the", "cat", "sat", "on", "dog", "and", "a", "total", "is", "latte", "get", "can", "i")


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    """XLM-R's and T5's kind: unk id 3, newlines become spaces; with byte fallback, newlines survive."""
    words = [f"▁{word}" for word in _WORDS] + ["at", "og", "ing", "▁"]
    letters = sorted(set(TEXT.lower()) - set(" \n\t{}();ß"))
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored = special + [(word, -3.0 - 0.1 * rank) for rank, word in enumerate(words)]
    scored += [(letter, -8.0 - 0.01 * rank) for rank, letter in enumerate(letters)]
    if byte_fallback:
        scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=byte_fallback))
    spaces = [] if byte_fallback else [normalizers.Replace("\n", " ")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace = decoders.Metaspace()
    bytes_back = [decoders.ByteFallback(), metaspace] if byte_fallback else [metaspace]
    tokenizer.decoder = decoders.Sequence(bytes_back)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens(["<mask>"])  # the last id, as in XLM-R
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's kind, V = 37: unk id 1, cut and padded to 8 tokens unless the reader turns that off."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "."]
    pieces += ["##s", "##og", "##at", "##te", "la", "##tt", "##e", "##n", "##o", "un", "##t", "?", "!"]
    pieces += ["a", "c", "d", "l", "m", "n", "o", "s", "t", "##a", "##c", "##d"]
    tokenizer = Tokenizer(
        models.WordPiece({piece: id_ for id_, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level_bpe": byte_level_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "unigram_bytes": lambda: unigram(byte_fallback=True),
    "wordpiece": wordpiece,
}
# What a config of the kind's usual model says; ids by token, `rows` beyond the tokenizer's ids.
_CONFIGS: dict[str, dict[str, Any]] = {
    "byte_level_bpe": {"model_type": "qwen3", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "rows": 7},
    "sentencepiece_bpe": {"model_type": "llama", "bos": "<s>", "eos": "</s>", "rows": 0},
    "unigram": {"model_type": "xlm-roberta", "bos": "<s>", "pad": "<pad>", "eos": "</s>", "rows": 0},
    "unigram_bytes": {"model_type": "llama", "bos": "<s>", "eos": "</s>", "rows": 3},
    "wordpiece": {"model_type": "bert", "pad": "[PAD]", "rows": 0},
}


def tokenizer_config(kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a kind: model type, vocab size (with padding rows) and special ids."""
    known = _CONFIGS[kind]
    # Without the class, transformers loads the model type's own, which may change these tokenizers.
    config = {
        "model_type": known["model_type"],
        "hidden_size": 8,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config["vocab_size"] = max(tokenizer.get_vocab().values()) + 1 + known["rows"]
    roles = {role: known[role] for role in ("bos", "eos", "pad") if role in known}
    return config | {f"{role}_token_id": tokenizer.token_to_id(token) for role, token in roles.items()}


def save_model_folder(kind: str, path: Path, **config: Any) -> Path:
    """Write a model folder without weights: tokenizer.json, tokenizer_config.json, config.json.

    Chat models (the two BPE kinds) get a chat template and a generation config. `config` overrides
    entries of config.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = KINDS[kind]()
    tokenizer.save(str(path / "tokenizer.json"))
    content = tokenizer_config(kind, tokenizer) | config
    (path / "config.json").write_text(json.dumps(content))
    settings = {"chat_template": CHAT_TEMPLATE} if "bpe" in kind else {}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if settings:
        stops = [tokenizer.token_to_id("<|end|>"), content["eos_token_id"]]
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return path
