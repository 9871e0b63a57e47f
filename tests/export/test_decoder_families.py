"""Decoders that people deploy, tiny: a trimmed folder gives what transformers gives in torch.

Greedy ids one by one and as a batch of unequal prompts, and scores; one prompt is beyond every window and
original length of the configs. What needs transformers 5 runs in its environment.
"""

import pytest

pytest.importorskip("torch")

from tests.support.decoders import DECODERS, MULTIMODAL, compare, make_pair, save_decoder, save_multimodal
from tests.support.models import needs_transformers_5
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, needs_transformers_5]
# Each has something that no other test has: a state a layer; a language model inside another one.
_QUICK = {"lfm2"}
_QUICK_INSIDE = {"mistral3"}
# Its vision tower needs timm, which nothing else here does.
_NEEDS_TIMM = {"gemma3n"}


def all_but(names, quick):
    """Exporting takes seconds: what is much like another case is left to `make test-families`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.families]) for name in names]


@pytest.mark.parametrize("name", all_but(DECODERS, _QUICK))
def test_a_decoder_is_transformers_model(tmp_path, name):
    pair = make_pair(save_decoder(name, tmp_path / "model"), tmp_path / "out")
    compare(pair)
    result = verify(pair.folder, pair.source, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.parametrize("name", all_but(MULTIMODAL, _QUICK_INSIDE))
def test_the_language_model_of_a_multimodal_checkpoint(tmp_path, name):
    if name in _NEEDS_TIMM:
        pytest.importorskip("timm")
    pair = make_pair(save_multimodal(name, tmp_path / "model"), tmp_path / "out")
    compare(pair)
    result = verify(pair.folder, pair.source, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]
