"""The order of the house: imports go one way, as README's table has the modules, in no circle, and files stay readable."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smollm2"


def module_name(path: Path) -> str:
    """`smollm2/notebook/panel.py` -> `notebook.panel`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def imports(name: str) -> set[str]:
    """The project's modules that a module imports anywhere, also inside functions."""
    found = set()
    here = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + ([node.module] if node.module else [])
            found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    return found & set(MODULES)


def rows_of_the_table() -> list[list[str]]:
    """The modules of each row of README's table, from the top; `notebook/` stands for all in it."""
    lines = (ROOT / "README.md").read_text().split("| module | what is in it |")[1].splitlines()
    rows = [re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1]) for line in lines if line.startswith("| `")]
    return [[m for name in row for m in MODULES if m == name or m.startswith(name + ".")] for row in rows]


def test_there_is_no_import_circle():
    graph = {name: imports(name) for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_module_imports_one_that_stands_above_it_in_the_readme():
    rows = rows_of_the_table()
    place = {module: row for row, modules in enumerate(rows) for module in modules}
    assert set(place) == set(MODULES), "README's table names every module once"
    wrong = [(m, other) for m in MODULES for other in imports(m) if place[other] < place[m]]
    assert not wrong


def test_the_loop_is_read_in_one_sitting_and_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert lengths["training"] <= 300
    assert max(lengths.values()) <= 500


def test_no_line_is_wider_than_the_page():
    lines = [(name, line) for name, path in MODULES.items() for line in path.read_text().splitlines()]
    assert not [(name, line) for name, line in lines if len(line) > 110]
