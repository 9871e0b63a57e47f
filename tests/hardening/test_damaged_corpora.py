"""Damaged corpora: each is refused in one sentence, or counted as a loop over what other readers find in it.

A file that ends early, a flipped bit, foreign bytes: nothing may be counted short without a word. Whether an
accepted file holds what was counted is asked of readers that share no code with ours (`gzip`, frames decoded
one by one, `csv`, `json`, the table of pyarrow).
"""

import collections
import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.counting import Counter, is_sentence
from tests.support.limits import limited
from tests.support.tiny_tokenizers import byte_level_bpe
from trimserve.cli.inputs import read_texts
from trimserve.corpus import slices
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Reading
from trimserve.counting.count import count_corpus
from trimserve.counting.plan import How, Shard
from trimserve.errors import TrimserveError

SEED = 15
IN_CI, SLOWLY = 2_000, 4_000
SLICED, SLICED_SLOWLY = 100, 200  # of each of three kinds
_SLICE_BYTES = 400

ROWS = [
    {"id": str(number), "text": text, "note": f"n{number}"}
    for number, text in enumerate(
        [
            "The cat sat on the mat.\nThe dog sat on the log; a cat and a dog sat.",
            'user: can I get a "latte"?\nassistant: one latte, coming up!',
            "Der Hund und die Katze saßen auf der Matte. Le chat est assis. 日本語、中文 👩\u200d👩\u200d👧",
            "int main() {\n\treturn 0;\n}",
            "a, b; c\r\nd",
            "x" * 300,
            *(f"What is the total of {n} and {n * n}? The total is {n + n * n}." for n in range(20)),
        ]
    )
]
PLAIN = "\n".join(row["text"] for row in ROWS)


def _csv(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _jsonl() -> bytes:
    return "".join(
        json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(ROWS)
    ).encode()


def _parquet(**options: object) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=10, **options)
    return out.getvalue()


def _zst(content: bytes, **options: object) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(
        zstandard.ZstdCompressor(**options).compress(part) for part in (content[:half], content[half:])
    )


def _gz(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half], mtime=0) + gzip.compress(content[half:], mtime=0)


# What other readers find: a list of texts; any exception says that the file is damaged.


def _read_plain(content: bytes) -> list[str]:
    return [content.decode("utf-8").removeprefix("\ufeff")]


def _read_jsonl(content: bytes) -> list[str]:
    lines = [line.decode("utf-8").removeprefix("\ufeff") for line in content.split(b"\n")]
    return [json.loads(line)["text"] for line in lines if line.strip()]


def _read_csv(content: bytes, delimiter: str = ",") -> list[str]:
    text = io.StringIO(content.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), newline="")
    return [row["text"] for row in csv.DictReader(text, delimiter=delimiter)]


def _read_parquet(content: bytes) -> list[str]:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(io.BytesIO(content)).read(["text"]).column("text").to_pylist()


