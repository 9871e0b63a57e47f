"""The same model through other tools, in processes that take turns: time a token, memory, and what comes out.

multidomain-qwen2 answers gsm8k questions greedily, untrimmed by this runtime, by optimum and by
onnxruntime-genai; pruned by onnxsim and run by ONNX Runtime with the shortest of loops; and trimmed by this
project, in exact and in compact mode. Compact mode with the prompt's cold ids in slots is VocabTailor's idea
(arXiv 2508.15229): a static vocab and the ids of the request.

trimbed cuts the tokenizer: its checkpoint and ours of the tokenizer layout, at a like K, are read by torch on
held-out texts, which tells what segmenting anew costs. Each tool has an environment of its own in
build/peers, made on the first run. A tool that cannot run is listed with the reason.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.quality import DOMAINS, MODEL, held_out_texts, split
from trimserve.report import human_bytes, table

ENVIRONMENTS = harness.ROOT / "build" / "peers"
_WORKER = str(harness.ROOT / "bench" / "peer_worker.py")
_TORCH = ("torch==2.13.0", "numpy")
_PROMPTS = 6
COVERAGE = 0.99
# Tools that a user would look at and that cannot take part.
_CANNOT = {
    "vocabtrimmer 0.0.2": "raises ValueError for causal language models",
    "TextPruner 1.1.post2, hf-trim 3.0.1": "need a slow SentencePiece tokenizer",
    "VocabTailor": "is no package; its idea is measured as compact mode with the prompt's ids in slots",
    "TensorRT-Edge-LLM": "needs an NVIDIA GPU and TensorRT",
    "vllm-ascend, rtp-llm": "need their own accelerators",
}


class CannotRunError(Exception):
    """A tool cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment of a tool: the interpreter's version it needs, and what is installed."""

    name: str
    requirements: tuple[str, ...]
    python: str = f"python{sys.version_info.major}.{sys.version_info.minor}"


# The genai builder needs transformers 5, optimum-onnx needs 4.57: neither can live with the other.
BUILDER = Environment(
    "genai-builder", (*_TORCH, "transformers>=5", "onnxruntime-genai==0.18.0", "onnx", "onnx-ir")
)
OPTIMUM = Environment(
    "optimum", (*_TORCH, "transformers==4.57.6", "optimum-onnx==0.1.0", "onnxruntime", "accelerate")
)
ONNXSIM = Environment("onnxsim", ("onnxsim==0.8.1", "onnx", "onnxruntime", "numpy"))
TRIMBED = Environment("trimbed", ("trimbed[model]==0.0.4", "torch==2.13.0"), python="python3.12")


