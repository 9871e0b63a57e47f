"""The report: its numbers against plain counting, its page in a browser."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.support.browser import find_browser, probe, run
from tests.support.profiles import make_profile
from tests.support.rounding import FLOAT64, gamma
from tests.support.tiny_tokenizers import TEXT, save_model_folder
from trimserve.cli.main import main
from trimserve.folder.manifest import Manifest, Source, write_manifest
from trimserve.model.prize import WeightBytes
from trimserve.model.resolve import resolve_model
from trimserve.profiles.difference import js_distance
from trimserve.profiles.merging import merge
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile
from trimserve.reporting.facts import Inputs, gather
from trimserve.reporting.page import render
from trimserve.reporting.terminal import summarise
from trimserve.selection.select_ids import select
from trimserve.text.dead_ids import dead_ids
from trimserve.text.names import TokenNames
from trimserve.vocab.file import save_vocab

HOSTILE = [
    "<script>alert(1)</script> & \"quotes\" 'too'",
    "\u202eright to left\u202c שלום",
    "\x00\x1b[31m\u200d",
    "x" * 300,
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two domains of one byte-level model, of which 200 rows of 327 stay; the second one hostile."""
    folder = save_model_folder("byte_level_bpe", tmp_path_factory.mktemp("report") / "model")
    source = resolve_model(folder)
    tokenizer = source.tokenizer()
    texts = {"plain": TEXT.splitlines() * 3, "hostile": [*HOSTILE, TEXT[:200]] * 2}
    profiles = {name: counted(source, tokenizer, part) for name, part in texts.items()}
    merged = merge(list(profiles.values()))
    kept = np.union1d(merged.structural[:180], np.argsort(-merged.counts)[:20])
    vocab = dataclasses.replace(
        select(merged, multiple_of=1), kept_ids=kept, reason=np.where(np.isin(kept, merged.structural), 0, 1)
    )
    return Inputs(
        profiles=profiles,
        merged=merged,
        vocab=vocab,
        names=TokenNames(tokenizer),
        weights=WeightBytes(merged.vocab_size, 327 * 64, 327 * 32, 4_000),
        held_out=counted(source, tokenizer, ["a dog and a latte\n", "zebra"]),
        dead_ids=dead_ids(tokenizer),
        verification={
            "ok": False,
            "checks": [
                {"name": "files", "ok": True, "detail": "all hashes <match>"},
                {"name": "logits", "ok": False, "detail": "3 differ & more", "max_abs_diff": 0.5},
            ],
        },
    )


