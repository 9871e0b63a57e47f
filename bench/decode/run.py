"""Decoding, full against compact against exact: time, memory, and how much of the ceiling each reaches.

The full model is the untrimmed graph in the same runtime: exported like the trimmed one, with a vocab that
keeps every id. Each variant answers the same prompts greedily, one request at a time, in processes that
take turns; a token's time is that of all tokens but the first, so it holds no prompt. `exact` checks with the
cold product alone, `certified` with the sketch of the cold rows first (docs/certificate.md). Beside the
measured times stand

- the ceiling: bytes of weights a token moves, full to compact (decoding one token at a time is bound by
  them), and the speed at which this machine copies memory;
- the cost model of exact mode, each term measured apart: the decoder's step for each token drafted, the cold
  product for each block checked, and what the rest of the time is.

Random weights make the models (`decode_models` says how drafts come to stand); multidomain-qwen2 is
trained, and answers gsm8k's questions. `--prepare` makes the models in ``--work`` and stops: measuring can
follow when the machine is quiet.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import harness
from bench.decode.case import REAL_MODEL, WAYS, Case, Way, make_case
from bench.decode.models import SHAPES
from bench.decode.rows import make_row, summary
from trimserve.folder.names import SKETCH_NAME

SIZES = (1, 2, 4, 8, 16, 32)
_WARM_TOKENS = 32


def measure(case: Case, steps: int, scratch: Path) -> dict[str, Any]:
    """Measure one case; returns the row for the result file."""
    parts = {name: _parts(folder, scratch / name) for name, folder in case.folders.items()}
    resident = _resident(case)
    neighbours = harness.Neighbours()
    with case.start("full") as full, case.start("trimmed") as trimmed:
        workers = {"full": full, "trimmed": trimmed}
        ways = _ways(case)
        for way in ways.values():  # opens every session, touches every page, and sizes the blocks
            way.ask(workers, case.request(0) | {"tokens": min(case.tokens, _WARM_TOKENS)})
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number in range(steps):
            for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
                answers[name].append(ways[name].ask(workers, case.request(number)))
        context = len(case.prompts[0].split()) + case.tokens // 2
        terms = {
            "full": full.ask(json.dumps(_terms_request(parts["full"], context))),
            "trimmed": trimmed.ask(json.dumps(_terms_request(parts["trimmed"], context))),
        }
    others = {"others_cpu_share": neighbours.share(), "load_average": os.getloadavg()[0]}
    return make_row(case, answers, terms, parts, resident) | others


def _ways(case: Case) -> dict[str, Way]:
    """The ways that the case's folders allow."""
    has_sketch = (case.folders["trimmed"] / SKETCH_NAME).exists()
    return {name: way for name, way in WAYS.items() if has_sketch or not way.certify}


def _parts(folder: Path, scratch: Path) -> dict[str, Any]:
    # In a process of its own: onnx_ir keeps files open that are to be deleted.
    return harness.fresh_process(["-m", "bench.decode.parts", str(folder / "model.onnx"), str(scratch)])


def _terms_request(parts: Mapping[str, Any], context: int) -> dict[str, Any]:
    return {"context": context, "sizes": SIZES, "body": parts["body"], "head": parts["head"]}


def _resident(case: Case) -> dict[str, dict[str, int]]:
    """Memory of each variant in a process of its own, after a short answer."""
    found = {}
    for name, way in _ways(case).items():
        with case.start(way.folder) as worker:
            request = case.request(0) | {"tokens": min(case.tokens, _WARM_TOKENS)}
            found[name] = way.ask({way.folder: worker}, request)["memory"]
    return found


def main() -> int:
    """Measure the chosen models, save a row each, print a table each."""
    parser = harness.parser(__doc__ or "", rounds=10)
    parser.add_argument(
        "--model", nargs="+", choices=(*SHAPES, REAL_MODEL), default=[*list(SHAPES)[:-1], REAL_MODEL]
    )
    parser.add_argument("--format", nargs="+", choices=("fp32", "int4", "int8"), default=["fp32", "int4"])
    parser.add_argument("--tokens", type=int, default=128, help="tokens an answer (default 128)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens a random prompt (default 32)")
    parser.add_argument(
        "--stand", type=float, default=0.99, help="share of drafts to stand, of random models"
    )
    parser.add_argument("--coverage", type=float, default=0.99, help="of gsm8k, for multidomain-qwen2")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape has")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and exports, which stay there")
    parser.add_argument("--prepare", action="store_true", help="make the models in --work and stop")
    args = parser.parse_args()
    if args.prepare and not args.work:
        parser.error("--prepare needs --work")
    rows = []
    for name in ["tiny"] if args.quick else args.model:
        for chosen in args.format:
            row = _measure_in(args, name, None if chosen == "fp32" else chosen)
            rows += [harness.without_samples(row)] if row else []
    harness.report("", {"rows": rows})
    return 0


def _measure_in(args: Any, name: str, quantize: str | None) -> dict[str, Any] | None:  # noqa: ANN401
    """Make one case in the folder for it, measure it and save its row; None with --prepare."""
    stand = args.coverage if name == REAL_MODEL else args.stand
    kept = args.work and args.work / f"{name}-{stand}"
    work = kept or Path(tempfile.mkdtemp(prefix=f"trimserve-decode-{name}-"))
    work.mkdir(parents=True, exist_ok=True)
    scratch = work / f"parts-{quantize or 'fp32'}"
    try:
        case = make_case(args, name, quantize, work)
        if args.prepare:
            return None
        row = measure(case, 2 if args.quick else args.rounds, scratch)
        harness.save_row("decode", row, quick=args.quick, device=args.device)
        print(summary(row), file=sys.stderr)
        return row
    finally:
        shutil.rmtree(scratch if kept else work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
