"""Draw docs/img/report.png: the first screens of a report, as the README shows it.

The profiles are of real corpora of TRIMSERVE_DATA, counted with a small model's tokenizer. Needs Chromium and
Pillow. Run it again whenever the report's looks change: ``python -m bench.report_picture``.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from bench import harness
from trimserve.cli.main import main as trimserve
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profiling import profile

PICTURE = harness.ROOT / "docs" / "img" / "report.png"
# What parts two documents: questions with their answers, and messages to a bank.
CORPORA = {"gsm8k-en": "\n#### ", "medquad-en": "\nQ: ", "banking77-en": "\n"}
DOCUMENTS = 4_000
WIDTH, HEIGHT, COLOURS = 980, 1108, 128
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def documents(folder: Path, separator: str) -> list[str]:
    """The first documents of a corpus."""
    files = sorted(file for file in folder.glob("*.txt") if file.name != "SOURCE.txt")
    texts = (text for file in files for text in file.read_text("utf-8").split(separator) if text.strip())
    return [text for text, _ in zip(texts, range(DOCUMENTS), strict=False)]


def write_report(data: Path, folder: Path) -> Path:
    """Profile the corpora and write the report's page."""
    source = resolve_model(data / "models" / "multidomain-qwen2")
    for name, separator in CORPORA.items():
        texts = documents(data / "corpora" / name, separator)
        profile((), source, texts=texts, progress=False).save(folder / f"{name}.safetensors")
    page = folder / "report.html"
    profiles = [str(folder / f"{name}.safetensors") for name in CORPORA]
    if trimserve(["report", *profiles, "--title", "Mathematics, medicine, banking", "-o", str(page)]):
        raise SystemExit("the report could not be made")
    return page


def photograph(page: Path, picture: Path, folder: Path) -> None:
    """Take a picture of the page's beginning, in as few colours as it needs."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("the picture needs Chromium on PATH")
    raw = folder / "raw.png"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={raw}")
    size = f"--window-size={WIDTH},{HEIGHT}"
    subprocess.run([browser, *options, size, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    picture.parent.mkdir(exist_ok=True)
    Image.open(raw).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)


def main() -> int:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=harness.data_folder(), help="folder of corpora and models"
    )
    parser.add_argument("--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = write_report(args.data, Path(scratch))
        photograph(page, args.output, Path(scratch))
    print(f"{args.output}: {args.output.stat().st_size:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
