"""The model card of a trimmed folder: what it was made from and how, and nothing that was not measured."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from trimserve.console import human_bytes, percent
from trimserve.files.hashes import sha256_file
from trimserve.files.quantized import Quantization
from trimserve.folder.fusion import describe_fusion
from trimserve.folder.manifest import FileEntry, Manifest, replace_listed, stored_weight_bytes
from trimserve.folder.names import COLD_NAME, VOCAB_NAME
from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK, has_vocab_head
from trimserve.model.source import ModelSource
from trimserve_export.layouts.segmentation import describe_segmentation

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"

_CARD = Template("""\
---
$front_matter
---

# $title

`$name` with $kept of its $vocab_size vocab rows, made by trimserve $version on $created.

$facts

## Vocab

$selection

$texts

## Verified

$verification

## Reproduce

```
$commands
```

`trimserve.json` has the sha256 of the base model's weights, of its tokenizer and of every file here. The
licence of the base model applies.
""")
# A licence that is not on the hub's list is "other", with a name and a link beside it.
_LICENCE_KEYS = ("license", "license_name", "license_link")
_GGUF_DTYPES = {"F16": "fp16", "BF16": "bf16"}
_PIPELINE_TAGS = {GENERATION_TASK: "text-generation", TEXT2TEXT_TASK: "text2text-generation"}
_ORIGINAL_TOKENIZER = "The tokenizer is the original one, byte for byte, so texts are segmented as before."
_CUT_TOKENIZER = (
    "The tokenizer is cut to these ids, and all ids in every file are compact: any runtime loads the folder. "
    "Texts are segmented with what was kept:"
)
_DROP_IN = (
    "The graph takes the original ids and gives logits over all of them, -inf for those that were not kept: "
    "a drop-in for the full model."
)
_NO_ROW = "There are no cold rows: a token whose row was not kept is an error at the input."
_WITH_COLD = (
    "A token whose row was not kept is fed from its cold row, read from "
    f"`{COLD_NAME}`: any text goes in exactly."
)
_WITHOUT_COLD = (
    "There are no cold rows: a token whose row was not kept is split into kept pieces, which the model "
    "reads differently."
)


def with_card(manifest: Manifest, source: ModelSource, folder: Path) -> Manifest:
    """Write the model card of a folder in the making and return the manifest that lists it."""
    path = folder / CARD_NAME
    path.write_text(render_card(manifest, source, stored_weight_bytes(manifest.files)), "utf-8")
    entry = FileEntry(path.stat().st_size, sha256_file(path))
    return dataclasses.replace(manifest, files=manifest.files | {CARD_NAME: entry})


def update_card(manifest: Manifest, source: ModelSource, folder: Path) -> None:
    """Write a manifest and the card that says the same into a finished folder, which loads at any moment."""
    text = render_card(manifest, source, stored_weight_bytes(manifest.files))
    replace_listed(folder, manifest, CARD_NAME, text.encode())


def render_card(manifest: Manifest, source: ModelSource, bytes_after: int) -> str:
    """Render the README.md of a trimmed folder.

    Args:
        manifest: the folder's manifest; `files` lists everything but the card itself.
        source: the base model.
        bytes_after: bytes of the trimmed weights.
    """
    name = _display_name(source)
    return _CARD.substitute(
        front_matter=_front_matter(manifest, source),
        title=f"{name}, {manifest.kept:,} vocab rows",
        name=name,
        kept=f"{manifest.kept:,}",
        vocab_size=f"{manifest.vocab_size:,}",
        version=manifest.exporter["trimserve"],
        created=manifest.created,
        facts="\n".join(f"- {key}: {value}" for key, value in _facts(manifest, bytes_after)),
        selection=_selection(manifest.selection),
        texts=_texts(manifest),
        verification=_verification(manifest),
        commands="\n".join(_commands(manifest, name)),
    )


def _display_name(source: ModelSource) -> str:
    # A local path says nothing to the reader of a card, and should not be published with it.
    return source.path.resolve().name if Path(source.name).is_dir() else source.name


def _front_matter(manifest: Manifest, source: ModelSource) -> str:
    metadata = ModelCardData(
        library_name="trimserve",
        pipeline_tag=_PIPELINE_TAGS.get(manifest.task, manifest.task),
        base_model=None if Path(source.name).is_dir() else source.name,
        tags=["onnx", "vocabulary-trimming"] if manifest.graphs else ["vocabulary-trimming"],
        **_licence(source.root / CARD_NAME),
    )
    return metadata.to_yaml()


def _licence(card: Path) -> dict[str, Any]:
    """What the front matter of the base model's card says of its licence; its text may name others."""
    if not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, YAMLError) as error:
        logger.warning(
            "the front matter of %s cannot be read: the new card names no licence (%s)", card, error
        )
        return {}
    return {key: metadata[key] for key in _LICENCE_KEYS if metadata.get(key)}


