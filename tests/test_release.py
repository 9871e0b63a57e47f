"""What is released says one version and one address everywhere, and can be built from what is copied."""

import re
import sys
import tomllib

import pytest

from tests.support.pages import README, ROOT
from trimserve import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


def test_the_citation_has_the_version_and_the_address():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == __version__
    assert re.search(r"^repository-code: (.*)$", citation, re.MULTILINE)[1] == REPOSITORY
    assert all(url.startswith(REPOSITORY) for url in PROJECT["project"]["urls"].values())


def test_the_workflow_reads_the_version_as_it_is_written():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")
    pattern = re.search(r"s/(\^__version__.*?)/\\1/p", workflow)[1].replace(r"\(", "(").replace(r"\)", ")")
    text = (ROOT / "trimserve" / "version.py").read_text("utf-8")
    assert re.search(pattern, text, re.MULTILINE)[1] == __version__


@pytest.mark.parametrize("place", ["Dockerfile", "sdist"])
def test_what_the_build_needs_is_there(place):
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    there = {
        "Dockerfile": re.search(r"^COPY (pyproject.*) \./$", dockerfile, re.MULTILINE)[1].split(),
        "sdist": PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"],
    }
    assert {"hatch_build.py", "README.md"} <= set(there[place])
    assert "readme" in PROJECT["project"]["dynamic"]


def test_links_of_the_page_on_an_index_lead_to_the_repository(monkeypatch):
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("hatch_build", None)
    import hatch_build

    text = '[a](docs/a.md#b) [c](https://x.y) [d](#e) <img src="docs/f.png"> <source srcset="g.svg">'
    assert hatch_build.absolute(text, "https://r") == (
        "[a](https://r/blob/main/docs/a.md#b) [c](https://x.y) [d](#e) "
        '<img src="https://r/raw/main/docs/f.png"> <source srcset="https://r/raw/main/g.svg">'
    )
    page = hatch_build.absolute(README.read_text("utf-8"), REPOSITORY)
    assert re.findall(r"\]\((?!https?:|#)[^)]+", page) == []
