"""What it costs to cut the tokenizer, as other trimmers do: held-out texts, segmented by each tool's result.

Two subjects, each profiled on nine tenths of a corpus: multidomain-qwen2 on gsm8k (byte-level BPE, a decoder,
whose trained weights also say what the new segments cost in nats a character, read by torch), and an encoder
with XLM-R's tokenizer on German statutes (Unigram; its weights are random and say nothing). trimbed and
vocabtrimmer cut them to as many ids as ours keeps, and so does our own tokenizer layout. With the original
tokenizer, which our default layout keeps, every text is segmented as before.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench import harness
from bench.peers.environments import TRIMBED, VOCABTRIMMER, CannotRunError, run
from bench.quality import MODEL, held_out_texts, split
from trimserve.console import table

ORIGINAL = "original"
ENCODER = "xlm-roberta"
_TEXTS = 24


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to cut, by its name.

    Attributes:
        corpus: folder of the data's corpora.
        coverage: of the profile, which gives K.
        trained: its weights say something about texts.
    """

    corpus: str
    coverage: float
    trained: bool


SUBJECTS = {MODEL: Subject("gsm8k-en", 0.99, trained=True), ENCODER: Subject("law-de", 0.999, trained=False)}


def make(work: Path, name: str) -> dict[str, Any]:
    """Profile a subject and cut it by the tokenizer layout; returns its model folder and K."""
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export

    subject, data = SUBJECTS[name], harness.data_folder()
    model = data / "models" / name if subject.trained else _tiny_encoder(work, data / "tokenizers" / name)
    (work / "profiled.txt").write_text(split(_corpus(subject))[0], "utf-8")
    source = resolve_model(model)
    profiled = profile([work / "profiled.txt"], source, progress=False)
    vocab = select(profiled, coverage=subject.coverage)
    options: dict[str, Any] = {"profile": profiled, "to": "safetensors"}
    export(source, vocab, work / "cut", layout="tokenizer", progress=False, **options)
    tokenizer = source.tokenizer()
    frequent = (-profiled.counts).argsort(kind="stable")[: len(vocab)].tolist()
    mined = {tokenizer.id_to_token(id_): id_ for id_ in frequent if profiled.counts[id_]}
    (work / "mined.json").write_text(json.dumps(mined), "utf-8")
    return {"model": str(model), "kept": len(vocab)}


def _tiny_encoder(work: Path, tokenizer: Path) -> Path:
    """A masked language model of XLM-R's vocab and next to no body, and its tokenizer."""
    import transformers

    config = {
        "vocab_size": Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size(),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }
    folder = work / "model"
    library: Any = transformers
    library.XLMRobertaForMaskedLM(library.XLMRobertaConfig(**config)).save_pretrained(folder)
    for file in tokenizer.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}', "utf-8")
    return folder


def _corpus(subject: Subject) -> Path:
    return harness.data_folder() / "corpora" / subject.corpus / "text.txt"


def trimbed(work: Path, model: Path, kept: int) -> Path:
    """The checkpoint that trimbed makes from the same corpus with as many ids."""
    folder = work / "trimbed"
    dataset = {"path": "text", "data_files": str(work / "profiled.txt"), "text_column": "text"}
    settings = {
        "model": str(model),
        "corpus": {"datasets": [dataset]},
        "selection": {"top_k": kept},
        "verify_model": False,
    }
    config = work / "trimbed.yaml"  # JSON is YAML
    config.write_text(json.dumps(settings), "utf-8")
    run(TRIMBED, "-m", "trimbed.cli", "trim", "-c", str(config), "-o", str(folder))
    return folder


def vocabtrimmer(work: Path, model: Path, kept: int) -> Path:
    """The checkpoint that vocabtrimmer makes from the most frequent ids of the same profile."""
    folder = work / "vocabtrimmer"
    code = (
        "import sys; from vocabtrimmer import VocabTrimmer\n"
        "VocabTrimmer(sys.argv[1]).trim_vocab(language='', path_to_save=sys.argv[2], "
        "target_vocab_size=int(sys.argv[3]), cache_file_vocab=sys.argv[4])"
    )
    run(VOCABTRIMMER, "-c", code, str(model), str(folder), str(kept), str(work / "mined.json"))
    return folder