def interpreter(environment: Environment) -> Path:
    """The interpreter of an environment, which is made if there is none.

    Raises:
        CannotRunError: there is no such Python, or the packages cannot be installed.
    """
    folder = ENVIRONMENTS / environment.name
    python = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return python
    base = shutil.which(environment.python) or ""
    if not base:
        raise CannotRunError(f"needs {environment.python}, which is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment {environment.name} (minutes, once)", file=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([base, "-m", "venv", str(folder)], [*install, *environment.requirements]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CannotRunError(f"cannot be installed: {reason}")
    (folder / ".ready").touch()
    return python


def _run(environment: Environment, *words: str) -> str:
    """Run python with these words in an environment; returns stdout.

    Raises:
        CannotRunError: it failed; the message is the last line it wrote.
    """
    command = [str(interpreter(environment)), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=harness.ROOT)
    if done.returncode != 0:
        raise CannotRunError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


@dataclass(frozen=True, slots=True)
class Contender:
    """A tool that is ready to run: the worker's command, its interpreter, and its mode if it is ours."""

    words: tuple[str, ...]
    python: Path = Path(sys.executable)
    mode: str | None = None
    ours: bool = False

    def request(self, prompt: Mapping[str, Any], tokens: int) -> str:
        """The line that asks for an answer."""
        if self.ours:
            return json.dumps({"texts": [prompt["text"]], "mode": self.mode, "max_new_tokens": tokens})
        return json.dumps({"ids": prompt["ids"], "tokens": tokens})


def _tool(tool: str, folder: Path, environment: Environment, threads: int) -> Contender:
    # -P: modules of bench/ must not stand before the standard library's of the same name.
    words = ("-P", _WORKER, tool, str(folder), "--threads", str(threads))
    return Contender(words, interpreter(environment))


def _ours(folder: Path, mode: str | None, threads: int) -> Contender:
    words = ("-m", "trimserve.benchworker", str(folder), "--device", "cpu", "--threads", str(threads))
    return Contender(words, mode=mode, ours=True)


def make_optimum(work: Path, threads: int) -> Contender:
    """The full model, exported and run by optimum."""
    code = (
        "import sys; from optimum.onnxruntime import ORTModelForCausalLM as M\n"
        "M.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])"
    )
    _run(OPTIMUM, "-c", code, str(_model()), str(work / "optimum"))
    return _tool("optimum", work / "optimum", OPTIMUM, threads)


def make_plain(work: Path, threads: int) -> Contender:
    """The same graph with the shortest loop: what ONNX Runtime itself takes."""
    if not (work / "optimum" / "model.onnx").exists():
        raise CannotRunError("needs optimum's export")
    return _tool("plain", work / "optimum", ONNXSIM, threads)


def make_genai(work: Path, threads: int) -> Contender:
    """The full model, built and run by onnxruntime-genai."""
    folder = work / "genai"
    words = ("-m", str(_model()), "-o", str(folder), "-p", "fp32", "-e", "cpu")
    _run(BUILDER, "-m", "onnxruntime_genai.models.builder", *words)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config), "utf-8")
    return _tool("genai", folder, BUILDER, threads)


def make_onnxsim(work: Path, threads: int) -> Contender:
    """The optimum graph, pruned to our kept ids by onnxsim."""
    from trimserve.folder import open_folder

    graph, folder = work / "optimum" / "model.onnx", work / "onnxsim"
    if not graph.exists():
        raise CannotRunError("needs optimum's export")
    folder.mkdir()
    kept = open_folder(work / "trimmed").vocab.kept_ids.tolist()
    (folder / "ids.json").write_text(json.dumps(kept), "utf-8")
    code = (
        "import json, sys, onnx; from onnxsim import pruning\n"
        "kept = json.load(open(sys.argv[3]))\n"
        "found = pruning.apply_embedding_vocab_pruning(onnx.load(sys.argv[1]), keep_token_ids=kept)\n"
        "assert found.matched, 'onnxsim does not match the graph'\n"
        "onnx.save(found.model, sys.argv[2])"
    )
    _run(ONNXSIM, "-c", code, str(graph), str(folder / "model.onnx"), str(folder / "ids.json"))
    return _tool("plain", folder, ONNXSIM, threads)


def _model() -> Path:
    return harness.data_folder() / "models" / MODEL


def make_ours(work: Path) -> None:
    """Export the model trimmed and untrimmed, in the process that calls it."""
    from trimserve.folder import open_folder
    from trimserve.profiling import profile
    from trimserve.selection import select
    from trimserve.source import resolve_model
    from trimserve_export import export
    from trimserve_export.untrimmed import export_untrimmed

    source = resolve_model(_model())
    (work / "profiled.txt").write_text(split(_corpus())[0], "utf-8")
    profiled = profile([work / "profiled.txt"], source, progress=False)
    vocab = select(profiled, coverage=COVERAGE)
    export(source, vocab, work / "trimmed", progress=False)
    options: dict[str, Any] = {"profile": profiled, "to": "safetensors"}
    export(source, vocab, work / "cut", layout="tokenizer", progress=False, **options)
    export_untrimmed(open_folder(work / "trimmed"), source, work / "full")


def _corpus() -> Path:
    return harness.data_folder() / "corpora" / DOMAINS["in the domain"] / "text.txt"


