"""Runs inside a container: sets up what it sees, then hands over to modal's container runtime.

Started as a script, by its path, with the path of a plan in JSON. Imports the standard library
only, and nothing of this project.
"""

import ctypes
import importlib
import importlib.machinery
import json
import os
import runpy
import sys
from pathlib import Path

BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
"""Flags of mount(2)."""


def mount(source, target, kind=None, flags=0):
    """Calls mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [text if text is None else os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*words, flags, None):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {target}: {os.strerror(code)}")


def bind(source, target):
    """Shows a file or directory at another path, which is created."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    mount(source, target, None, BIND | RECURSIVE)


def hide(path, kept):
    """Covers a directory with an empty one, except for the `kept` directories below it."""
    os.makedirs(path, exist_ok=True)
    mount("tmpfs", path, "tmpfs")
    for source, target in kept:
        bind(source, target)


def enter_root(root, hidden, kept):
    """Builds a root directory of this machine's, without what is hidden, and returns its name."""
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs")
    for entry in os.scandir("/"):
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), root + entry.path)
        elif entry.is_dir():
            bind(entry.path, root + entry.path)
    for path in ("/root", *hidden):
        below = [name for name in kept if name.startswith(path + "/")]
        hide(root + path, [(name, root + name) for name in below])


def isolate(plan):
    """Gives the container a root directory with its volumes, and /root with its code alone."""
    root = plan["root"]
    enter_root(root, plan["hidden"], plan["kept"])
    for entry in os.scandir(plan["code"]):
        bind(entry.path, os.path.join(root, "root", entry.name))
    for path, directory in plan["volumes"].items():
        bind(directory, root + path)
    os.chroot(root)


def replace_paths(module_name, volumes):
    """Replaces a module's constants that are mount paths by the volumes' directories."""
    module = importlib.import_module(module_name)
    for name, value in list(vars(module).items()):
        if isinstance(value, str) and value in volumes:
            setattr(module, name, volumes[value])


class ImageFinder(importlib.machinery.PathFinder):
    """Does not find the packages that are installed here but not in the image."""

    missing: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Returns None for a missing module."""
        return None if fullname in cls.missing else super().find_spec(fullname, path, target)


def main(plan_file):
    """Runs modal's container runtime as planned."""
    plan = json.loads(Path(plan_file).read_text())
    code = "/root" if plan["isolated"] else plan["code"]
    if plan["isolated"]:
        isolate(plan)
    os.chdir(code)
    os.environ.update(HOME=code, PYTHONPATH=code)
    # Only the container's code and the image's packages: neither this file's folder, nor a project
    # that is installed in editable mode.
    installed = (sys.prefix, sys.base_prefix)
    sys.path[:] = [code, *(path for path in sys.path[1:] if path.startswith(installed))]
    ImageFinder.missing = frozenset(plan["missing"]) - {path.stem for path in Path(code).iterdir()}
    builtin = [f for f in sys.meta_path if f.__module__ == "_frozen_importlib"]
    sys.meta_path[:] = [*builtin, ImageFinder]
    sys.path_importer_cache.clear()
    if not plan["isolated"]:
        replace_paths(plan["module"], plan["volumes"])
    sys.argv = ["modal._container_entrypoint"]
    runpy.run_module("modal._container_entrypoint", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "--try":
        enter_root(sys.argv[2], [], [])
    else:
        main(sys.argv[1])
