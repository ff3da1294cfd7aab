"""The table of networks: names of checkpoints and weights, and imports without torch."""

import subprocess
import sys

import pytest

from pupilseg import models
from pupilseg.models import MODELS, list_models, model_entry
from pupilseg.weights import DEFAULT, NAMES
from tests.helpers.paths import ROOT

SPECIFIED = {
    "efficientvit": (
        "best_efficientvit_model.pt",
        "efficientvit_epoch12_miou0.9877.pt",
        0,
        "TinyEfficientViT",
    ),
    "efficientvit_tiny": (
        "best_efficientvit_tiny_model.pt",
        "efficientvit_tiny_model_epoch_12.pt",
        10,
        "TinyEfficientViT-Micro",
    ),
    "ellipse": ("best_ellipse_model.pt", "ellipse_model_epoch_12.pt", 10, "EllipseRegressionNet"),
}
"""Best checkpoint, numbered checkpoint, epochs between these, and MLflow tag."""


@pytest.mark.parametrize("name", SPECIFIED)
def test_names_that_the_specification_fixes(name):
    entry = model_entry(name)
    best, numbered, every, model_type = SPECIFIED[name]
    assert entry.best_file == best
    assert entry.epoch_file(12, 0.98765) == numbered
    assert entry.checkpoint_every == every
    assert entry.model_type == model_type


def test_no_two_networks_share_a_file_name():
    names = [
        name
        for entry in MODELS.values()
        for name in (
            entry.best_file,
            entry.state_file,
            entry.history_file,
            entry.epoch_file(1, 0.5),
            entry.nickname or entry.name,
        )
    ]
    assert len(set(names)) == 5 * len(MODELS)
    assert model_entry("ellipse").state_file == "ellipse_training_state.pt"
    assert model_entry("ellipse").history_file == "ellipse_history.csv"


def test_released_weights_are_listed_with_the_default_first():
    assert NAMES == ("micro", "efficientvit", "efficientvit_base", "ellipse")
    assert NAMES[0] == DEFAULT


def test_the_table_and_the_names_of_weights_need_no_torch():
    program = (
        "import sys\n"
        "from pupilseg.models import MODELS, list_models, model_entry\n"
        "from pupilseg.weights import NAMES\n"
        "assert model_entry('ellipse').best_file\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "from pupilseg.models import EllipseRegressionNet\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_classes_are_public_names_of_the_package():
    for name in list_models():
        entry = model_entry(name)
        assert entry.class_name in models.__all__
        assert getattr(models, entry.class_name) is entry.builder_class
    with pytest.raises(AttributeError, match="EfficientNet"):
        _ = models.EfficientNet
