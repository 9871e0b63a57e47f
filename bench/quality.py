"""What trimming costs in quality: full, compact, exact and re-segmented, for K from 1,024 up.

multidomain-qwen2 is trimmed to gsm8k at each K, with the original tokenizer (runtime layout) and with one cut
to the kept ids (tokenizer layout, which segments texts anew). All read the same held-out texts: of the
profile's own domain, and of another.

- nll: nats a token of the original segmentation, so that other segmentations compare. Compact mode gives a
  cold token no probability at all: its nll is that of the tokens it can produce, and their share stands
  beside it.
- agreement: share of the full model's greedy answer, in characters, before the first difference.

Exact mode must be a flat line at the full model's value.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench import harness
from trimserve.arrays import Floats, Ids
from trimserve.console import table
from trimserve.decoding.scoring import log_sum_exp
from trimserve.folder.manifest import read_manifest
from trimserve.folder.opening import open_folder
from trimserve.generation.generator import Generator
from trimserve.loading import load
from trimserve.profiles.profile import Profile
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.session import open_session

MODEL = "multidomain-qwen2"
DOMAINS = {"in the domain": "gsm8k-en", "another domain": "law-en-uscode"}
KEPT = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_CHUNK_LINES = 20  # of a corpus, of which every tenth chunk is held out
_TEXT_TOKENS = 128
_PROMPT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Texts:
    """Held-out texts of one domain: to score, and to go on from."""

    scored: Sequence[str]
    prompts: Sequence[str]


def split(corpus: Path) -> tuple[str, list[str]]:
    """The profiled part of a corpus, and held-out chunks of some lines each."""
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    chunks = ["".join(lines[start : start + _CHUNK_LINES]) for start in range(0, len(lines), _CHUNK_LINES)]
    held_out = chunks[9::10]
    return "".join(chunk for number, chunk in enumerate(chunks, 1) if number % 10), held_out


def held_out_texts(chunks: Sequence[str], tokenizer: Tokenizer, count: int) -> Texts:
    """Texts from all over the held-out part, cut to a number of tokens."""
    chosen = chunks[:: max(1, len(chunks) // count)][:count]

    def cut(text: str, tokens: int) -> str:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets[:tokens]
        return text[: offsets[-1][1]]

    scored = [cut(text, _TEXT_TOKENS) for text in chosen]
    return Texts(scored, [cut(text, _PROMPT_TOKENS) for text in chosen])


class Resegmented:
    """A folder of the tokenizer layout, run as any other runtime would: plain ids in, logits of K ids out."""

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        self.kept = manifest.kept
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._session = open_session(folder / manifest.graphs["model"], threads=threads)
        self._stops = _eos_ids(folder)

    def ids(self, text: str) -> Ids:
        """Ids of the cut tokenizer, int32 (T,)."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def logits(self, ids: Ids) -> Floats:
        """Logits after each position, float32 (T, K)."""
        count = ids.size
        feeds: dict[str, Any] = {}
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        known = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
        }
        names = {value.name for value in self._session.get_inputs()}
        feeds |= {name: value for name, value in known.items() if name in names}
        logits: Floats = self._session.run(["logits"], feeds)[0][0]
        return logits

    def nll(self, text: str) -> float:
        """Nats of all tokens after the first."""
        ids = self.ids(text)
        logits = self.logits(ids)[:-1]
        chosen = logits[np.arange(ids.size - 1), ids[1:]]
        return float((log_sum_exp(logits) - chosen).sum())

    def answer(self, prompt: str, tokens: int) -> str:
        """Greedy continuation; the graph is fed anew at each step, which is slow and simple."""
        ids = start = self.ids(prompt)
        while ids.size < start.size + tokens:
            best = int(self.logits(ids)[-1].argmax())
            if best in self._stops:
                break
            ids = np.append(ids, np.int32(best))
        text: str = self.tokenizer.decode(ids[start.size :].tolist())
        return text


def _eos_ids(folder: Path) -> set[int]:
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
    return {int(id_) for id_ in (eos if isinstance(eos, list) else [eos]) if id_ is not None}


