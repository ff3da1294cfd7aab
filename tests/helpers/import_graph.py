"""Finds the imports of the project's files in their source."""

import ast
import re

from tests.helpers.paths import ROOT

REFERENCE = re.compile(r"^(pupilseg(?:\.\w+)+)(?::\w+)?$")
"""A module named in a table such as `MODELS`: "pupilseg.module" or "pupilseg.module:Name"."""


def module_of(path):
    """Returns a file's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path, *, lazy=True):
    """Returns the modules that a file imports at run time; `from a import b` counts as a and a.b.

    Args:
        path: the file.
        lazy: include imports inside functions, and modules that a string names (`REFERENCE`).
    """
    found = set()

    def walk(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy and isinstance(node, ast.Constant):
            found.update(REFERENCE.findall(str(node.value)))
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
        for child in children:
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported_files(script, *, without=()):
    """Returns a script and the library files that it imports, directly or indirectly.

    Importing a module also runs the `__init__` of each package above it, so these are included.

    Args:
        script: path relative to the root.
        without: files, or folders that end in "/", to leave out together with their own imports.
    """
    seen, todo = set(), [ROOT / script]
    while todo:
        file = todo.pop()
        if file in seen or is_under(str(file.relative_to(ROOT)), without):
            continue
        seen.add(file)
        for module in imports(file):
            parts = module.split(".")
            if parts[0] != "pupilseg":
                continue
            for end in range(1, len(parts) + 1):
                base = ROOT.joinpath(*parts[:end])
                todo += [f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()]
    return {str(file.relative_to(ROOT)) for file in seen}


def is_under(file, paths):
    """Returns True if a file is one of `paths` or is inside one that is a folder ("name/")."""
    return any(file == path or (path.endswith("/") and file.startswith(path)) for path in paths)
