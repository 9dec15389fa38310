"""Text: durations, counts, plurals and one line of an error."""

import pytest

from ft_service.text import counted, error_line, first_line, format_count, format_duration, last_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45, "45s"), (59.6, "1m00s"), (723, "12m03s"), (3 * 3600 + 7 * 60 + 59, "3h07m"), (187_200, "2d04h")],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(980, "980"), (41_200, "41.2k"), (3_120_000, "3.1M"), (1.3e9, "1.3G")])
def test_counts_are_short(value: float, text: str) -> None:
    assert format_count(value) == text


def test_a_count_of_one_is_singular() -> None:
    assert [counted(number, "record") for number in (0, 1, 3229)] == ["0 records", "1 record", "3,229 records"]
    assert counted(2, "entry", "entries") == "2 entries"


def test_one_line_stands_for_a_long_error() -> None:
    error = ValueError("\n  first\n\nmiddle\n last \n")
    assert (first_line(error), last_line(error), error_line(error)) == ("first", "last", "ValueError: first")


def test_an_error_without_text_has_its_type() -> None:
    assert (first_line(MemoryError()), error_line(MemoryError())) == ("MemoryError", "MemoryError")
    assert last_line(MemoryError()) == "no reason given"
