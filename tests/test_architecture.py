"""Public names, the cost of imports, and rules that import-linter cannot express.

The layers, and the rules about which module may import which package, are contracts in
pyproject.toml.
"""

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.helpers.import_graph import imports, module_of
from tests.helpers.paths import ROOT

OPTIONAL = (
    "mlflow", "modal", "datasets", "huggingface_hub", "onnx", "onnxscript", "onnxruntime",
    "matplotlib", "dvc", "yaml", "IPython", "google", "safetensors", "jinja2",
)  # fmt: skip
HEAVY = ("torch", "cv2", "pyarrow", "scipy", *OPTIONAL)
PUBLIC = {
    "pupilseg": ("__version__", "create_model", "load_model", "list_models"),
    "pupilseg.models": ("TinyEfficientViTSeg", "TinyEfficientViTMicro", "EllipseRegressionNet"),
    "pupilseg.shards": ("open_shards",),
    "pupilseg.loader": ("make_loader", "Batch"),
    "pupilseg.train": ("train",),
    "pupilseg.predict": ("Predictor",),
    "pupilseg.maps": ("spatial_weights", "distance_maps"),
}
"""Names that users rely on; renaming one is a breaking change."""
TARGETS = ("demo", "test", "test-all", "test-gpu", "bench", "docs")


def files_of(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PACKAGES = [module_of(path) for path in files_of("pupilseg") if path.name == "__init__.py"]


def run(program):
    """Runs a program in a fresh interpreter and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement):
    """Returns the heavy packages that a statement loads."""
    program = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    return set(run(program).split())


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    home = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(home, name)] == []
    assert set(PUBLIC[module]) <= set(getattr(home, "__all__", PUBLIC[module]))


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_complete(package):
    """`__all__` lists what the package defines; ruff reports imports that it does not list."""
    module = importlib.import_module(package)
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed), "a name is listed twice"
    assert [name for name in listed if not hasattr(module, name)] == []
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    }
    assert defined - set(listed) == set(), "public, but not in __all__"


def test_names_imported_from_a_package_are_in_its_all():
    """Names that are not in `__all__` are imported from the module that defines them."""
    wrong = set()
    for path in files_of("pupilseg", "pipeline", "training", "benchmarks", "tests"):
        for name in imports(path):
            package, _, last = name.rpartition(".")
            if package not in PACKAGES or last == "*":
                continue
            base = ROOT.joinpath(*name.split("."))
            if base.is_dir() or base.with_suffix(".py").exists():
                continue
            if last not in getattr(importlib.import_module(package), "__all__", ()):
                wrong.add(f"{module_of(path)}: {name}")
    assert wrong == set()


def test_the_architecture_page_shows_the_layers():
    """Diagram and contracts match, and every package and file named on the page exists."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert re.search(r"```text\n(.*?)```", page, flags=re.DOTALL)[1].splitlines() == layers
    described = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(described) == sorted(re.findall(r"\w+", " ".join(layers)))
    for name in re.findall(r"`([\w/]+\.(?:py|toml|yaml))`", page):
        if "NAME" not in name:
            assert (ROOT / name).exists() or (ROOT / "pupilseg" / name).exists(), name
    tables = re.findall(r"`([A-Z_]+)` in `(pupilseg/[\w/]+\.py)`", page)
    assert len(tables) == 6
    for table, name in tables:
        assert re.search(rf"^{table}\b", (ROOT / name).read_text(), flags=re.MULTILINE), table


def test_the_package_alone_imports_nothing_heavy():
    assert loaded_by("import pupilseg; pupilseg.__version__; dir(pupilseg)") == set()


def test_public_names_are_imported_on_first_use():
    assert "torch" in loaded_by("from pupilseg import create_model, load_model, list_models")
    assert run("from pupilseg import *; print(create_model, load_model, list_models, __version__)")


def test_prediction_needs_no_torch():
    loaded = loaded_by("import pupilseg.predict; pupilseg.predict.Predictor")
    assert not {"torch", "mlflow", "matplotlib", "onnx", "pyarrow"} & loaded


def test_the_command_line_starts_without_torch():
    loaded = loaded_by("import pupilseg.cli.main")
    assert not {"torch", "mlflow", "matplotlib", "onnx", "pyarrow"} & loaded


def test_training_loads_no_optional_package():
    loaded = loaded_by("from pupilseg.train import train; from pupilseg.loader import make_loader")
    assert "torch" in loaded
    assert not set(OPTIONAL) & loaded


def test_data_preparation_needs_no_torch():
    names = "pupilseg.sources, pupilseg.shards, pupilseg.synthetic, pupilseg.prepare"
    assert not {"torch", *OPTIONAL} & loaded_by(f"import {names}")


def test_the_modal_client_needs_only_modal():
    assert not set(HEAVY) - {"modal"} & loaded_by("import pupilseg.cloud.client")


def test_every_module_can_be_imported_first():
    """Imports each module into an empty `sys.modules`, which reveals import cycles."""
    modules = [module_of(path) for path in files_of("pupilseg")]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    for old in [m for m in sys.modules if m.split('.')[0] == 'pupilseg']:\n"
        "        del sys.modules[old]\n"
        "    importlib.import_module(name)\n"
    )
    run(program)


def test_only_the_command_line_and_tracking_read_the_environment():
    """The command line reads `sys.argv`; MLflow is configured by environment variables."""
    allowed = ("pupilseg.cli.", "pupilseg.tracking.")
    for path in files_of("pupilseg"):
        if module_of(path).startswith(allowed):
            continue
        used = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        assert not used & {"sys.argv", "os.environ", "os.getenv", "os.putenv"}, path


def test_no_class_or_function_is_written_twice():
    """No two classes or functions of the project have the same body."""
    homes = {}
    for path in files_of("pupilseg", "pipeline", "training", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            text = "\n".join(ast.unparse(line) for line in body)
            if len(text) > 120:
                homes.setdefault(text, set()).add(f"{module_of(path)}.{node.name}")
    twice = [sorted(names) for names in homes.values() if len(names) > 1]
    assert twice == []
