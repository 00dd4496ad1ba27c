"""Small files, small functions, no hidden state, and a text that fits any machine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from architecture.source import PACKAGE, ROOT, Module, example, functions, modules

FILE_LINES = 400
FUNCTION_LINES = 60
PACKAGE_LINES = 29_500
"""12,000 held attention and its surroundings; tensor grids brought 2,500, and pipeline, ZeRO, experts, recomputation
and moving checkpoints 5,500 more; the settings of three other systems, option by option, 4,500, and branches, loops and
functions of the scripts that hold them 1,000; the programs of two of them as they stand (`compat`), 2,500."""

SKIPPED = {".git", ".venv", "runs", "build", "dist", "__pycache__"}
MACHINE_PATH = re.compile(rf"(?<![\w.~-])/({'|'.join(['work', 'farm', 'root', 'tmp/v'])})(/|\b)")
PROJECT_PATH = re.compile(r"(?<![\w/.])(?:examples|docs|benchmarks)/[\w./-]*\w")


def long_functions(module: Module) -> Iterator[str]:
    """Functions over the limit; the docstring counts."""
    for function in functions(module):
        size = (function.end_lineno or 0) - function.lineno + 1
        if size > FUNCTION_LINES:
            yield f"{module.name}.{function.name} has {size} lines"


def global_statements(module: Module) -> Iterator[str]:
    """Functions that rebind a module's names."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{module.name}:{node.lineno} global {', '.join(node.names)}"


def project_files() -> Iterator[Path]:
    """Every file of the project, without what commands leave behind."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        made = any(part in SKIPPED or part.endswith(("_cache", ".egg-info")) or part == ".hypothesis" for part in parts)
        if path.is_file() and not made:
            yield path


def test_files_are_short() -> None:
    """Catches a file that has become two."""
    assert [f"{m.name} has {m.lines} lines" for m in modules() if m.lines > FILE_LINES] == []


def test_functions_are_short() -> None:
    """Catches a function that does several things."""
    assert [found for module in modules() for found in long_functions(module)] == []
    long = example("seqloom.plan.x", "def f() -> None:\n" + "    pass\n" * FUNCTION_LINES)
    assert len(list(long_functions(long))) == 1


def test_the_package_is_small() -> None:
    """Catches growth that nobody decided on: the limit rises only with a reason."""
    assert 1_000 < sum(module.lines for module in modules()) < PACKAGE_LINES


def test_no_function_rebinds_module_state() -> None:
    """Catches `global`: two models under two plans must live in one process, but for what `compat` stands in for."""
    assert [found for module in modules() if module.room != "compat" for found in global_statements(module)] == []
    assert len(list(global_statements(example("seqloom.plan.x", "def f():\n    global a\n    a = 1")))) == 1


def test_names_say_what_is_inside() -> None:
    """Catches utils, helpers and managers: names under which anything gathers; those of other systems are theirs."""
    vague = re.compile(r"_?(utils?|helpers?|managers?|misc|common)")
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    paths = [path for path in paths if path.parts[0] != "compat"]
    assert [str(path) for path in paths if any(vague.fullmatch(part) for part in path.with_suffix("").parts)] == []


def test_no_path_of_one_machine() -> None:
    """Catches an absolute path that exists on one machine alone."""
    found = []
    for path in project_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)} holds {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("name", ["work/x", "tmp/v/x", "tmp/v"])
def test_the_path_check_has_teeth(name: str) -> None:
    """Catches a pattern that matches nothing."""
    assert MACHINE_PATH.search(f'open("/{name}")')
    assert not MACHINE_PATH.search(f"build-dir/{name} and /tmp/video")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_pages_name_files_that_exist(name: str) -> None:
    """Catches a page that sends its reader to an example or document that has moved."""
    named = PROJECT_PATH.findall((ROOT / name).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []
