"""Who may import whom, what an import costs, and how long a file may be."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.import_graph import imports, module_of
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "pupilseg"
OPTIONAL = (
    *("mlflow", "modal", "datasets", "huggingface_hub", "onnx", "onnxscript", "onnxruntime"),
    *("matplotlib", "dvc", "yaml", "IPython", "google", "safetensors"),
)
HEAVY = ("torch", "cv2", "pyarrow", "scipy", *OPTIONAL)
LAYERS = {
    0: "errors geometry host_memory pretrained",
    1: "maps files preprocess synthetic device program parallel progress allocator compilation",
    2: "sample sources",
    3: "shards prefetch row_threads",
    4: "prepare feeds feed_stream feed_choice loader distance augment models metrics",
    5: "losses weight_files checkpoint optim",
}
"""Lower modules never import higher ones; a module not named here is above all of these."""
ON_TOP = 6
LINES = {"pupilseg": 350, "pipeline": 80, "training": 120}


def files_of(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def layer_of(module):
    """Returns the layer of "pupilseg.part.more"; the package itself is the lowest."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    for layer, names in LAYERS.items():
        if parts[1] in names.split():
            return layer
    return ON_TOP


def own(names):
    """Returns the project's own modules among imported names, without classes and functions."""
    modules = {module_of(path) for path in files_of("pupilseg")}
    return {name for name in names if name in modules}


def run(program):
    """Runs a program in a fresh interpreter; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement):
    """Returns the heavy packages in memory after a statement."""
    program = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    return run(program).split()


def test_the_package_alone_imports_nothing_heavy():
    assert loaded_by("import pupilseg; pupilseg.__version__; dir(pupilseg)") == []


def test_public_names_are_imported_when_used():
    assert "torch" in loaded_by("from pupilseg import create_model, load_model, list_models")
    assert run("from pupilseg import *; print(create_model, load_model, list_models, __version__)")


@pytest.mark.skipif(
    not (PACKAGE / "predict.py").exists(), reason="no pupilseg/predict/predictor.py"
)
def test_prediction_needs_no_torch():
    loaded = loaded_by("import pupilseg.predict.predictor; pupilseg.predict.predictor.Predictor")
    assert not {"torch", "mlflow", "matplotlib", "onnx", "pyarrow"} & set(loaded)


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="no pupilseg/cli/main.py")
def test_the_command_line_starts_without_torch():
    loaded = loaded_by("import pupilseg.cli.main")
    assert not {"torch", "mlflow", "matplotlib", "onnx"} & set(loaded)


def test_training_loads_no_optional_package():
    assert not set(OPTIONAL) & set(loaded_by("import pupilseg.train.loop, pupilseg.loader.loader"))


def test_data_preparation_needs_no_torch():
    loaded = loaded_by("import pupilseg.sources, pupilseg.shards, pupilseg.synthetic")
    assert not {"torch", *OPTIONAL} & set(loaded)


def test_every_module_imports_by_itself():
    """Alone and first, so that no cycle hides behind another module's import."""
    modules = [module_of(path) for path in files_of("pupilseg")]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    for old in [m for m in sys.modules if m.split('.')[0] == 'pupilseg']:\n"
        "        del sys.modules[old]\n"
        "    importlib.import_module(name)\n"
    )
    run(program)


@pytest.mark.parametrize("path", files_of("pupilseg"), ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    if module == "pupilseg":
        assert own(imports(path, lazy=False)) == set()
        return
    higher = [name for name in own(imports(path)) if layer_of(name) > layer_of(module)]
    assert higher == [], f"{module} imports what is above it"


def test_there_is_no_cycle():
    """Packages count as one module each: inside, they may refer to their own parts."""
    graph = {}
    for path in files_of("pupilseg"):
        part = ".".join(module_of(path).split(".")[:2])
        targets = {".".join(name.split(".")[:2]) for name in own(imports(path))}
        graph.setdefault(part, set()).update(targets - {part, "pupilseg"})
    graph.pop("pupilseg")
    while graph:
        free = [part for part, targets in graph.items() if not targets & graph.keys()]
        assert free, f"cycle among {sorted(graph)}"
        for part in free:
            del graph[part]


def test_the_library_imports_no_script():
    scripts = {"pipeline", "training", "notebooks", "benchmarks", "demo", "tests"}
    for path in files_of("pupilseg"):
        assert not {name.split(".")[0] for name in imports(path)} & scripts, path
    for path in files_of("pipeline"):
        assert not {name.split(".")[0] for name in imports(path)} & (scripts - {"pipeline"}), path


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_in_one_module(package):
    users = [
        module_of(path)
        for folder in ("pupilseg", "pipeline", "training")
        for path in files_of(folder)
        if package in {name.split(".")[0] for name in imports(path)}
    ]
    assert len(users) <= 1, users


def test_models_know_nothing_of_data_or_tracking():
    allowed = {"pupilseg.errors", "pupilseg.geometry"}
    for path in files_of("pupilseg/models"):
        others = {n for n in own(imports(path)) if not n.startswith("pupilseg.models")}
        assert others <= allowed | {"pupilseg"}, path


def test_only_programs_read_the_command_line_and_the_environment():
    """`program` and `cli` are programs; `tracking` is told by MLflow's own variables."""
    free = {"pupilseg.cli.program", "pupilseg.cli.main", "pupilseg.tracking.tracker"}
    for path in files_of("pupilseg"):
        if module_of(path) in free:
            continue
        used = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        assert not used & {"sys.argv", "os.environ", "os.getenv", "os.putenv"}, path


@pytest.mark.parametrize("folder", LINES)
def test_files_stay_short(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files_of(folder)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES[folder]
    }
    assert long == {}


def test_no_class_or_function_is_written_twice():
    """The same body under any name in two files of the project."""
    homes = {}
    for folder in LINES:
        for path in files_of(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = "\n".join(ast.unparse(line) for line in body)
                if len(text) > 120:
                    homes.setdefault(text, set()).add(f"{module_of(path)}.{node.name}")
    twice = [sorted(names) for names in homes.values() if len(names) > 1]
    assert twice == []