def _facts(manifest: Manifest, bytes_after: int) -> Iterator[tuple[str, str]]:
    share = percent(manifest.kept / manifest.vocab_size)
    versions = ", ".join(
        f"{key} {value}"
        for key, value in manifest.exporter.items()
        if key not in ("name", "device", "reason")
    )
    yield "task", manifest.task
    yield "vocab rows", f"{manifest.vocab_size:,} -> {manifest.kept:,} ({share})"
    if manifest.head_rows is not None:
        yield "head rows", f"{manifest.vocab_size:,} -> {manifest.head_rows:,}, those of the output ids"
    before, after = human_bytes(manifest.bytes_before), human_bytes(bytes_after)
    stored = "" if _is_gguf(manifest) else f" in {manifest.dtype}"
    yield "weights", f"{before}{stored} -> {after} in {', '.join(_number_formats(manifest))}"
    if manifest.quality is not None:
        from trimserve_export.serving.quality import Quality  # needs onnx

        yield "quantised", Quality.from_dict(manifest.quality).describe()
    if manifest.fusion is not None:
        yield "attention", describe_fusion(manifest.fusion)
    yield "cut", ", ".join(f"`{tensor.name}` (axis {tensor.axis})" for tensor in manifest.cut)
    if COLD_NAME in manifest.files:
        yield "cold rows", f"{human_bytes(manifest.files[COLD_NAME].bytes)}, memory-mapped"
    yield "made with", versions
    if "reason" in manifest.exporter:
        yield "exporter", f"{manifest.exporter['name']}: {manifest.exporter['reason']}"


def _number_formats(manifest: Manifest) -> Iterator[str]:
    yield manifest.dtype
    quantization = Quantization.from_dict(manifest.quantization)
    if quantization is None or _is_gguf(manifest):
        return
    yield f"int{quantization.body.bits}"
    if quantization.keeps:
        yield "int8 (matrices that had more bits in the source)"
    if _has_other_rows(quantization, manifest):
        yield f"int{quantization.rows.bits} (head)"


def _is_gguf(manifest: Manifest) -> bool:
    return manifest.exporter.get("name") == "gguf"


def _has_other_rows(quantization: Quantization, manifest: Manifest) -> bool:
    """Whether the vocab's rows have other bits than the body."""
    return quantization.rows.bits != quantization.body.bits and has_vocab_head(manifest.task)


def _selection(rule: dict[str, Any]) -> str:
    if "tokens" not in rule:
        return "The kept ids were given; no profile is recorded with them."
    options = ", ".join(f"{key} {value}" for key, value in rule["options"].items() if key != "keep_ids")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rule["reasons"].items())
    corpora = ", ".join(
        f"{Path(source['name']).name} (sha256 {source['sha256'][:12]}…)" for source in rule["sources"]
    )
    return (
        f"Selected by {options}: {reasons}. They cover {percent(rule['coverage'])} of the {rule['tokens']:,} "
        f"tokens profiled ({rule['texts']:,} texts: {corpora or 'given in memory'}); the estimated share of "
        f"future tokens that the profile never saw is {percent(rule['missing_mass'])}."
    )


def _texts(manifest: Manifest) -> str:
    """What happens to a text, by the folder's layout."""
    if manifest.layout == "tokenizer":
        if manifest.segmentation is None:
            return f"{_CUT_TOKENIZER} how far that differs was not measured when this card was written."
        return f"{_CUT_TOKENIZER} {describe_segmentation(manifest.segmentation)}"
    with_cold = COLD_NAME in manifest.files
    if manifest.layout == "graph":
        return f"{_ORIGINAL_TOKENIZER} {_DROP_IN} {_WITH_COLD if with_cold else _NO_ROW}"
    return f"{_ORIGINAL_TOKENIZER} {_WITH_COLD if with_cold else _WITHOUT_COLD}"


def _verification(manifest: Manifest) -> str:
    if manifest.verification is None:
        return "Not when this card was written; `trimserve verify` records its result in `trimserve.json`."
    return "; ".join(f"{check['name']}: {check['detail']}" for check in manifest.verification["checks"])


def _commands(manifest: Manifest, name: str) -> Iterator[str]:
    words = [f"trimserve export -m {name} --vocab {VOCAB_NAME} -o FOLDER --task {manifest.task}"]
    from_graph = manifest.exporter.get("name") == "graph"  # it keeps the numbers it has
    if _is_gguf(manifest):
        words.append("--to gguf")
        if manifest.dtype in _GGUF_DTYPES and "gguf" in manifest.exporter:
            words.append(f"--dtype {_GGUF_DTYPES[manifest.dtype]}")
    elif not from_graph:
        words.append(f"--dtype {manifest.dtype}" if manifest.graphs else "--to safetensors")
    quantization = Quantization.from_dict(manifest.quantization)
    if quantization is not None and not from_graph:
        words.append(f"--quantize int{quantization.body.bits}")
        if has_vocab_head(manifest.task) and not quantization.by_exporter:
            words.append(f"--vocab-bits {quantization.rows.bits}")
    if manifest.graphs and not from_graph and "name" in manifest.exporter:
        words.append(f"--exporter {manifest.exporter['name']}")
    if "device" in manifest.exporter:
        words.append(f"--device {manifest.exporter['device']}")
    if manifest.layout != "runtime":
        words.append(f"--layout {manifest.layout}")
    if COLD_NAME not in manifest.files and manifest.layout != "tokenizer":
        words.append("--no-cold")
    yield " ".join(words)
    yield f"trimserve verify FOLDER -m {name}"
