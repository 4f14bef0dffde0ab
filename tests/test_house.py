"""The package keeps its shape: short modules, short functions, and rooms that say what they are for."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cpq_train"
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 350, 60


def _num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end, docstring included."""
    return (function.end_lineno or 0) - function.lineno + 1


@pytest.mark.parametrize("name", MODULES)
def test_short_modules_of_short_functions(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    functions = (
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {f.name: _num_lines(f) for f in functions if _num_lines(f) > MAX_FUNCTION_LINES} == {}


def test_every_module_is_in_a_room() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__.py")])
def test_a_room_says_what_it_is_for(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
    assert docstring.split("\n")[0].endswith(".")


def test_console_script() -> None:
    named = re.search(r'^cpq_train = "(\S+):(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named is not None
    assert callable(getattr(import_module(named[1]), named[2]))


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"cpq_train/common/console.py"}))
def test_only_the_console_prints_through_rich(name: str) -> None:
    """Elsewhere there are its tables, and its bar: names of strangers are markup in a console of its own."""
    allowed = {"rich.table"} | ({"rich.progress"} if name == "cpq_train/common/progress.py" else set())
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module for module in imported if module.split(".")[0] == "rich"} <= allowed


_DRAWS = "cpq_train/common/picture.py"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {_DRAWS}))
def test_only_one_module_makes_pictures(name: str) -> None:
    """A picture of another's make would take `$` in a name for a formula, and could be left half written."""
    text = MODULES[name].read_text()
    assert "savefig(" not in text
    assert "import FigureCanvasAgg" not in text


_PRINTS = {
    "cpq_train/common/progress.py",  # a line of progress, which is made visible there
    "cpq_train/verbs/cli.py",  # the usage, which holds no name
    "cpq_train/export/deployed_detector.py",  # which is copied, and imports nothing of this package
}


@pytest.mark.parametrize("name", sorted(set(MODULES) - _PRINTS))
def test_nothing_prints_past_the_console(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in [function.id for function in called if isinstance(function, ast.Name)]
