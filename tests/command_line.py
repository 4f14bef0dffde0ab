"""The command line in this process."""

import pytest

from cpq_train.verbs.cli import main


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of a mistake."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error, error
    return " ".join(error.split())
