"""Which modules a file of the project imports, read from its source."""

import ast

from tests.helpers.paths import ROOT


def module_of(path):
    """Returns a file's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path, *, lazy=True):
    """Returns the modules that a file imports when it runs, `from a import b` as a.b and a.

    Args:
        path: the file.
        lazy: count imports inside functions too.
    """
    found = set()

    def walk(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
        for child in children:
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported_files(script, *, without=()):
    """Returns the library's files that a script imports, directly or not, and the script itself.

    With a module come the packages above it, whose `__init__` runs first. Files named in `without`
    are left out, and what only they import.
    """
    seen, todo = set(), [ROOT / script]
    while todo:
        file = todo.pop()
        if file in seen or str(file.relative_to(ROOT)) in without:
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
