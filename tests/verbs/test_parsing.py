"""What a person is told of an option or a configuration file that is no good."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from command_line import fails
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback

from cpq_train.common.detection_task import DetectionClass
from cpq_train.common.errors import OptionError, UserError
from cpq_train.verbs.parsing import VerbParser


@dataclass
class Sizes:
    """A section of options.

    Args:
        width: a number.
        names: texts.
    """

    width: int = 3
    names: tuple[str, ...] = ("a",)


@pytest.fixture
def parser() -> VerbParser:
    parser = VerbParser(prog="cpq_train test")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Sizes, "sizes")
    parser.add_argument("--arm", type=Literal["float", "ptq"] | None, default="ptq")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    parser.add_argument("--cloud", type=Path, nargs="+", default=None)
    parser.add_argument("--of.classes", type=dict[str, DetectionClass] | None, default=None)
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes.width", "x"], "sizes.width: got 'x', accepted: int"),
        (["--sizes.names", "3"], "sizes.names: got '3', accepted: list"),
        (["--arm", "qat"], "arm: got 'qat', accepted: float, ptq, null"),
        (["--share", "null"], "share: got None, accepted: float"),
        (["--sizes.widht", "3"], "unrecognized arguments: --sizes.widht 3; is it --sizes.width?"),
        (["--surprise"], "unrecognized arguments: --surprise"),
        (["--config", "none.yaml"], "config: File does not exist: '"),
        (["--sizes", "none.yaml"], "sizes: Unable to load config 'none.yaml'"),
        (["--callbacks", "foo"], "callbacks: got 'foo', accepted: list[Callback], Callback, null"),
        (
            ["--callbacks", '{"class_path": "EarlyStopping", "init_args": {"monitor": "x", "patients": 3}}'],
            "callbacks: 'lightning.pytorch.callbacks.EarlyStopping': Option 'patients' is not accepted",
        ),
        (["--callbacks", "cpq_train.callbacks.Nope"], "callbacks: 'cpq_train.callbacks.Nope': module 'cpq"),
    ],
)
def test_options(arguments: list[str], message: str, parser: VerbParser) -> None:
    with pytest.raises(OptionError) as error:
        parser.parse_args(arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


_OF_A_CLASS = "'cpq_train.common.detection_task.DetectionClass'"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "",
            "{a: {categories: [b]}, c: {categories: [d], range_m: x}}",
            ", c, range_m: got 'x', accepted: a ",
        ),
        ("", "{a: {categories: tram}}", ", a, categories: got 'tram', accepted: a list"),
        ("", "{a: {range_m: 3}}", ", a: needs 'categories', and has range_m"),
        ("", "{a: {rnage_m: 3}}", ", a: unknown key 'rnage_m'; accepted: categories, range_m"),
        ("", "{a: 3}", ": got \"{'a': 3}\", accepted: dict[str, DetectionClass], null"),
        (".a", "{categories: tram}", f": {_OF_A_CLASS}: categories: got 'tram', accepted: list"),
    ],
)
def test_classes(option: str, value: str, message: str, parser: VerbParser) -> None:
    with pytest.raises(UserError) as error:
        parser.parse_args([f"--of.classes{option}", value])
    assert str(error.value).startswith(f"of.classes{message}")
    assert "\n" not in str(error.value)


def test_a_class_that_occurs_twice(parser: VerbParser) -> None:
    with pytest.raises(UserError, match=r"^option of.classes is no YAML: line 1: key 'a' occurs twice"):
        parser.parse_args(["--of.classes", "{a: {}, a: {}}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sizes: true", "configuration file '{}', sizes: got True, accepted: a mapping of options"),
        ("sizes:", "configuration file '{}', sizes: got None, accepted: a mapping of options"),
        ("sizes: {widht: 3}", "configuration file '{}': unknown option 'sizes.widht'; is it sizes.width?"),
        ("1: 2", "configuration file '{}': unknown option '1'"),
        ("- sizes", "configuration file '{}': got ['sizes'], accepted: a mapping of options"),
        ("", "configuration file '{}': got None, accepted: a mapping of options"),
        ("a: [", "configuration file '{}' is no YAML: line 1: expected the node content"),
        ("share: 1\nshare: 2", "configuration file '{}' is no YAML: line 2: key 'share' occurs twice"),
        ("share: \xff", "configuration file '{}' is not UTF-8 text: invalid start byte at byte 7"),
        ("sizes: {width: null}", "sizes.width: got None, accepted: int"),
        ("share: high", "share: got 'high', accepted: float"),
        (
            "of: {classes: {a: {categories: [b], range_m: x}}}",
            "configuration file '{}', of.classes, a, range_m: got 'x', accepted: a number",
        ),
        (
            "of:\n  classes:\n    a: {categories: tram}",
            "configuration file '{}', of.classes, a, categories: got 'tram', accepted: a list",
        ),
        ("of: {classes: [a]}", "of.classes: got \"['a']\", accepted: dict[str, DetectionClass], null"),
    ],
)
def test_configuration_files(content: str, message: str, parser: VerbParser, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError) as error:
        parser.parse_args(["--config", str(file)])
    assert str(error.value).startswith(message.format(file))
    assert "\n" not in str(error.value)


def test_a_section_in_a_file_that_is_no_text(parser: VerbParser, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff")
    with pytest.raises(OptionError, match="is not UTF-8 text: invalid start byte at byte 0"):
        parser.parse_args(["--sizes", str(tmp_path / "c.yaml")])


def test_what_is_good_is_taken(parser: VerbParser, tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text("width: 4\n")
    (tmp_path / "c.yaml").write_text("sizes: sizes.yaml\narm: null\nshare: 1e-1\ncloud: null\ncallbacks:\n")
    found = parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--sizes.names", "[b]"])
    assert (found.sizes.width, found.sizes.names, found.arm, found.share) == (4, ("b",), None, 0.1)
    assert found.cloud is found.callbacks is None


def test_classes_are_given_whole_or_one_by_one(parser: VerbParser, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("of:\n  classes:\n    a: {categories: [b], range_m: 30}\n")
    for arguments in (
        ["--config", str(tmp_path / "c.yaml")],
        ["--of.classes", "{a: {categories: [b], range_m: 30}}"],
        ["--of.classes.a", "{categories: [b], range_m: 30}"],
    ):
        found = parser.parse_args(arguments).of.classes
        assert list(found) == ["a"]
        assert (found["a"].categories, found["a"].range_m) == (("b",), 30.0)
    assert parser.parse_args(["--of.classes", "null"]).of.classes is None


def test_a_file_may_append_to_a_list(parser: VerbParser, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("callbacks+: [{class_path: lightning.pytorch.callbacks.Timer}]\n")
    found = parser.parse_args(["--config", str(tmp_path / "c.yaml")])
    assert [one.class_path for one in found.callbacks] == ["lightning.pytorch.callbacks.Timer"]


def test_verbs_with_a_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--model.arm", "foo"], "model.arm: got 'foo', accepted: float, float_tuned, ptq, qat, null"),
        (
            ["--trainer.max_epocs", "3"],
            "unrecognized arguments: --trainer.max_epocs 3; is it --trainer.max_ep",
        ),
        (["--model.network", "{a: 1}"], "unknown option 'model.network.a'"),
    ):
        error = fails(["fit", *arguments], capsys)
        assert error.startswith(f"error: {message}")
        assert error.endswith(" python -m cpq_train fit --help lists the options")
    error = fails(["calibrate"], capsys)
    assert error.startswith("error: the following arguments are required: output python")
    (tmp_path / "c.yaml").write_text("data: true")
    assert "data: got True, accepted: a mapping of options" in fails(
        ["fit", "-c", str(tmp_path / "c.yaml")], capsys
    )