class CompactScores:
    """Log-probabilities in compact mode: the softmax over the kept ids alone."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = open_folder(folder)
        session = open_session(self._folder.file(self._folder.manifest.graphs["model"]), threads=threads)
        self._decoder = Decoder(session)
        self._cold = ColdRows(self._folder, widths=[rows.shape[1] for rows in self._decoder.no_rows])

    def score(self, ids: Ids) -> tuple[float, int]:
        """Nats of the kept tokens after the first, and how many of those tokens are kept."""
        vocab = self._folder.vocab
        slotted = vocab.with_slots(ids[None, :-1])
        cache = self._decoder.empty_cache(1)
        step = self._decoder.step(cache, slotted.ids, self._cold.embeddings(slotted.cold_ids), keep=0)
        kept = vocab.is_kept(ids[1:])
        logits = step.logits[0][kept]
        chosen = logits[np.arange(len(logits)), vocab.to_compact(ids[1:][kept])]
        return float((log_sum_exp(logits) - chosen).sum()), int(kept.sum())


def common(one: str, other: str) -> float:
    """Share of `one` before the first character in which `other` differs; 1 for an empty answer."""
    same = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        same += 1
    return same / len(one) if one else 1.0


def measure_full(full: Generator, texts: Texts, tokens: int) -> dict[str, Any]:
    """The full model: nll a token, the tokens it is counted by, and its answers."""
    scores = full.score(list(texts.scored))
    counted = sum(score.ids.size - 1 for score in scores)
    answers = [
        answer.text for answer in full.generate(list(texts.prompts), max_new_tokens=tokens, temperature=0.0)
    ]
    nll = -sum(score.total for score in scores) / counted
    return {"nll": nll, "tokens": counted, "answers": answers, "ids": [score.ids for score in scores]}


def measure_kept(
    folders: Mapping[str, Path], full: Mapping[str, Any], texts: Texts, tokens: int, threads: int
) -> dict[str, Any]:
    """One K on one domain: nll and agreement of exact, compact and re-segmented."""
    model = load(folders["runtime"], threads=threads)
    if not isinstance(model, Generator):
        raise TypeError(f"{folders['runtime']} is no generator")
    exact = -sum(score.total for score in model.score(list(texts.scored))) / full["tokens"]
    answers = {
        mode: [
            answer.text
            for answer in model.generate(
                list(texts.prompts), max_new_tokens=tokens, mode=mode, temperature=0.0
            )
        ]
        for mode in ("exact", "compact")
    }
    compact = CompactScores(folders["runtime"], threads)
    nats, kept = (sum(column) for column in zip(*map(compact.score, full["ids"]), strict=True))
    cut = Resegmented(folders["tokenizer"], threads)
    answers["resegmented"] = [cut.answer(prompt, tokens) for prompt in texts.prompts]
    pieces = sum(cut.ids(text).size for text in texts.scored)
    original = sum(ids.size for ids in full["ids"])
    return {
        "exact_nll": exact,
        "compact_nll": nats / kept,
        "compact_reachable": kept / full["tokens"],
        "resegmented_nll": sum(map(cut.nll, texts.scored)) / full["tokens"],
        "resegmented_fertility": pieces / original,
        "resegmented_kept": cut.kept,
        "agreement": {
            name: float(np.mean([common(*pair) for pair in zip(full["answers"], found, strict=True)]))
            for name, found in answers.items()
        },
    }


def _unseen(profiled: Profile, size: int) -> list[int]:
    """The lowest ids that the profile has not seen, where K is larger than what it has.

    Merges are numbered in the order in which the tokenizer learnt them, the most frequent first.
    """
    seen = np.union1d(np.flatnonzero(profiled.counts), profiled.structural)
    others = np.setdiff1d(np.arange(profiled.vocab_size), np.union1d(seen, profiled.padding_ids))
    return [int(id_) for id_ in others[: max(0, size - seen.size)]]


def make(work: Path, kept: Sequence[int]) -> dict[str, Any]:
    """Export the full model and both layouts at each K; returns the folders."""
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export
    from trimserve_export.full_model import export_untrimmed

    source = resolve_model(harness.data_folder() / "models" / MODEL)
    corpus = harness.data_folder() / "corpora" / DOMAINS["in the domain"] / "text.txt"
    (work / "profiled.txt").write_text(split(corpus)[0], "utf-8")
    profiled = profile([work / "profiled.txt"], source, progress=False)
    folders: dict[str, Any] = {}
    for size in kept:
        vocab = select(profiled, top_k=size, keep_ids=_unseen(profiled, size))
        folders[str(size)] = {name: str(work / f"{name}-{size}") for name in ("runtime", "tokenizer")}
        for layout, target in folders[str(size)].items():
            options: dict[str, Any] = {"profile": profiled} if layout == "tokenizer" else {}
            export(source, vocab, target, layout=layout, progress=False, **options)
    first = open_folder(Path(folders[str(kept[0])]["runtime"]))
    export_untrimmed(first, source, work / "full")
    return folders | {"full": str(work / "full")}


HEADER = (
    "K",
    "exact nll",
    "compact nll",
    "tokens it can produce",
    "re-segmented nll",
    "tokens to original",
    "exact agrees",
    "compact agrees",
    "re-segmented agrees",
)


def lines(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The points of one domain for people, under `HEADER`."""
    return [
        (
            f"{point['kept']:,}",
            f"{point['exact_nll']:.4f}",
            f"{point['compact_nll']:.4f}",
            f"{point['compact_reachable']:.2%}",
            f"{point['resegmented_nll']:.4f}",
            f"{point['resegmented_fertility']:.3f}",
            *(f"{point['agreement'][name]:.1%}" for name in ("exact", "compact", "resegmented")),
        )
        for point in points
    ]