TOOLS: dict[str, Callable[[Path, Path, int], Path]] = {
    "trimbed 0.0.4": trimbed,
    "vocabtrimmer 0.0.2": vocabtrimmer,
}


def read(folder: Path, texts: Sequence[str], *, trained: bool) -> dict[str, Any]:
    """How a folder's tokenizer segments texts and, if its model is trained, nats a character by torch."""
    from trimserve_export.layouts.segmentation import unknown_id

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    unknown = unknown_id(tokenizer)
    found = {
        "rows": tokenizer.get_vocab_size(),
        "tokens": sum(len(one.ids) for one in encoded),
        "unknown": sum(one.ids.count(unknown) for one in encoded),
        "pieces": [one.tokens for one in encoded],
    }
    return found | ({"nll_a_character": _nll(folder, texts, tokenizer)} if trained else {})


def _nll(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> float:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
    return nats / sum(map(len, texts))


def measure(name: str, work: Path) -> dict[str, Any]:
    """One subject; returns the row for the result file."""
    subject = SUBJECTS[name]
    common = ["-m", "bench.segmentation", "--subject", name, "--folder", str(work)]
    made = harness.fresh_process([*common, "--make"])
    model = Path(made["model"])
    folders = {ORIGINAL: model, "trimserve, layout tokenizer": work / "cut"}
    reasons = {}
    for tool, cut in TOOLS.items():
        try:
            folders[tool] = cut(work, model, made["kept"])
        except CannotRunError as error:
            reasons[tool] = str(error)
        print(f"{name}, {tool}: {reasons.get(tool, 'done')}", file=sys.stderr)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = held_out_texts(split(_corpus(subject))[1], tokenizer, _TEXTS).scored
    (work / "texts.json").write_text(json.dumps(list(texts)), "utf-8")
    found = {tool: harness.fresh_process([*common, "--read", str(path)]) for tool, path in folders.items()}
    return {
        "model": name,
        "corpus": subject.corpus,
        "kept": made["kept"],
        "texts": len(texts),
        "tokenizers": compared(found),
        "cannot_run": reasons,
    }


def compared(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `read` found of each tokenizer, beside the original's."""
    original = found[ORIGINAL]
    return {
        tool: {key: value for key, value in one.items() if key != "pieces"}
        | {
            "identical_texts": sum(map(list.__eq__, original["pieces"], one["pieces"]))
            / len(original["pieces"]),
            "fertility": one["tokens"] / original["tokens"],
        }
        for tool, one in found.items()
    }


HEADER = (
    "tokenizer",
    "tokens known",
    "texts segmented alike",
    "tokens to the original's",
    "unknown tokens",
    "nats a character",
)


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One subject for people, under `HEADER`."""
    return [
        (
            f"{row['model']}, {tool}",
            f"{one['rows']:,}",
            f"{one['identical_texts']:.1%}",
            f"{one['fertility']:.3f}",
            f"{one['unknown']:,}",
            f"{one['nll_a_character']:.4f}" if "nll_a_character" in one else "",
        )
        for tool, one in sorted(row["tokenizers"].items(), key=lambda item: item[0] != ORIGINAL)
    ]


def main() -> int:
    """Measure, save a row a subject, print the table and the reasons."""
    parser = harness.parser(__doc__ or "", rounds=1, work="checkpoints")
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(args.folder, args.subject[0])))
        return 0
    if args.read:
        texts = json.loads((args.folder / "texts.json").read_text("utf-8"))
        print(json.dumps(read(args.read, texts, trained=SUBJECTS[args.subject[0]].trained)))
        return 0
    rows = []
    for name in args.subject[: 1 if args.quick else None]:
        with harness.scratch_folder("segmentation", args.work) as work:
            rows.append(measure(name, work))
        harness.save_row("segmentation", rows[-1], quick=args.quick)
        for tool, reason in rows[-1]["cannot_run"].items():
            print(f"cannot run on {name}: {tool}: {reason}", file=sys.stderr)
    harness.report(table(HEADER, [line for row in rows for line in lines(row)]), {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
