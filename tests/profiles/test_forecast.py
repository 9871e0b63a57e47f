import numpy as np
import pytest

from tests.support.profiles import make_profile
from tests.support.realdata import corpus_slices
from trimserve.profiles.forecast import cold_share, corpus_curve
from trimserve.profiles.merging import merge
from trimserve.profiles.profiling import profile
from trimserve.selection.ranking import keeping_order


def test_documents_are_the_unit_where_they_were_counted():
    # Four documents: [0 1], [0 0 1], [0 2 2 2], [0]; id 0 is structural.
    counted = make_profile([5, 2, 3, 0], texts=4, document_counts=np.array([4, 2, 1, 0]))
    curve = corpus_curve(counted)
    assert (curve.unit, curve.sizes) == ("documents", (1, 2, 3))
    assert curve.unseen[-1] == pytest.approx(3 / 10) == counted.document_missing_mass
    # After one other document: id 2 is never in it, id 1 with probability 1/3.
    assert curve.unseen[0] == pytest.approx((2 * 2 / 3 + 3) / 10)
    assert curve.last_doubling > 0


def test_tokens_are_the_unit_otherwise():
    curve = corpus_curve(make_profile([4, 1, 2, 1]))
    assert curve.unit == "tokens"
    assert curve.sizes[-1] == 7
    assert curve.unseen[-1] == pytest.approx(2 / 8)


def test_what_one_document_alone_holds_is_expected_to_be_cold():
    counted = make_profile([5, 2, 3, 0], texts=4, document_counts=np.array([4, 2, 1, 0]))
    must_stay = np.array([0], np.int32)
    assert cold_share(counted, [0, 1, 2], must_stay) == pytest.approx(3 / 10)
    assert cold_share(counted, [0, 1], must_stay) == pytest.approx(3 / 10)
    assert cold_share(counted, [0], must_stay) == pytest.approx(5 / 10)
    assert cold_share(counted, [0, 2], np.array([0, 2], np.int32)) == pytest.approx(2 / 10)


@pytest.mark.realdata
def test_forecasts_hold_on_documents_that_were_held_back(data_dir):
    # What a quarter of a real corpus, each held back in turn, shows beside what the others foretell.
    lines = corpus_slices(data_dir, 60_000)["banking77-en"][0].split("\n")
    folder = data_dir / "tokenizers" / "gpt2"
    parts = [profile((), folder, texts=lines[start::4], progress=False) for start in range(4)]
    unseen, cold, foretold, foretold_cold = [], [], [], []
    for held_back in range(4):
        rest = merge([part for number, part in enumerate(parts) if number != held_back])
        kept = keeping_order(rest)[:1_300]
        unseen.append(1 - parts[held_back].coverage(np.flatnonzero((rest.counts > 0) | structural(rest))))
        cold.append(1 - parts[held_back].coverage(kept))
        foretold.append(corpus_curve(rest).unseen[-1])
        foretold_cold.append(cold_share(rest, kept, rest.structural))
    assert np.mean(foretold) == pytest.approx(np.mean(unseen), rel=0.1)
    assert np.mean(foretold_cold) == pytest.approx(np.mean(cold), rel=0.15)


def structural(counted):
    mask = np.zeros(counted.vocab_size, np.bool_)
    mask[counted.structural] = True
    return mask
