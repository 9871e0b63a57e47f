"""The model card's front matter: the licence that the base model's front matter names, none from its text."""

import dataclasses

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("yaml")

import yaml

from tests.support.folders import make_folder
from trimserve.model.source import ModelSource
from trimserve_export.card import render_card

pytestmark = pytest.mark.export

BODY = """
# A model

Of a base model under

---
license: cc-by-nc-4.0
---

license: gpl-3.0
"""


def front_matter(tmp_path, card: str | None) -> dict:
    """That of the new card, of a folder trimmed from a model with some card."""
    source = tmp_path / "model"
    source.mkdir()
    if card is not None:
        (source / "README.md").write_text(card, "utf-8")
    manifest = make_folder(
        tmp_path / "folder", [0, 2], 5, graphs={"model": "model.onnx"}, files={"model.onnx": b"graph"}
    ).manifest
    manifest = dataclasses.replace(manifest, exporter={"trimserve": "0"})
    text = render_card(manifest, ModelSource("someone/model", None, source), 0)
    opening, found, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(found)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ('license: "mit"\ntags: [x]', {"license": "mit"}),
        ("license:\n- mit\n- apache-2.0", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: 'gemma: terms'\nlicense_link: https://ai.google.dev/gemma/terms",
            {
                "license": "other",
                "license_name": "gemma: terms",
                "license_link": "https://ai.google.dev/gemma/terms",
            },
        ),
        ("tags: [x]", {}),
        ("# license: mit", {}),
    ],
)
def test_the_licence_is_that_of_the_front_matter(tmp_path, front, licence):
    found = front_matter(tmp_path, f"---\n{front}\n---\n{BODY}")
    assert {key: value for key, value in found.items() if key.startswith("license")} == licence
    assert found["base_model"] == "someone/model"
    assert found["tags"] == ["onnx", "vocabulary-trimming"]


BROKEN = ["---\n- a list\n---\n", "---\na: [b\n---\n"]


@pytest.mark.parametrize("card", [None, BODY, f"\n# Title\n{BODY}", *BROKEN])
def test_a_card_without_front_matter_gives_no_licence(tmp_path, card, caplog):
    assert "license" not in front_matter(tmp_path, card)
    assert ("cannot be read" in caplog.text) == (card in BROKEN)
