"""Fails where a function of dyvte_engine/ has more than 60 lines, its docstring not counted.

python tools/function_length.py [FILE ...]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60


def too_long(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, name and length of each function above the limit."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            length = node.end_lineno - first.lineno + 1 + (node.body[0].lineno - node.lineno)
            if length > LIMIT:
                yield node.lineno, node.name, length


def main() -> int:
    files = [Path(argument) for argument in sys.argv[1:]] or sorted((ROOT / "dyvte_engine").rglob("*.py"))
    found = [(path, *at) for path in files for at in too_long(path.read_text())]
    for path, line, name, length in found:
        print(f"{path}:{line}: {name} has {length} lines; accepted: {LIMIT}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
