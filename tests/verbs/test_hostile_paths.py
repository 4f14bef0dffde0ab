"""Names that rich or a terminal would take for commands, in what verbs print."""

from pathlib import Path

import pytest
from old_files import CHECKPOINTS

from cpq_train.verbs.cli import main

FOLDER, FILE = "[red][link=http:]\x1b[2J\x1b]0;t\x07[", "x]\u202e.ckpt"
SHOWN = "[red][link=http:]\\x1b[2J\\x1b]0;t\\x07[/x]\\u202e.ckpt"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    return tmp_path / FOLDER / FILE


def test_describe(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.write_bytes(Path(CHECKPOINTS["ptq"]).read_bytes())
    main(["describe", str(hostile)])
    printed = capsys.readouterr().out
    assert SHOWN in "".join(line.strip() for line in printed.splitlines())
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)


@pytest.mark.parametrize(
    "options",
    [
        ["describe"],
        ["verify"],
        ["compare", "--output", "out"],
        ["export", "--output", "a.onnx"],
        ["convert", "--target", "openpcdet", "--output", "a.pth", "--input"],
    ],
    ids=lambda options: options[0],
)
def test_errors(
    options: list[str],
    hostile: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *more = options
    with pytest.raises(SystemExit) as exit_:
        main([verb, *more, str(hostile)] if verb == "convert" else [verb, str(hostile), *more])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "[red]" in said
    assert "Traceback" not in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
