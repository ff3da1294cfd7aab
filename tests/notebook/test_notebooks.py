"""The notebooks, run from top to bottom: locally, and with a stand-in for Colab's runtime."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec

import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from notebooks import build
from pupilseg.export.onnx import MAX_BYTES
from pupilseg.model_files.checkpoint import read_card
from pupilseg.models import create_model, model_entry
from pupilseg.notebook.colab import REQUIRED, DriveCopy, secret
from pupilseg.predict.predictor import Predictor
from pupilseg.shards import open_shards
from tests.helpers.notebooks import (
    COLAB,
    COMMIT,
    DATASETS,
    TOKEN,
    code_cells,
    execute,
    executed,
    pictures,
    read,
    results_of,
    run_in_colab,
    text,
)
from tests.helpers.paths import ROOT

MODELS = ("efficientvit", "ellipse")
OUTPUTS = {"efficientvit": "(2, 2, 400, 640)", "ellipse": "(2, 4)"}


@pytest.mark.parametrize("model", MODELS)
class TestSource:
    def test_outputs_are_not_stored(self, model):
        notebook = read(model)
        nbformat.validate(notebook)
        assert len(notebook.cells) <= 14
        for cell in code_cells(notebook).values():
            assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {})
        assert notebook.metadata.accelerator == "GPU"  # of the runtime that Colab starts

    @pytest.mark.parametrize("folder", build.FOLDERS)
    def test_files_are_what_the_template_gives(self, model, folder):
        """After a change of the template, run: python notebooks/build.py"""
        path = ROOT / folder / f"train_{model}.ipynb"
        assert not path.is_symlink()  # Colab opens files by path
        assert path.read_text(encoding="utf-8") == build.build(model)

    def test_repository_and_data_set(self, model):
        repository = "https://github.com/pupilseg/pupilseg"
        cells = read(model).cells
        opened = f"{repository.replace('github.com', 'colab.research.google.com/github')}/blob/main"
        assert f"({opened}/training/train_{model}.ipynb)" in cells[0].source
        settings = code_cells(read(model))["Settings"].source
        assert f'REPOSITORY = "git+{repository}"' in settings
        assert f'DATASET = "{DATASETS[model]}"' in settings

    def test_it_defines_nothing(self, model):
        forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For)
        for cell in code_cells(read(model)).values():
            for node in ast.walk(ast.parse(cell.source)):
                assert not isinstance(node, (*forbidden, ast.While)), ast.unparse(node)
                modules = [alias.name for alias in getattr(node, "names", [])]
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module]
                for top in (name.split(".")[0] for name in modules):
                    assert top in {"pupilseg", "torch", *sys.stdlib_module_names}


def test_differences_between_the_notebooks():
    cells = [{t: c.source for t, c in code_cells(read(model)).items()} for model in MODELS]
    assert list(cells[0]) == list(cells[1])
    differ = {title for title in cells[0] if cells[0][title] != cells[1][title]}
    assert differ == {"Settings", "Download and show"}
    settings = [c["Settings"] for c in cells]
    for model in MODELS:
        settings = [text.replace(model, "M").replace(DATASETS[model], "D") for text in settings]
    assert settings[0] == settings[1]


@pytest.fixture(scope="module", params=MODELS)
def smoke(request, tmp_path_factory):
    """Model, results folder and cells by title of a notebook that was run on rendered eyes."""
    folder = tmp_path_factory.mktemp("laptop")
    notebook = execute(read(request.param), folder, PUPILSEG_SMOKE="1")
    return request.param, folder / "pupilseg_run" / f"{request.param}-1", code_cells(notebook)


@pytest.mark.integration
class TestSmoke:
    def test_setup_describes_packages_and_machine(self, smoke):
        _, _, cells = smoke
        packages = "all packages are installed\n"
        if find_spec("torchvision") is None:
            packages = (
                "installing torchvision\n"
                f"torchvision is not available for torch {torch.__version__}: continuing without "
                "it, pupilseg does not need it\n"
            )
        assert text(cells["Packages"]) == packages
        assert f"torch {torch.__version__}" in text(cells["GPU"])

    def test_data_are_counted_and_shown(self, smoke):
        model, results, cells = smoke
        data = cells["Download and show"]
        with open_shards(results.parent / "data" / "synthetic:24@1" / "shards" / "train") as shards:
            vectors = np.array(shards["ellipse"])
        assert "source: synthetic:24@1; preprocessing: none" in text(data)
        pupils = np.count_nonzero(vectors[:, 2])
        assert f"\ntrain: 19 frames, {pupils} with a pupil, " in text(data)
        assert re.search(r"^validation: 5 frames, \d with", text(data), re.MULTILINE)
        (frames,) = pictures(data)
        green = (frames[..., 1] > 150) & (frames[..., 2] < 120)
        assert 200 < green.sum() < 20_000  # outlines
        if model == "ellipse":
            found = re.search(r"^synthetic-1-000000((?: +\d\.\d{4}){4})", text(data), re.MULTILINE)
            assert [float(v) for v in found[1].split()] == pytest.approx(vectors[0], abs=1e-4)

    def test_the_network_is_described(self, smoke):
        model, _, cells = smoke
        count = sum(p.numel() for p in create_model(model).parameters())
        summary = text(cells["Parameters and output shape"])
        assert f" {count:,}  {type(create_model(model)).__name__}\n" in summary
        assert f"input (2, 1, 400, 640) -> output {OUTPUTS[model]}\n" in summary

    def test_training_shows_progress(self, smoke):
        model, results, cells = smoke
        cell = cells["Train"]
        printed = "".join(out.text for out in cell.outputs if out.output_type == "stream")
        assert re.search(r"\repoch 1 train: +\d+%", printed)
        lines = re.findall(r"^epoch +(\d)/6 .* mIoU (\S+)", text(cell), re.MULTILINE)
        assert [epoch for epoch, _ in lines] == list("123456")
        (curves,) = pictures(cell)  # one that was updated, not six
        assert len(np.unique(curves)) > 50
        best = max(float(iou) for _, iou in lines)
        assert f"mIoU {best:.4f}, {results / model_entry(model).best_file}\n" in text(cell)

    def test_scores_equal_those_of_the_evaluation(self, smoke):
        model, results, cells = smoke
        cell = cells["Curves, predictions, scores"]
        metrics = json.loads((results / "evaluation" / "metrics.json").read_text())
        numbers = dict(re.findall(r"^(mIoU|IoU of \w+) +(\S+)$", text(cell), re.MULTILINE))
        keys = {"mIoU": "miou", "IoU of background": "background_iou", "IoU of pupil": "pupil_iou"}
        assert numbers == {title: f"{metrics[key]:.4f}" for title, key in keys.items()}
        for what in ("center", "radius"):
            mean = metrics[f"{what}_error_px_mean"]
            assert re.search(rf"^{what} error +{mean:.2f} px mean", text(cell), re.MULTILINE)
        with (results / model_entry(model).history_file).open() as file:
            columns = next(csv.reader(file))
        terms = [name for name in columns if name.startswith("train_") and name.endswith("loss")]
        wanted = {
            "efficientvit": {
                "train_loss",
                "train_ce_loss",
                "train_dice_loss",
                "train_surface_loss",
            },
            "ellipse": {"train_loss", "train_center_loss", "train_radius_loss"},
        }
        assert wanted[model] <= set(terms)
        curves, frames = pictures(cell)
        assert curves.shape[1] == pytest.approx(462 * len(terms), abs=2)  # 4.2 in per term, 110 dpi
        red = (frames[..., 2] > 150) & (frames[..., 1] < 120)
        half = frames.shape[1] // 2
        assert (red[:, :half].sum(), red[:, half:].any()) == (0, True)

    def test_segmentation_has_learned(self, smoke):
        model, results, _ = smoke
        if model == "efficientvit":  # measured: 0.69 to 0.79 with three seeds
            assert read_card(results / model_entry(model).best_file).metrics["valid_iou"] > 0.6

    def test_the_onnx_file_works_and_is_small(self, smoke):
        model, results, cells = smoke
        best = results / model_entry(model).best_file
        onnx = best.with_suffix(".onnx")
        assert onnx.name == f"best_{model}_model.onnx"
        assert onnx.stat().st_size < MAX_BYTES
        printed = text(cells["Export to ONNX"])
        for file in (best, onnx):
            assert f"{file.name}: {file.stat().st_size:,} bytes" in printed
        parity = re.search(r"difference from torch: (\S+) of", printed).group(1)
        assert float(parity) < 1e-4
        assert Predictor(onnx)(np.full((400, 640), 128, np.uint8)).mask.shape == (400, 640)

    def test_links_point_to_the_files(self, smoke):
        model, results, cells = smoke
        html = "".join(out.data["text/html"] for out in cells["Download"].outputs)
        for suffix in ("pt", "onnx"):
            file = results / f"best_{model}_model.{suffix}"
            assert f"href='{file.relative_to(results.parents[1])}'" in html


@pytest.mark.integration
@pytest.mark.parametrize("model", MODELS)
def test_in_colab(model, in_colab):
    """Secrets, Hub, Drive and downloads."""
    folder = in_colab(model)
    cells = code_cells(executed(folder))
    repository = DATASETS[model]
    data = text(cells["Download and show"])
    assert f"source: {repository}@{COMMIT}; " in data
    assert re.search(r"^train: 2 frames, 2 .*\nvalidation: 1 frames, 1 ", data, re.MULTILINE)
    results = results_of(folder, model)
    sent = {f"best_{model}_model.pt", f"best_{model}_model.onnx"}
    assert {file.name for file in (folder / "downloads").iterdir()} == sent
    kept = folder / "drive" / "pupilseg" / f"{model}-1"
    assert f"results are copied to {folder / 'content' / 'drive'}" in text(cells["Train"])
    for name in (*sent, model_entry(model).state_file, model_entry(model).history_file):
        assert (kept / name).read_bytes() == (results / name).read_bytes()
    for name in sent:
        assert (folder / "downloads" / name).read_bytes() == (results / name).read_bytes()


@pytest.mark.integration
def test_a_new_runtime_resumes_from_drive(in_colab, tmp_path):
    first = in_colab("efficientvit")
    shutil.copytree(first / "drive", tmp_path / "drive")
    titles = ("Settings", "Packages", "GPU", "Download and show", "Train")
    run_in_colab("efficientvit", tmp_path, *titles)
    train = text(executed(tmp_path).cells[-1])
    assert re.search(r"^restored \d+ files of an earlier runtime from Drive$", train, re.MULTILINE)
    assert not re.search(r"^epoch +\d", train, re.MULTILINE)  # all six epochs were done before
    before = text(code_cells(executed(first))["Train"])
    assert re.search(r"^best: epoch .*, mIoU \S+", before, re.MULTILINE).group() in train


@pytest.mark.integration
def test_without_a_gpu_it_stops_with_instructions(tmp_path):
    notebook = read("efficientvit")
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path, "Settings", "Packages", "GPU", "Train", CUDA_VISIBLE_DEVICES="")
    gpu, train = notebook.cells[2:]
    (error,) = [out for out in gpu.outputs if out.output_type == "error"]
    assert len(error.traceback) == 1  # one line, no traceback
    assert error.traceback[0].startswith("error: this runtime has no GPU")
    assert "Runtime > Change runtime type > T4 GPU" in error.traceback[0]
    assert train.outputs == []


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Makes this process a Colab runtime with an empty Drive."""
    monkeypatch.syspath_prepend(str(COLAB))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    monkeypatch.setenv("COLAB_DRIVE", str(tmp_path / "my"))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


