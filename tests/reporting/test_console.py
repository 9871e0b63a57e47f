import io
import sys

import pytest

from trimserve.console import human_bytes, percent, progress, table


def test_columns_line_up():
    lines = table(["a", "long header"], [["wide cell", 1], ["b", "1,000"]]).splitlines()
    assert lines == [
        "a          long header",
        "---------  -----------",
        "wide cell            1",
        "b                1,000",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1_000, "1 kB"),
        (1_536, "1.54 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_501, "1 MB"),
        (2_400_000_000, "2.4 GB"),
        (5e15, "5000 TB"),
        (-1_500, "-1.5 kB"),
    ],
)
def test_bytes_have_three_digits(count, text):
    assert human_bytes(count) == text


def test_percent_has_two_decimals():
    assert [percent(share) for share in (0, 0.5, 0.99999, 1)] == ["0.00 %", "50.00 %", "100.00 %", "100.00 %"]


def test_bar_shows_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, show, seen in [
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ]:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress(10, "counting", "B", show=show) as bar:
            bar.update(10)
        assert ("counting" in stream.getvalue()) is seen
