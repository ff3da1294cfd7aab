"""Metadata of ONNX files."""

from dataclasses import replace

import pytest

from pupilseg.model_files.calibration import Calibration
from pupilseg.model_files.onnx import ModelInfo

INFO = ModelInfo(
    model="ellipse",
    task="ellipse",
    version="0.1.0",
    preprocessing="none",
    data="synthetic:8@0",
    license="MIT",
    metrics={"valid_iou": 0.5},
    parameters=25_625,
    calibration=Calibration(2.0, 1.0, 40, "eyes"),
)


@pytest.mark.parametrize("info", [INFO, replace(INFO, parameters=None, calibration=None)])
def test_metadata_round_trip(info):
    stored = info.to_metadata()
    assert all(type(value) is str for value in stored.values())
    assert ModelInfo.from_metadata(stored) == info


def test_metadata_of_earlier_versions_are_read():
    stored = INFO.to_metadata()
    stored["licence"] = stored.pop("license")
    assert ModelInfo.from_metadata(stored) == INFO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "depth"}, "task is 'depth', expected one of: segmentation, ellipse"),
        ({"preprocessing": "x"}, "preprocessing is 'x', .* upgrade pupilseg"),
        ({"metrics": "{"}, "metadata cannot be read"),
        ({"parameters": "many"}, "metadata cannot be read"),
        ({"calibration": "{}"}, "metadata cannot be read: calibration"),
    ],
)
def test_invalid_metadata_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelInfo.from_metadata(INFO.to_metadata() | changes)
    with pytest.raises(ValueError, match="its metadata lack license"):
        ModelInfo.from_metadata({k: v for k, v in INFO.to_metadata().items() if k != "license"})
