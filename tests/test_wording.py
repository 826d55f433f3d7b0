"""Names, counts and lists in messages."""

from __future__ import annotations

import pytest

from monai_deepgmm.wording import counted, listed, spans


@pytest.mark.parametrize(
    ("numbers", "told"),
    [([], ""), ([3], "3"), ([0, 1], "0, 1"), ([0, 1, 2], "0 to 2"), ([1, 4, 5, 6, 7, 9, 10], "1, 4 to 7, 9, 10")],
)
def test_numbers_that_follow_one_another_are_a_span(numbers, told):
    assert spans(numbers) == told


def test_of_many_names_the_first_are_listed_each_on_one_line():
    assert listed(["a\n", "b"]) == "a\\n, b"
    assert listed([*"abcdefgh"]) == "a, b, c, d, e, f and 2 more"
    assert (counted(1, "file"), counted(0, "file")) == ("1 file", "0 files")
