"""Real English text that every Python brings along: the language reference's topics and the library's docstrings."""

from __future__ import annotations

import ast
import logging
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lt2titan.data.errors import BadRows, DataError

logger = logging.getLogger("lt2titan")

# Not the library's own documentation, or (lib2to3) files that are not valid Python on purpose.
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "pydoc_data")
)


class PythonDocs:
    """One document per topic of ``pydoc_data.topics`` and per module of the standard library.

    Modules are parsed, not imported. The text depends on the Python version, so two versions are two
    datasets.
    """

    def __init__(self) -> None:
        version = ".".join(map(str, sys.version_info[:3]))
        self.library = Path(sysconfig.get_path("stdlib"))
        self.key = f"python_docs:{version}:{self.library}"
        self.bad_rows = BadRows(0)
        self.description = f"the documentation of Python {version}"

    def documents(self) -> Iterator[str]:
        """The texts in a fixed order.

        Raises:
            DataError: this Python was installed without its library's source.
        """
        yield from _topics()
        n_modules = 0
        for path in sorted(self.library.rglob("*.py")):
            if SKIPPED_FOLDERS.intersection(path.relative_to(self.library).parts):
                continue
            text = _docstrings(path)
            if text:
                n_modules += 1
                yield f"{'.'.join(path.relative_to(self.library).with_suffix('').parts)}\n\n{text}"
        if not n_modules:
            raise DataError(
                f"python_docs: no library source under {self.library}; use another Python or training.dataset = 'files'"
            )


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _docstrings(path: Path) -> str:
    """Every docstring of a module, in the order of the source; "" if it has none or is not valid Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        logger.warning("python_docs: skipped %s, which does not parse: %s", path, error)
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in _walk_statements(tree) if isinstance(node, documented)]
    pieces = []
    for node in nodes:
        docstring = ast.get_docstring(node)
        if docstring:
            title = "" if isinstance(node, ast.Module) else f"{node.name}\n"
            pieces.append(title + docstring)
    return "\n\n".join(pieces)


def _walk_statements(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and every statement in it, depth first; expressions hold no docstrings and are most of the tree."""
    yield node
    for field in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _walk_statements(child)
