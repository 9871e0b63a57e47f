"""Cut a tokenizer to a closed vocab: tokenizer.json and every file beside it that holds token ids."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trimserve.errors import MismatchError
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.configs import compact_config
from trimserve_export.layouts.closure import MergeTrees, merge_pairs, read_content

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# Files that name tokens, never ids: the same for every vocab.
UNCHANGED_FILES = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
Json = dict[str, Any]


class _CompactIds:
    """Token id -> compact id, None for an id without a compact row."""

    def __init__(self, vocab: VocabMap) -> None:
        self._compact = {id_: compact for compact, id_ in enumerate(vocab.kept_ids.tolist())}

    def __call__(self, id_: int) -> int | None:
        return self._compact.get(id_)

    def required(self, id_: int, where: str) -> int:
        compact = self._compact.get(id_)
        if compact is None:
            raise MismatchError(
                f"{where} needs token id {id_:,}, which the vocab does not keep: close the vocab for the "
                "tokenizer layout first."
            )
        return compact


def cut_tokenizer(content: Json, vocab: VocabMap) -> Json:
    """Return the content of a tokenizer.json cut to a vocab, all ids compact.

    Args:
        content: a parsed tokenizer.json; not changed.
        vocab: kept ids, closed by `close_vocab`.

    Raises:
        MismatchError: the vocab is not closed; the message says what is missing.
    """
    ids = _CompactIds(vocab)
    cut = dict(content)
    cut["model"] = _CUTTERS[content["model"]["type"]](content["model"], ids)
    cut["added_tokens"] = _cut_added(content.get("added_tokens") or [], ids)
    if content.get("post_processor"):
        cut["post_processor"] = _cut_processor(content["post_processor"], ids)
    if content.get("padding"):
        pad = ids(content["padding"]["pad_id"])
        cut["padding"] = None if pad is None else content["padding"] | {"pad_id": pad}
    return cut


def _cut_bpe(model: Json, ids: _CompactIds) -> Json:
    vocab = _cut_entries(model["vocab"], ids)
    trees = MergeTrees(model)
    merges = [
        stored
        for stored, pair in zip(model["merges"], merge_pairs(model), strict=True)
        if vocab.keys() >= {*pair, trees.merged(*pair)}
    ]
    return model | {"vocab": vocab, "merges": merges}


def _cut_entries(entries: Mapping[str, int], ids: _CompactIds) -> dict[str, int]:
    found = ((token, ids(id_)) for token, id_ in entries.items())
    kept = {token: compact for token, compact in found if compact is not None}
    return dict(sorted(kept.items(), key=lambda entry: entry[1]))


def _cut_dictionary(model: Json, ids: _CompactIds) -> Json:
    """WordPiece and WordLevel: longest match and whole words depend on nothing but the pieces."""
    return model | {"vocab": _cut_entries(model["vocab"], ids)}


def _cut_unigram(model: Json, ids: _CompactIds) -> Json:
    kept = [entry for id_, entry in enumerate(model["vocab"]) if ids(id_) is not None]
    unk = model.get("unk_id")
    return model | {
        "vocab": kept,
        "unk_id": unk if unk is None else ids.required(unk, "the tokenizer's unk_id"),
    }


_CUTTERS: dict[str, Callable[[Json, _CompactIds], Json]] = {
    "BPE": _cut_bpe,
    "Unigram": _cut_unigram,
    "WordPiece": _cut_dictionary,
    "WordLevel": _cut_dictionary,
}


def _cut_added(added: list[Json], ids: _CompactIds) -> list[Json]:
    """Added tokens with their compact ids; those beyond the model's rows leave."""
    moved = [(token, ids(token["id"])) for token in added]
    lost = [token["content"] for token, compact in moved if compact is None]
    if lost:
        logger.warning("%d added tokens have no row and leave the tokenizer: %s", len(lost), lost[:5])
    return [token | {"id": compact} for token, compact in moved if compact is not None]