def measure(args: Any, work: Path) -> dict[str, Any]:  # noqa: ANN401
    """All K on all domains; returns the row for the result file."""
    words = ["-m", "bench.quality", "--make", str(work), "--kept", *map(str, args.kept)]
    made = harness.fresh_process(words)
    full = load(made["full"], threads=args.threads)
    if not isinstance(full, Generator):
        raise TypeError(f"{made['full']} is no generator")
    domains = {}
    for name, corpus in DOMAINS.items():
        _, chunks = split(harness.data_folder() / "corpora" / corpus / "text.txt")
        texts = held_out_texts(chunks, full.codec.tokenizer, args.texts)
        reference = measure_full(full, texts, args.tokens)
        points = []
        for size in args.kept:
            folders = {layout: Path(path) for layout, path in made[str(size)].items()}
            found = measure_kept(folders, reference, texts, args.tokens, args.threads)
            points.append({"kept": read_manifest(folders["runtime"]).kept} | found)
            print(f"{name}, K = {size:,}", file=sys.stderr)
        flat = max(abs(point["exact_nll"] - reference["nll"]) for point in points)
        domains[name] = {
            "corpus": corpus,
            "full_nll": reference["nll"],
            "tokens": reference["tokens"],
            "points": points,
            "exact_from_flat": flat,
        }
    vocab_size = read_manifest(Path(made["full"])).vocab_size
    return {"model": MODEL, "vocab_size": vocab_size, "answer_tokens": args.tokens, "domains": domains}


def main() -> int:
    """Measure, save the row, print a table a domain; exit code 1 where exact mode is not the full model."""
    parser = harness.parser(__doc__ or "", rounds=1, work="the exports")
    parser.add_argument("--kept", nargs="+", type=int, default=list(KEPT), metavar="K")
    parser.add_argument("--texts", type=int, default=24, help="held-out texts a domain (default 24)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an answer (default 32)")
    parser.add_argument("--make", type=Path, help="export into this folder, print where (used by itself)")
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(args.make, args.kept)))
        return 0
    if args.quick:
        args.kept, args.texts, args.tokens = [2048], 3, 8
    with harness.scratch_folder("quality", args.work) as work:
        row = measure(args, work)
    harness.save_row("quality", row, quick=args.quick)
    for name, domain in row["domains"].items():
        print(
            f"{name} ({domain['corpus']}): full model {domain['full_nll']:.4f} nats a token", file=sys.stderr
        )
        print(table(HEADER, lines(domain["points"])), file=sys.stderr)
    harness.report("", row)
    exact = all(
        math.isclose(domain["exact_from_flat"], 0, abs_tol=1e-4)
        and all(point["agreement"]["exact"] == 1 for point in domain["points"])
        for domain in row["domains"].values()
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