def test_a_missing_or_unshared_secret_is_reported(colab, monkeypatch, capsys):
    for value in (None, "no access"):
        if value is not None:
            monkeypatch.setenv("COLAB_SECRET_HF_TOKEN", value)
        assert secret("HF_TOKEN") is None
        assert "Add new secret > HF_TOKEN" in capsys.readouterr().out
    monkeypatch.setenv("COLAB_SECRET_HF_TOKEN", TOKEN)
    assert secret("HF_TOKEN") == TOKEN
    assert capsys.readouterr().out == ""


def test_drive_receives_changes_and_restores_missing_files(colab, capsys):
    folder = colab / "results"
    (folder / "evaluation").mkdir(parents=True)
    names = ("state.pt", "evaluation/metrics.json")
    for name in names:
        (folder / name).write_text("old")
    (folder / ".hidden.part").write_text("half")
    copy = DriveCopy(folder, enabled=True)
    copy.update()
    on_drive = colab / "my" / "pupilseg" / "results"
    assert sorted(p.name for p in on_drive.rglob("*") if p.is_file()) == [
        "metrics.json",
        "state.pt",
    ]
    untouched = (on_drive / names[1]).stat().st_mtime_ns
    (folder / names[0]).write_text("new")
    os.utime(folder / names[0], ns=(1, 1))
    copy.update()
    assert (on_drive / names[0]).read_text() == "new"
    assert (on_drive / names[1]).stat().st_mtime_ns == untouched
    capsys.readouterr()

    (folder / names[1]).unlink()
    (folder / names[0]).write_text("newer than on Drive")
    DriveCopy(folder, enabled=True)
    assert "restored 1 files" in capsys.readouterr().out
    assert [(folder / name).read_text() for name in names] == ["newer than on Drive", "old"]

    shutil.rmtree(colab / "my")  # Drive is gone
    copy.update()
    assert capsys.readouterr().out.startswith("could not copy to Drive (")