def counted(source, tokenizer, texts):
    """A profile with the documents of each id counted the plain way."""
    documents = np.zeros(source.vocab_size, np.int64)
    for text in texts:
        documents[list(set(tokenizer.encode(text).ids))] += 1
    made = profile((), source, texts=texts, progress=False)
    return dataclasses.replace(made, document_counts=documents, output_counts=made.counts // 2)


def test_numbers_are_those_of_plain_counting(inputs):
    report, counts = gather(inputs), inputs.merged.counts
    kept = set(inputs.vocab.kept_ids.tolist())
    total = counts.sum()
    cold = sum(int(count) for id_, count in enumerate(counts) if id_ not in kept)
    assert report.choice.coverage == pytest.approx(1 - cold / total)
    held_out = inputs.held_out.counts
    assert report.choice.held_out == pytest.approx(sum(held_out[list(kept)]) / held_out.sum())
    must_stay = set(inputs.vocab.kept_ids[inputs.vocab.reason == 0].tolist())
    again = [i for i in kept if i in must_stay or inputs.merged.document_counts[i] > 1]
    assert report.choice.cold_per_thousand == pytest.approx(1000 * (1 - counts[again].sum() / total))
    assert report.choice.decode_ratio == inputs.weights.decode_ratio(len(kept))
    last = report.curve[-1]
    assert (last.coverage, last.kept) == (1.0, 320)  # seven padding rows are never kept
    for one, other in zip(report.curve, report.curve[1:], strict=False):
        assert one.kept < other.kept
        assert one.coverage <= other.coverage
        assert one.expected <= one.coverage + gamma(320, FLOAT64)  # a sum of the shares of 320 ids
    assert sum(kind.ids for kind in report.kinds) == 320
    assert sum(kind.kept_ids for kind in report.kinds) == len(kept)
    assert sum(kind.share for kind in report.kinds) == pytest.approx(1)
    assert sum(kind.kept_share for kind in report.kinds) == pytest.approx(report.choice.coverage)
    dropped = sorted((-int(count), id_) for id_, count in enumerate(counts) if id_ not in kept and count)
    assert [(-d.count, d.token_id) for d in report.dropped] == dropped[:30]
    first, second = inputs.profiles.values()
    assert report.domains.js_distance[0][1] == js_distance(first.mass, second.mass)
    assert report.domains.chosen == (first.coverage(sorted(kept)), second.coverage(sorted(kept)))
    assert report.completions.tokens == (first.counts // 2).sum() + (second.counts // 2).sum()


def test_a_head_with_fewer_rows_is_told_and_counted(inputs):
    of_head = inputs.vocab.kept_ids[::2]
    report = gather(dataclasses.replace(inputs, vocab=dataclasses.replace(inputs.vocab, output_ids=of_head)))
    spoken = inputs.merged.output_counts
    assert report.completions.head_rows == len(of_head)
    assert report.completions.head_coverage == pytest.approx(spoken[of_head].sum() / spoken.sum())
    assert report.choice.decode_ratio == inputs.weights.decode_ratio(len(of_head))
    assert f"<td>{len(of_head):,}</td>" in render(report, "Title").split("Rows of the head", 1)[1]


def test_json_terminal_and_page_agree(inputs):
    report = gather(inputs)
    document = json.loads(json.dumps(report.to_dict()))
    text, page = summarise(report, "Title"), render(report, "Title")
    assert document["choice"]["kept"] == len(inputs.vocab)
    for shown in (text, page):
        assert f"{len(inputs.vocab):,} of 327" in re.sub(r"<[^>]*>", "", shown)
    assert document["recommended"]["kept"] == report.recommended.kept
    assert all(f"{report.recommended.kept:,} ids" in shown for shown in (text, page))
    assert "verified            FAILED" in text
    assert len(text.splitlines()) < 70


def test_the_least_k_that_leaves_few_tokens_cold_is_recommended():
    # 900 ids of 3,000 make all but a thousandth of the text; each is in many documents.
    counts = np.where(np.arange(3_000) < 900, 1_000, 0)
    counts[900:1_200] = 2
    profile = dataclasses.replace(make_profile(counts), document_counts=np.minimum(counts, 500))
    report = gather(Inputs({"p": profile}, profile, select(profile, coverage=0.5)))
    found = report.recommended
    least = min(point.kept for point in report.curve if point.expected >= 0.999)
    assert found.enough_text
    assert found.kept == -(-least // 128) * 128 < 1_200
    assert found.cold_per_thousand <= 1
    assert "at most 1 cold token of 1,000" in found.reason


def test_where_too_little_was_profiled_the_end_of_what_helps_is_recommended():
    counts = np.where(np.arange(3_000) < 300, 9, (np.arange(3_000) < 600).astype(int))
    profile = dataclasses.replace(make_profile(counts), document_counts=np.minimum(counts, 4))
    report = gather(Inputs({"p": profile}, profile, select(profile)))
    found = report.recommended
    assert not found.enough_text
    assert report.enough <= found.kept < report.enough + 256
    assert found.cold_per_thousand == pytest.approx(1000 * 300 / 3_000)
    assert all("more text helps more" in made(report, "T") for made in (summarise, render))


def test_tokens_are_not_named_that_few_documents_hold(inputs):
    private = gather(dataclasses.replace(inputs, min_docs=3), top=327)
    documents = inputs.merged.document_counts
    assert len(private.dropped) < len(gather(inputs, top=327).dropped)
    assert all(documents[token.token_id] >= 3 for token in private.dropped)
    assert "few documents hold are left out" in render(private, "t")
    unknown = dataclasses.replace(inputs.merged, document_counts=None)
    assert gather(dataclasses.replace(inputs, merged=unknown, min_docs=3)).dropped == ()


def test_what_is_not_at_hand_is_left_out(inputs):
    bare = Inputs(profiles={"p": inputs.merged}, merged=inputs.merged, vocab=inputs.vocab)
    report = gather(bare)
    page, text = render(report, "t"), summarise(report, "t")
    assert (report.kinds, report.domains, report.choice.weight_bytes) == (None, None, None)
    assert "What each K costs" not in page
    assert f"#{report.dropped[0].token_id}" in page
    assert "kept ids" in text


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ([5], {}),
        ([5, 0, 0], {}),
        ([1, 1, 1, 1], {}),
        ([5, 1], {"texts": 2, "document_counts": np.array([2, 1])}),
        (np.arange(1, 3_000), {}),
        (np.append(10**9, np.ones(5_000)), {}),
    ],
)
def test_odd_profiles_are_shown(counts, options):
    odd = make_profile(counts, **options)
    report = gather(Inputs(profiles={"p": odd}, merged=odd, vocab=select(odd)))
    assert report.curve[-1].coverage == 1
    assert "kept ids" in summarise(report, "t")
    reader = Reader()
    reader.feed(render(report, "t"))
    assert not reader.open
    assert "nan" not in "".join(reader.text)


class Reader(HTMLParser):
    """Collects tags, what they point to, and text; complains about tags that do not match."""

    VOID = frozenset({"meta", "line", "polyline", "circle", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_one_file_without_scripts_or_links(inputs):
    hostile = '<img src=x onerror="alert(1)">&amp; {braces} \x1b'
    page = render(gather(inputs), hostile)
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert not reader.links
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
    assert '<img src=x onerror="alert(1)">&amp; {braces} ' in "".join(reader.text)
    assert len(page) < 150_000


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium on PATH: install one, or name it in TRIMSERVE_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def page(inputs, tmp_path_factory):
    """The page of a choice that covers nearly all, so that the axis has its longest labels."""
    path, report = tmp_path_factory.mktemp("page") / "report.html", gather(inputs)
    nearly = dataclasses.replace(report, choice=dataclasses.replace(report.choice, coverage=0.999995))
    title = "A report with a rather long title, and averyveryveryveryverylongwordinit"
    path.write_text(render(nearly, title), "utf-8")
    return path


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_plots_are_seen_and_nothing_overflows(browser, page, tmp_path, width, dark):
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = probe(browser, page, width, tmp_path, *options)
    assert found["width"] == width
    assert found["scroll_width"] == width
    assert found["outside"] == []
    assert found["clipped"] == []
    assert found["overlaps"] == []
    assert found["scrolling"] == 0
    assert len(found["charts"]) == 4  # coverage, weights, speed, corpus; one drawing of each
    assert all(lines >= 1 and wide > 200 for lines, wide in found["charts"])
    assert found["least_font"] >= 11
    paper, ink = luminance(found["background"]), luminance(found["color"])
    assert (paper < 0.2 < 0.7 < ink) if dark else (ink < 0.2 < 0.9 < paper)


def luminance(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_it_prints(browser, page, tmp_path):
    run(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'p.pdf'}", page.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "p.pdf").read_bytes()))
    assert 2 <= pages <= 10


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model_folder("byte_level_bpe", tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "b.txt").write_text("a zebra\n", "utf-8")
    assert main(["profile", "a.txt", "-m", "model", "-o", "p.safetensors"]) == 0
    capsys.readouterr()
    arguments = ["report", "p.safetensors", "--held-out", "b.txt", "-o", "r.html"]
    assert main([*arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == "r.html"
    assert found["held_out_tokens"] > 0
    vocab = select(Profile.load("p.safetensors"))
    assert found["choice"]["kept"] == len(vocab)
    kept = found["recommended"]["kept"]
    assert found["next"] == f"trimserve export -m model --profile p.safetensors --top-k {kept} -o p-{kept}"
    assert "zebra" not in (tmp_path / "r.html").read_text("utf-8").lower()
    # A trimmed folder brings its vocab and what verification found.
    (tmp_path / "folder").mkdir()
    small = select(Profile.load("p.safetensors"), coverage=0, multiple_of=1)
    save_vocab(small, tmp_path / "folder" / "vocab_map.safetensors")
    verification = {"ok": True, "checks": [{"name": "rows", "ok": True, "detail": "all equal"}]}
    write_manifest(tmp_path / "folder", made_manifest(small, verification))
    assert main(["report", "p.safetensors", "--folder", "folder", "-o", "r.html", "--title", "Mine"]) == 0
    assert "report: r.html" in capsys.readouterr().out
    assert main(["report", "p.safetensors", "--vocab", "folder", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]["kept"] == len(small)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "Every check against the full model holds" in page
    assert "<h1>Mine</h1>" in page
    before = sorted(tmp_path.iterdir())
    for wrong in (
        ["-o", "r.txt"],
        ["-o", "folder"],
        ["--vocab", "none"],
        ["--held-out", "none.txt"],
        ["-m", "none"],
    ):
        assert main(["report", "p.safetensors", *wrong]) == 2
    assert main(["report"]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--text-column", "p", "--output-column", "c"], [{"p": "a dog", "c": "the zebra\n"}]),
        (["--text-column", "p", "--unit", "line"], [{"p": "a dog\nthe zebra\n\n"}, {"p": "a cat"}]),
        (
            ["--chat"],
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        ),
    ],
)
def test_held_out_files_are_read_as_profile_reads_them(options, rows, tmp_path, monkeypatch, capsys):
    if "--chat" in options:
        pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    folder = save_model_folder("byte_level_bpe", tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert main(["profile", "a.txt", "-m", "model", "-o", "p.safetensors"]) == 0
    assert main(["profile", "b.jsonl", "-m", "model", "-o", "h.safetensors", *options]) == 0
    capsys.readouterr()
    found = []
    for held_out in (["b.jsonl", *options], ["h.safetensors"]):
        assert main(["report", "p.safetensors", "--format", "json", "--held-out", *held_out]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["held_out_tokens"] == Profile.load("h.safetensors").tokens
    for nothing_to_read in (["--held-out", "h.safetensors"], []):
        assert main(["report", "p.safetensors", *options, *nothing_to_read]) == 2
        assert "leave the options out" in capsys.readouterr().err


def made_manifest(vocab, verification):
    return Manifest(
        source=Source("model", None, {}),
        tokenizer_sha256=vocab.tokenizer_sha256,
        vocab_size=vocab.vocab_size,
        kept=len(vocab),
        task="feature-extraction",
        layout="runtime",
        dtype="fp32",
        graphs={},
        cut=(),
        selection=vocab.rule,
        exporter={},
        created="2026-01-01T00:00:00Z",
        files={},
        verification=verification,
    )