def contenders(work: Path, threads: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every tool that can run, and for the others the reason."""
    makers: dict[str, Callable[[], Contender]] = {
        "trimserve, untrimmed": lambda: _ours(work / "full", None, threads),
        "trimserve, exact": lambda: _ours(work / "trimmed", "exact", threads),
        "trimserve, compact with the prompt's slots": lambda: _ours(work / "trimmed", "compact", threads),
        "optimum 0.1.0, untrimmed": lambda: make_optimum(work, threads),
        "ONNX Runtime alone, untrimmed": lambda: make_plain(work, threads),
        "onnxruntime-genai 0.18.0, untrimmed": lambda: make_genai(work, threads),
        "onnxsim 0.8.1, pruned": lambda: make_onnxsim(work, threads),
    }
    found, reasons = {}, dict(_CANNOT)
    for name, make in makers.items():
        try:
            found[name] = make()
        except CannotRunError as error:
            reasons[name] = str(error)
        print(f"{name}: {reasons.get(name, 'ready')}", file=sys.stderr)
    return found, reasons


def race(
    tools: Mapping[str, Contender], prompts: Sequence[Mapping[str, Any]], tokens: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Let the tools answer the prompts in turn; medians, memory and agreement with the first tool."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(harness.Worker(tool.words, python=tool.python))
            for name, tool in tools.items()
        }
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
        for number in range(-1, steps):
            prompt = prompts[number % len(prompts)]
            requests = {name: tool.request(prompt, tokens) for name, tool in tools.items()}
            for name, (answer,) in harness.alternately(workers, requests, 1).items():
                if number >= 0:  # the first answer opens sessions and touches pages
                    answers[name].append(answer)
            workers = {name: workers[name] for name in reversed(list(workers))}
    first = next(iter(tools))
    return {
        name: {
            "ms": asdict(harness.spread([one["ms"] for one in found])),
            "ms_samples": [one["ms"] for one in found],
            "first_ms": asdict(harness.spread([one["first_ms"] for one in found])),
            "memory": found[-1]["memory"],
            "same_ids": float(np.mean([_same(*pair) for pair in zip(answers[first], found, strict=True)])),
            "time_to_untrimmed": asdict(
                harness.paired_ratio([one["ms"] for one in found], [one["ms"] for one in answers[first]])
            ),
        }
        for name, found in answers.items()
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Share of the first answer's ids before the first difference; some tools go on after an end of text."""
    mine, theirs = one["ids"], other["ids"]
    same = 0
    while same < min(len(mine), len(theirs)) and mine[same] == theirs[same]:
        same += 1
    return same / max(1, len(mine))


def segmentation(work: Path, kept: int, texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What cut tokenizers cost on held-out texts; and why a tool could not take part."""
    (work / "held-out.json").write_text(json.dumps(list(texts)), "utf-8")
    folders = {"original": _model(), "trimserve, layout tokenizer": work / "cut"}
    reasons = {}
    try:
        folders["trimbed 0.0.4"] = _trimbed(work, kept)
    except CannotRunError as error:
        reasons["trimbed 0.0.4"] = str(error)
    found = {
        name: harness.fresh_process(["-m", "bench.peers", "--score", str(folder), "--work", str(work)])
        for name, folder in folders.items()
    }
    original = found["original"]
    for one in found.values():
        pairs = list(zip(original["pieces"], one["pieces"], strict=True))
        one["identical_texts"] = sum(mine == theirs for mine, theirs in pairs) / len(pairs)
        one["fertility"] = one["tokens"] / original["tokens"]
    return {name: {k: v for k, v in one.items() if k != "pieces"} for name, one in found.items()}, reasons


def _trimbed(work: Path, kept: int) -> Path:
    """The checkpoint that trimbed makes from the same corpus with as many ids."""
    folder = work / "trimbed"
    dataset = {"path": "text", "data_files": str(work / "profiled.txt"), "text_column": "text"}
    config = work / "trimbed.yaml"  # JSON is YAML
    settings = {
        "model": str(_model()),
        "corpus": {"datasets": [dataset]},
        "selection": {"top_k": kept},
        "verify_model": False,
    }
    config.write_text(json.dumps(settings), "utf-8")
    _run(TRIMBED, "-m", "trimbed.cli", "trim", "-c", str(config), "-o", str(folder))
    return folder


def score(folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Nats a character of a checkpoint by torch, and how its tokenizer segments the texts."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    nats, tokens = 0.0, 0
    pieces = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
        tokens += len(encoded.ids)
        pieces.append(encoded.tokens)
    characters = sum(map(len, texts))
    return {
        "rows": tokenizer.get_vocab_size(),
        "tokens": tokens,
        "nll_a_character": nats / characters,
        "pieces": pieces,
    }


HEADER = ("tool", "ms a token", "to untrimmed", "ms to the first", "anonymous", "file pages", "same ids")
CUT_HEADER = (
    "tokenizer",
    "tokens known",
    "texts segmented alike",
    "tokens to the original's",
    "nats a character",
)


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The race for people, under `HEADER`."""
    return [
        (
            name,
            f"{one['ms']['median']:.2f}",
            f"{one['time_to_untrimmed']['value']:.2f}",
            f"{one['first_ms']['median']:.1f}",
            *(human_bytes(one["memory"][part] or 0) for part in ("anonymous", "file")),
            f"{one['same_ids']:.1%}",
        )
        for name, one in row["tools"].items()
    ]


def cut_lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cut tokenizers for people, under `CUT_HEADER`."""
    return [
        (
            name,
            f"{one['rows']:,}",
            f"{one['identical_texts']:.1%}",
            f"{one['fertility']:.3f}",
            f"{one['nll_a_character']:.4f}",
        )
        for name, one in row["segmentation"].items()
    ]


def measure(work: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """The race, and what cut tokenizers cost; returns the row for the result file."""
    from tokenizers import Tokenizer

    from trimserve.folder import read_manifest

    harness.fresh_process(["-m", "bench.peers", "--make", "--work", str(work)])
    tokenizer = Tokenizer.from_file(str(_model() / "tokenizer.json"))
    texts = held_out_texts(split(_corpus())[1], tokenizer, 24)
    prompts = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts.prompts[:_PROMPTS]]
    neighbours = harness.Neighbours()
    tools, reasons = contenders(work, args.threads)
    manifest = read_manifest(work / "trimmed")
    raced = race(tools, prompts, args.tokens, args.steps)
    cut, missing = segmentation(work, manifest.kept, texts.scored)
    return {
        "model": MODEL,
        "vocab_size": manifest.vocab_size,
        "kept": manifest.kept,
        "threads": args.threads,
        "tokens": args.tokens,
        "tools": raced,
        "segmentation": cut,
        "cannot_run": reasons | missing,
        "others_cpu_share": neighbours.share(),
    }


def main() -> int:
    """Measure, save the row, print the tables and the reasons."""
    parser = harness.parser(__doc__ or "", rounds=1)
    parser.add_argument("--steps", type=int, default=harness.MIN_STEPS, help="answers a tool (default 30)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens an answer (default 48)")
    parser.add_argument("--work", type=Path, help="folder for exports (default: temporary)")
    parser.add_argument("--make", action="store_true", help="export ours into --work (used by itself)")
    parser.add_argument("--score", type=Path, help="score a checkpoint on --work's texts (used by itself)")
    args = parser.parse_args()
    if args.make:
        make_ours(args.work)
        print("{}")
        return 0
    if args.score:
        texts = json.loads((args.work / "held-out.json").read_text("utf-8"))
        print(json.dumps(score(args.score, texts)))
        return 0
    if args.quick:
        args.steps, args.tokens = 3, 16
    work = Path(tempfile.mkdtemp(prefix="trimserve-peers-", dir=args.work))
    try:
        row = measure(work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    harness.save_row("peers", row, quick=args.quick)
    print(table(HEADER, lines(row)), file=sys.stderr)
    print(table(CUT_HEADER, cut_lines(row)), file=sys.stderr)
    for name, reason in row["cannot_run"].items():
        print(f"cannot run: {name}: {reason}", file=sys.stderr)
    harness.report("", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
