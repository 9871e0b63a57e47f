"""Spaces before punctuation leave a text whole or in pieces, as transformers takes them out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimserve.text.cleanup import CleanStream, clean_up

_LETTERS = st.sampled_from(" .'?!,ntmsverx '")


@given(st.lists(st.text(_LETTERS, max_size=4)))
def test_pieces_add_up_to_the_cleaned_text(pieces):
    stream = CleanStream()
    found = "".join([*map(stream.push, pieces), stream.flush()])
    assert found == clean_up("".join(pieces))


def test_text_that_nothing_can_change_is_not_held_back():
    stream = CleanStream()
    assert stream.push("日本語") == "日本語"
    assert stream.push(" word ,") == " word"
    assert stream.push(" next") == ", next"
    assert stream.push("s") == "s"
    assert stream.flush() == ""


@pytest.mark.export
@given(text=st.text(_LETTERS))
def test_cleaned_as_transformers_does_it(text):
    base = pytest.importorskip("transformers").PreTrainedTokenizerBase
    is_static = isinstance(base.__dict__["clean_up_tokenization"], staticmethod)
    expected = base.clean_up_tokenization(text) if is_static else base.clean_up_tokenization(None, text)
    assert clean_up(text) == expected
