"""Which module may import which."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def imported_names(path):
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_test_module_is_imported():
    """What test modules share is in tests/helpers, or is a fixture of a conftest.py."""
    paths = list(TESTS.rglob("*.py"))
    closed = {path.stem for path in paths if path.name.startswith("test_")} | {"conftest"}
    assert len(closed) > 30
    found = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in paths
        for name in imported_names(path)
        if closed & set(name.split("."))
    ]
    assert found == []
