"""Names of strangers stay text in every medium."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpq_train.common.text import from_cell, in_cell, in_markdown, in_markdown_code, in_markup, visible

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scene-0001 é 車", "scene-0001 é 車"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]8;;http://x\x07link", "\\x1b]8;;http://x\\x07link"),
        ("a\u202eb", "a\\u202eb"),
        ("not UTF-8: \udcff", "not UTF-8: \\udcff"),
        ("two\nlines", "two\\nlines"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_line_ends_may_be_kept() -> None:
    assert visible("a\nb\r", "\n") == "a\nb\\r"


@given(ANY_TEXT)
def test_markup_has_neither_tags_nor_forbidden_characters(text: str) -> None:
    escaped = in_markup(text)
    assert not set('<>"') & set(escaped)
    assert escaped.isprintable()
    escaped.encode()


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "a|b",
        "`x`",
        "*x*",
        "_x_",
        "![x](javascript:1)",
        "[x]: y",
        "$x$",
        "# x",
    ],
)
def test_markdown_is_escaped(text: str) -> None:
    escaped = in_markdown(text)
    assert escaped != text
    assert not any(mark in escaped for mark in ("<", "|", "`", "*", "](", "]:", "$", "_"))


@pytest.mark.parametrize("text", ["float_tuned (qat_int8)", "0.44 [0.42, 0.46], 95 %", "-0.0459", "a.b-c"])
def test_ordinary_names_and_numbers_stay_legible_in_markdown(text: str) -> None:
    assert in_markdown(text) == text


def test_code_in_markdown() -> None:
    assert in_markdown_code("conv._input_quantizer") == "`conv._input_quantizer`"
    assert "<" not in in_markdown_code("<b>")
    assert "|" not in in_markdown_code("a|b")


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\uff1d1"])
def test_a_spreadsheet_computes_no_name(text: str) -> None:
    assert in_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1.5, -2, "-1.5", "+3e-05", "-inf", "", "name", None])
def test_numbers_and_ordinary_names_stay(value: object) -> None:
    assert in_cell(value) == value


@given(ANY_TEXT)
def test_a_name_comes_back_from_its_cell(text: str) -> None:
    assert from_cell(in_cell(text)) == text


@given(st.from_regex(r"'{0,2}[=+\-@]?[a-z0-9.']*", fullmatch=True))
def test_a_name_with_apostrophes_comes_back_from_its_cell(text: str) -> None:
    written = io.StringIO(newline="")
    csv.writer(written).writerow([in_cell(text), "end"])
    assert from_cell(next(csv.reader(io.StringIO(written.getvalue())))[0]) == text