def wheel(folder, name, version, requires=""):
    """Writes a wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in members.items():
            archive.writestr(path, content)


@pytest.fixture
def in_new_environment(tmp_path):
    """Runs programs that see this environment's packages, while pip installs elsewhere."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "these.pth").write_text(sysconfig.get_path("purelib"))
    wheel(tmp_path, "pupilseg_probe", "1.0", "Requires-Dist: numpy\n")
    wheel(tmp_path, "pupilseg_mover", "1.0", "Requires-Dist: numpy>=99\n")
    wheel(tmp_path, "numpy", "99.0")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}

    def run(program, path=str(ROOT)):
        return subprocess.run(
            [tmp_path / "venv" / "bin" / "python", "-c", program],
            env={**os.environ, **pip, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.integration
def test_missing_packages_are_installed(in_new_environment):
    done = in_new_environment(
        "from pupilseg.notebook.colab import install_missing as install\n"
        "names = {'numpy': 'numpy', 'pupilseg_probe': 'pupilseg-probe'}\n"
        "print(install(names, {})); import pupilseg_probe; print(install(names, {}))"
    )
    assert done.stdout.splitlines() == [
        "installing pupilseg-probe",
        "['pupilseg-probe']",
        "all packages are installed",
        "[]",
    ], done.stderr


@pytest.mark.integration
def test_an_optional_package_that_does_not_exist_is_reported(in_new_environment):
    done = in_new_environment(
        "from pupilseg.notebook.colab import install_missing\n"
        "print(install_missing({}, {'pupilseg_gone': 'pupilseg-gone'}))"
    )
    message = f"pupilseg-gone is not available for torch {torch.__version__}: continuing without"
    assert message in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


@pytest.mark.integration
def test_a_repository_that_is_not_public_is_reported(in_new_environment):
    cells = code_cells(read("ellipse"))
    settings = cells["Settings"].source.replace("git+https://", "pupilseg @ file:///gone/")
    done = in_new_environment(settings + "\n" + cells["Packages"].source, path="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pip cannot install pupilseg @ file:///gone/")
    assert "set REPOSITORY above to its path" in done.stderr
    assert "Traceback" not in done.stderr.splitlines()[-2]


@pytest.mark.integration
def test_numpy_is_never_changed(in_new_environment):
    """Not even for a package that requires another version, which pip finds."""
    done = in_new_environment(
        "from pupilseg.notebook.colab import install_missing\n"
        "from pupilseg.errors import UsageError\n"
        "try: install_missing({'pupilseg_mover': 'pupilseg-mover'}, {})\n"
        "except UsageError as error: print(error)\n"
        "import numpy; print(numpy.__version__)"
    )
    assert "pip cannot install pupilseg-mover beside the installed packages" in done.stdout, (
        done.stderr
    )
    assert "numpy>=99" in done.stdout
    assert done.stdout.splitlines()[-1] == np.__version__


def test_the_packages_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    specified = {"pillow", "scikit-learn"}  # for readers who extend the notebook
    for package in set(REQUIRED.values()) - specified:
        assert re.search(rf'"{package}>=', project), package
    (own,) = re.findall(r"^dependencies = (.*)$", project, re.MULTILINE)
    assert set(re.findall(r'"([\w-]+)>=', own)) <= set(REQUIRED.values())