def _cut_processor(processor: Json, ids: _CompactIds) -> Json:
    cut = dict(processor)
    if "processors" in cut:  # Sequence
        cut["processors"] = [_cut_processor(part, ids) for part in cut["processors"]]
    if "special_tokens" in cut:  # TemplateProcessing
        cut["special_tokens"] = {
            token: entry
            | {"ids": [ids.required(id_, f"the post-processor's {token}") for id_ in entry["ids"]]}
            for token, entry in cut["special_tokens"].items()
        }
    for key in ("cls", "sep"):  # BertProcessing, RobertaProcessing: [token, id]
        if key in cut:
            token, id_ = cut[key]
            cut[key] = [token, ids.required(id_, f"the post-processor's {token}")]
    return cut


def write_cut_tokenizer(source: ModelSource, vocab: VocabMap, target: Path) -> Tokenizer:
    """Write the tokenizer files of a model for a closed vocab.

    tokenizer.json and the ids of tokenizer_config.json, added_tokens.json; vocab.json, merges.txt and
    vocab.txt where the source has them; chat template and special tokens map as they are. SentencePiece
    models are left out.

    Args:
        source: the model.
        vocab: kept ids, closed by `close_vocab`.
        target: the folder to write into.

    Returns:
        The cut tokenizer, loaded from what was written, padding and truncation off.

    Raises:
        MismatchError: the vocab is not closed, or its ids would not be those that the library assigns.
    """
    cut = cut_tokenizer(read_content(source), vocab)
    _write(target / TOKENIZER_NAME, cut)
    _write_config(source, vocab, target)  # before it is loaded: it says in which class
    tokenizer = ModelSource(str(target), None, target).tokenizer()
    _check_ids(source.tokenizer(), tokenizer, vocab)
    _write_legacy(source, cut, tokenizer, target)
    for name in UNCHANGED_FILES:
        if (source.path / name).is_file():
            (target / name).write_bytes((source.path / name).read_bytes())
    return tokenizer


def _check_ids(original: Tokenizer, cut: Tokenizer, vocab: VocabMap) -> None:
    """Compare every compact id with the token that it stands for: the library numbers added tokens itself."""
    expected = {original.id_to_token(id_): compact for compact, id_ in enumerate(vocab.kept_ids.tolist())}
    found = cut.get_vocab(with_added_tokens=True)
    wrong = sorted(token or "" for token, _ in expected.items() ^ found.items())
    if wrong:
        raise MismatchError(
            f"the cut tokenizer should have {len(expected):,} tokens with ids 0..{len(vocab) - 1:,}, but "
            f"{wrong[0]!r} is missing or has another id ({len(wrong):,} tokens): close the vocab for the "
            "tokenizer layout first."
        )


def _write_config(source: ModelSource, vocab: VocabMap, target: Path) -> None:
    config = source.read_json(TOKENIZER_CONFIG_NAME)
    if not config:
        return
    ids = _CompactIds(vocab)
    config = compact_config(config, vocab)
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        moved = ((ids(int(id_)), token) for id_, token in decoder.items())
        config["added_tokens_decoder"] = {str(id_): token for id_, token in moved if id_ is not None}
    _write(target / TOKENIZER_CONFIG_NAME, config)


def _write_legacy(source: ModelSource, cut: Json, tokenizer: Tokenizer, target: Path) -> None:
    """Write the older forms of the same vocab that the source has, for readers of those alone."""
    model = cut["model"]
    names = {path.name for path in source.path.iterdir()}
    if "added_tokens.json" in names:
        known = model["vocab"] if isinstance(model["vocab"], dict) else dict(model["vocab"])
        added = {str(token): id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        _write(target / "added_tokens.json", {t: id_ for t, id_ in added.items() if t not in known})
    if "vocab.json" in names and model["type"] in ("BPE", "WordLevel"):
        _write(target / "vocab.json", model["vocab"])
    if "merges.txt" in names and model["type"] == "BPE":
        lines = (" ".join(pair) for pair in merge_pairs(model))
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    if "vocab.txt" in names and model["type"] == "WordPiece":
        (target / "vocab.txt").write_text("".join(f"{token}\n" for token in model["vocab"]), "utf-8")


def _write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
