"""How each tool comes to the model of the peers benchmark: what it exports, and the command that runs it.

Of int4, each tool gets matrices of 4 bits in symmetric blocks of 32 with 8-bit activations. optimum has no
such option: its graph goes through ONNX Runtime's own quantiser.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness
from bench.peers.environments import GENAI, ONNXSIM, OPTIMUM, CannotRunError, Environment, interpreter, run
from bench.quality import DOMAINS, MODEL, split

COVERAGE = 0.99
PRECISIONS = ("fp32", "int4")
_WORKER = str(harness.ROOT / "bench" / "peers" / "worker.py")


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


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where the tools' models are made: a scratch folder, the number format, and the threads to run with."""

    work: Path
    precision: str
    threads: int

    def contenders(self) -> tuple[dict[str, Contender], dict[str, str]]:
        """Every tool that can run, and for the others the reason."""
        makers: dict[str, Callable[[], Contender]] = {
            "trimserve, untrimmed": lambda: self._ours("full", None),
            "trimserve, exact": lambda: self._ours("trimmed", "exact"),
            "trimserve, compact with the prompt's slots": lambda: self._ours("trimmed", "compact"),
            "optimum 0.1.0, untrimmed": self._optimum,
            "ONNX Runtime alone, untrimmed": self._plain,
            "onnxruntime-genai 0.18.0, untrimmed": self._genai,
            "onnxsim 0.8.1, pruned": self._onnxsim,
        }
        found, reasons = {}, {}
        for name, make in makers.items():
            try:
                found[name] = make()
            except CannotRunError as error:
                reasons[name] = str(error)
            print(f"{self.precision}, {name}: {reasons.get(name, 'ready')}", file=sys.stderr)
        return found, reasons

    def _ours(self, folder: str, mode: str | None) -> Contender:
        words = ("-m", "trimserve.benchmark.worker", str(self.work / folder))
        return Contender((*words, "--device", "cpu", "--threads", str(self.threads)), mode=mode, ours=True)

    def _tool(self, tool: str, folder: Path, environment: Environment) -> Contender:
        # -P: modules of bench/ must not stand before the standard library's of the same name.
        words = ("-P", _WORKER, tool, str(folder), "--threads", str(self.threads))
        return Contender(words, interpreter(environment))

    def _optimum(self) -> Contender:
        """The full model, exported and run by optimum."""
        code = (
            "import sys; from optimum.onnxruntime import ORTModelForCausalLM as M\n"
            "M.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])"
        )
        exported = self.work / "exported"
        run(OPTIMUM, "-c", code, str(model()), str(exported))
        if self.precision == "int4":
            self._quantize(exported / "model.onnx")
        exported.rename(self.work / "optimum")
        return self._tool("optimum", self.work / "optimum", OPTIMUM)

    def _quantize(self, graph: Path) -> None:
        """Quantise a graph in place, its tied head too: folding makes its matrix a constant of its own."""
        code = (
            "import sys, onnx, onnxruntime as ort\n"
            "from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer as Q\n"
            "options = ort.SessionOptions()\n"
            "options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC\n"
            "options.optimized_model_filepath = folded = sys.argv[1] + '.folded'\n"
            "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
            "made = Q(onnx.load(folded), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)\n"
            "made.process()\n"
            "made.model.save_model_to_file(sys.argv[1])"
        )
        run(OPTIMUM, "-c", code, str(graph))

    def _plain(self) -> Contender:
        """The same graph with the shortest loop: what ONNX Runtime itself takes."""
        self._need_optimum()
        return self._tool("plain", self.work / "optimum", ONNXSIM)

    def _genai(self) -> Contender:
        """The full model, built and run by onnxruntime-genai."""
        folder = self.work / "genai"
        words = ["-m", str(model()), "-o", str(folder), "-p", self.precision, "-e", "cpu"]
        if self.precision == "int4":
            words += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        run(GENAI, "-m", "onnxruntime_genai.models.builder", *words)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text("utf-8"))
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = self.threads
        path.write_text(json.dumps(config), "utf-8")
        return self._tool("genai", folder, GENAI)

    def _onnxsim(self) -> Contender:
        """The optimum graph, pruned to our kept ids by onnxsim."""
        from trimserve.folder.opening import open_folder

        if self.precision != "fp32":
            raise CannotRunError("does not cut a quantised head")
        self._need_optimum()
        folder = self.work / "onnxsim"
        folder.mkdir()
        kept = open_folder(self.work / "trimmed").vocab.kept_ids.tolist()
        (folder / "ids.json").write_text(json.dumps(kept), "utf-8")
        code = (
            "import json, sys, onnx; from onnxsim import pruning\n"
            "kept = json.load(open(sys.argv[3]))\n"
            "found = pruning.apply_embedding_vocab_pruning(onnx.load(sys.argv[1]), keep_token_ids=kept)\n"
            "assert found.matched, 'onnxsim does not match the graph'\n"
            "onnx.save(found.model, sys.argv[2])"
        )
        graph = self.work / "optimum" / "model.onnx"
        run(ONNXSIM, "-c", code, str(graph), str(folder / "model.onnx"), str(folder / "ids.json"))
        return self._tool("plain", folder, ONNXSIM)

    def _need_optimum(self) -> None:
        if not (self.work / "optimum" / "model.onnx").exists():
            raise CannotRunError("needs optimum's export")


def model() -> Path:
    """The folder of the model that all tools run."""
    return harness.data_folder() / "models" / MODEL


def corpus() -> Path:
    """The corpus that it is trimmed to."""
    return harness.data_folder() / "corpora" / DOMAINS["in the domain"] / "text.txt"


def make_ours(work: Path, precision: str) -> None:
    """Export the model trimmed and untrimmed, in the process that calls it."""
    from trimserve.folder.opening import open_folder
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export
    from trimserve_export.full_model import export_untrimmed

    source = resolve_model(model())
    (work / "profiled.txt").write_text(split(corpus())[0], "utf-8")
    vocab = select(profile([work / "profiled.txt"], source, progress=False), coverage=COVERAGE)
    quantize = None if precision == "fp32" else precision
    export(source, vocab, work / "trimmed", quantize=quantize, progress=False)
    export_untrimmed(open_folder(work / "trimmed"), source, work / "full")