def _read_zst(content: bytes) -> bytes:
    import zstandard

    parts = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError
        content = frame.unused_data
    return b"".join(parts)


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, a whole one, and how another reader reads it."""

    name: str
    content: bytes
    read: Callable[[bytes], list[str]]

    @property
    def table(self) -> bool:
        """Whether it has fields."""
        return ".txt" not in self.name


def kinds() -> list[Kind]:
    """All kinds of files that a corpus can have."""
    plain, jsonl, table = PLAIN.encode(), _jsonl(), _csv(",")
    return [
        Kind("a.txt", plain, _read_plain),
        Kind("a.jsonl", jsonl, _read_jsonl),
        Kind("a.csv", table, _read_csv),
        Kind("a.tsv", b"\xef\xbb\xbf" + _csv("\t"), lambda content: _read_csv(content, "\t")),
        Kind("a.txt.gz", _gz(plain), lambda content: _read_plain(gzip.decompress(content))),
        Kind("a.jsonl.gz", _gz(jsonl), lambda content: _read_jsonl(gzip.decompress(content))),
        Kind("a.csv.gz", _gz(table), lambda content: _read_csv(gzip.decompress(content))),
        Kind("a.txt.zst", _zst(plain), lambda content: _read_plain(_read_zst(content))),
        Kind(
            "a.jsonl.zst",
            _zst(jsonl, write_checksum=True),
            lambda content: _read_jsonl(_read_zst(content)),
        ),
        Kind(
            "a.csv.zst",
            _zst(table, write_content_size=False, level=19),
            lambda content: _read_csv(_read_zst(content)),
        ),
        Kind("a.parquet", _parquet(write_page_checksum=True), _read_parquet),
        Kind("b.parquet", _parquet(compression="none", use_dictionary=False), _read_parquet),
        Kind("c.parquet", _parquet(compression="zstd", data_page_version="2.0"), _read_parquet),
    ]


def damaged(content: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """So many damaged versions of a file, each with what was done to it: half of them cut, evenly spread."""
    cuts = count // 2
    for number in range(cuts):
        at = (len(content) * number + rng.randrange(len(content))) // cuts
        yield f"cut at {at}", content[:at]
    for _ in range(count - cuts):
        at = rng.randrange(len(content))
        what = rng.choice(("flip", "flip", "flip", "flip", "byte", "drop", "twice", "zeros", "behind"))
        if what == "flip":
            bit = rng.randrange(8)
            yield f"flip {at}.{bit}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        elif what == "byte":
            byte = rng.randrange(256)
            yield f"byte {at}={byte}", content[:at] + bytes([byte]) + content[at:]
        elif what == "drop":
            size = rng.randrange(1, 60)
            yield f"drop {at}+{size}", content[:at] + content[at + size :]
        elif what == "twice":
            size = rng.randrange(1, 60)
            yield f"twice {at}+{size}", content[: at + size] + content[at:]
        elif what == "zeros":
            size = rng.randrange(1, 60)
            yield f"zeros {at}+{size}", content[:at] + bytes(size) + content[at + size :]
        else:
            yield f"behind {at}", content + rng.randbytes(rng.randrange(1, 30))


class Fuzz:
    """Tries damaged files; the counter knows how many were refused, and counted."""

    def __init__(self, folder, title: str, seed: int) -> None:
        self.folder = folder
        self.tokenizer = byte_level_bpe()
        self.json = self.tokenizer.to_str().encode()
        self.counter = Counter(title, seed)

    def count(self, paths: list[str], reading: Reading, shard: Shard | None = None):
        corpus = Corpus(paths, reading=reading)
        return count_corpus(corpus, self.tokenizer, self.json, 400, How(workers=1, shard=shard))

    def loop(self, texts: list[str]) -> tuple[int, dict[int, int]]:
        """What a loop over texts counts."""
        counts: collections.Counter[int] = collections.Counter()
        for encoding in self.tokenizer.encode_batch(texts):
            counts.update(encoding.ids)
        return len(texts), dict(counts)

    def try_one(self, kind: Kind, done: str, content: bytes, *, rows: int) -> None:
        """Count a damaged file whole, and its rows as `run --corpus` reads them."""
        path, what = self.folder / kind.name, f"{kind.name}, {done}"
        path.write_bytes(content)
        reading = Reading("text" if kind.table else None)
        options = {"text_column": "text"} if kind.table else {"unit": "document"}
        results = {
            "profile": self.outcome(kind, done, lambda: self.summary(self.count([str(path)], reading))),
            "run": self.outcome(kind, done, lambda: read_texts(str(path), options)),
        }
        if {type(found) for found in results.values()} not in ({str}, {tuple, list}):
            self.counter.fault(f"profile and run disagree: {results}", what)
        if isinstance(results["profile"], str):
            self.counter.add("refused")
            return
        self.counter.add("counted")
        try:
            truth = kind.read(content)
            expected = self.loop(truth)
        except Exception as error:
            self.counter.fault(f"accepted, but another reader says {error!r}", what)
            return
        if kind.name.endswith("parquet") and len(truth) != rows:
            self.counter.fault(f"{len(truth)} rows of {rows} were accepted", what)
        if (results["profile"], results["run"]) != (expected, truth):
            self.counter.fault(f"counted {results['profile'][0]} texts, not {len(truth)}", what)

    @staticmethod
    def summary(tally) -> tuple[int, dict[int, int]]:
        """Number of texts and the counts that are not 0."""
        return tally.texts, {int(id_): int(tally.counts[id_]) for id_ in tally.counts.nonzero()[0]}

    def outcome(self, kind: Kind, done: str, act: Callable[[], object]) -> object:
        """What an action gives; of an error of ours the sentence, which has to name the file."""
        what = f"{kind.name}, {done}"
        try:
            with limited():
                return act()
        except TrimserveError as error:
            told = str(error)
            if kind.name not in told or not is_sentence(error):
                self.counter.fault(f"unclear: {told}", what)
            return told
        except BaseException as error:
            self.counter.fault(f"{type(error).__name__}: {error}", what)
            return str(error)

    def check(self) -> None:
        """Fail where there is a fault, or where all files met the same fate."""
        self.counter.check()
        assert self.counter.kinds["refused"] > self.counter.tried // 4
        assert self.counter.kinds["counted"] > self.counter.tried // 50


@pytest.mark.parametrize("tried", [IN_CI, pytest.param(SLOWLY, marks=pytest.mark.fuzz)])
def test_damaged_files_are_refused_or_counted_whole(tmp_path, tried):
    seed = SEED if tried == IN_CI else SEED + 1
    fuzz, every = Fuzz(tmp_path, "damaged corpora", seed), kinds()
    for number, kind in enumerate(every):
        whole = Corpus([_written(tmp_path, kind)], reading=Reading("text" if kind.table else None))
        assert [document.text for document in whole.documents()] == kind.read(kind.content)
        rng = random.Random(f"{seed} {kind.name}")
        share = tried // len(every) + (number < tried % len(every))
        for done, content in damaged(kind.content, share, rng):
            fuzz.try_one(kind, done, content, rows=len(ROWS))
    fuzz.check()


def _written(folder, kind: Kind) -> str:
    path = folder / kind.name
    path.write_bytes(kind.content)
    return str(path)


@pytest.mark.parametrize("tried", [SLICED, pytest.param(SLICED_SLOWLY, marks=pytest.mark.fuzz)])
def test_slices_and_shards_of_damaged_files_add_up(tmp_path, tried, monkeypatch):
    """The same of files in slices, which workers and shards read: all of it, or one of them says why not."""
    monkeypatch.setattr(slices, "SLICE_BYTES", _SLICE_BYTES)
    fuzz = Fuzz(tmp_path, "damaged corpora in slices", SEED)
    for kind in (kind for kind in kinds() if kind.name in ("a.txt", "a.jsonl", "b.parquet")):
        rng = random.Random(f"{SEED} {kind.name}")
        for done, content in damaged(kind.content, tried, rng):
            path, what = tmp_path / kind.name, f"{kind.name}, {done}"
            path.write_bytes(content)
            reading = Reading("text" if kind.table else None)

            def together(path=path, reading=reading):
                return fuzz.summary(fuzz.count([str(path)], reading))

            def apart(path=path, reading=reading):
                parts = [fuzz.count([str(path)], reading, Shard(number, 3)) for number in (1, 2, 3)]
                counts = sum(part.counts for part in parts)
                return sum(part.texts for part in parts), {
                    int(i): int(counts[i]) for i in counts.nonzero()[0]
                }

            found = [fuzz.outcome(kind, done, act) for act in (together, apart)]
            refused = [isinstance(result, str) for result in found]
            fuzz.counter.add("refused" if refused[0] else "counted")
            try:
                expected = fuzz.loop(kind.read(content))
            except Exception:
                expected = None
            if not refused[0] and found[0] != expected:
                fuzz.counter.fault(f"counted {found[0][0]} texts otherwise than a loop", what)
            # An empty corpus is refused, an empty shard is none.
            if refused[0] != refused[1] and "holds no text" not in str(found[0]):
                fuzz.counter.fault(f"whole and in shards: {found}", what)
            if not any(refused) and found[0] != found[1]:
                fuzz.counter.fault("shards add up to something else", what)
    fuzz.check()
