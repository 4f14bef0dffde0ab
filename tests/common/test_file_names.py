import string
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpq_train.common.file_names import file_name

ALLOWED = set(string.ascii_letters + string.digits + "._-")


@pytest.mark.parametrize(
    "name", ["3e8750f331d7499e9b5123e9eb70f2e2", "scene-0103", "0_cloud.v2", "a" * 226, "-", "a..b"]
)
def test_a_harmless_name_stays(name: str) -> None:
    assert file_name(name, ".png") == f"{name}.png"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        ".hidden",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "ä",
        "\ud800",
        "a" * 252,
    ],
)
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_another_becomes_a_file_of_its_folder(name: str, suffix: str) -> None:
    made = file_name(name, suffix)
    assert set(made) <= ALLOWED
    assert not made.startswith(".")
    assert made.endswith(suffix)
    assert 0 < len(made) <= 255
    assert made != name + suffix or len(made) <= 255


@given(st.text(st.characters(codec=None), max_size=300), st.text(st.characters(codec=None), max_size=300))
def test_different_names_are_different_files(one: str, other: str) -> None:
    names = [one, other, file_name(one), file_name(other)]
    for a, b in product(names, names):
        assert (file_name(a) == file_name(b)) == (a == b)
    assert all(set(file_name(name)) <= ALLOWED and len(file_name(name)) <= 255 for name in names)
