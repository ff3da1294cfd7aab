"""The jobs that run in containers, called directly on local folders."""

import os
import re
import signal
from dataclasses import replace

import pytest
import yaml

from pupilseg.cloud import client, jobs
from pupilseg.errors import DataError, UsageError
from pupilseg.prepare import write_splits
from pupilseg.sources import download
from tests.helpers.paths import ROOT

SOURCE = "synthetic:12@1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volume")
    data = jobs.Data(folder, SOURCE, ROOT / "params.yaml", "remove it", workers=1)
    assert jobs.prepare(data, "ellipse", []) == {"rows": {"train": 10, "validation": 2}}
    return data


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def reported_epochs(text):
    """Returns the numbers of the epochs that a text has a line about."""
    return re.findall(r"^epoch +(\d)/\d ", text, flags=re.MULTILINE)


def test_an_interrupted_training_is_resumed_and_exported(data, tmp_path):
    run_dir, lines = tmp_path / "run", []
    flags = ["--epochs=3", "--limit=8", "--batch-size=4"]

    def print_line(line):
        lines.append(line)
        if len(lines) == 1:
            os.kill(os.getpid(), signal.SIGINT)  # as Modal does before it removes a container

    before = stamps(data.folder)
    with pytest.raises(InterruptedError, match="the next attempt resumes it"):
        jobs.train(data, "ellipse", flags, run_dir, print_line)
    assert reported_epochs("\n".join(lines)) == ["1", "2"]
    lines[:] = ["resumed"]
    result = jobs.train(data, "ellipse", flags, run_dir, print_line)
    assert reported_epochs("\n".join(lines)) == ["3"]
    assert stamps(data.folder) == before
    assert result["files"] == [
        *("best_ellipse_model.onnx", "best_ellipse_model.pt", "ellipse_history.csv"),
        *("ellipse_model_epoch_3.pt", "ellipse_training_state.pt"),
    ]
    assert result["parity"] < 1e-3
    assert (run_dir / "best_ellipse_model.onnx").stat().st_size == result["bytes"] < 300_000
    assert len((run_dir / "ellipse_history.csv").read_text().splitlines()) == 4
    before = stamps(run_dir)
    assert jobs.train(data, "ellipse", flags, run_dir, pytest.fail) == result
    assert stamps(run_dir) == before


def test_flags_that_are_not_given_come_from_params(tmp_path):
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    params.write_text(text.replace("epochs: 15", "epochs: 7").replace("seed: 0", "seed: 5"))
    args = jobs.parse_flags(["--seed=9", "--no-compile"], params)
    batch_size = yaml.safe_load(text)["train"]["batch_size"]
    assert (args.epochs, args.seed, args.batch_size, args.compile) == (7, 9, batch_size, False)
    params.write_text(text.replace("epochs:", "epoch:"))
    with pytest.raises(UsageError, match="unrecognized arguments: --epoch=15"):
        jobs.parse_flags([], params)
    params.write_text("train: {}")
    with pytest.raises(DataError, match="has no group 'download'"):
        jobs.parse_flags([], params)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--epochs=0"], "--epochs 0"), (["--lr=-1"], "--lr -1"), (["--gpus=1"], "--gpus=1")],
)
def test_a_wrong_flag_is_an_answer_and_downloads_nothing(tmp_path, flags, message):
    data = jobs.Data(tmp_path, SOURCE, ROOT / "params.yaml", "remove it", workers=1)
    answer = jobs.as_answer(lambda: jobs.prepare(data, "ellipse", flags))
    assert message in answer["error"]
    assert answer["exit_code"] == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(client.PupilSegError, match=message) as caught:
        client.checked(answer)
    assert caught.value.exit_code == 2


def test_another_data_set_is_refused_with_a_hint(data):
    for dataset in ("synthetic:12@2", "synthetic:13@1", None):
        other = replace(data, dataset=dataset)
        with pytest.raises(DataError, match=f"contains {SOURCE}, not .*; remove it"):
            jobs.find_shards(other)


def test_uploaded_shards_are_used(data, tmp_path):
    """`pipeline.materialize` writes no record for them."""
    write_splits(data.raw, tmp_path / "shards", workers=1, progress=False)
    before = stamps(tmp_path)
    for dataset in (None, SOURCE):
        there = replace(data, folder=tmp_path, dataset=dataset)
        assert jobs.find_shards(there) == tmp_path / "shards"
    for dataset in ("synthetic:12", "synthetic:12@2", "someone/eyes"):
        with pytest.raises(DataError, match=f"contains {SOURCE}, not {dataset}; remove it"):
            jobs.find_shards(replace(data, folder=tmp_path, dataset=dataset))
    assert stamps(tmp_path) == before


def test_parts_are_the_bytes_of_the_local_stage(tmp_path):
    data = jobs.Data(
        tmp_path / "volume", SOURCE, ROOT / "params.yaml", "", workers=1, rows_per_shard=1
    )
    parts = jobs.fetch(data)["parts"]
    assert parts == [
        *(["train", 0, 4], ["train", 4, 8], ["train", 8, 10], ["validation", 0, 2]),
    ]
    for part in reversed(parts):
        assert jobs.write_shards_part(data, *part) == {"rows": part[2] - part[1]}
    made = {p: t for p, t in stamps(data.shards).items() if p.suffix == ".arrow"}
    jobs.prepare(data, "ellipse", [])
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert jobs.fetch(data) == {"parts": []}

    download(SOURCE, tmp_path / "raw")
    write_splits(tmp_path / "raw", tmp_path / "local", rows_per_shard=1, workers=1, progress=False)
    for split in ("train", "validation"):
        local = {p.name: p.read_bytes() for p in (tmp_path / "local" / split).iterdir()}
        assert {p.name: p.read_bytes() for p in (data.shards / split).iterdir()} == local
        assert len(local) > 2
