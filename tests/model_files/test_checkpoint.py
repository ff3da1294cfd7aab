"""Checkpoints: exact, written completely or not at all, and loaded without running code."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

import pupilseg
from pupilseg import files
from pupilseg.errors import CheckpointError, OutputError
from pupilseg.model_files.card import ModelCard
from pupilseg.model_files.checkpoint import (
    CARD_MEMBER,
    load_model,
    load_tensors,
    load_weights,
    plain_state_dict,
    read_card,
    read_initial_card,
    save_model,
    save_state,
)
from pupilseg.models import create_model, list_models
from tests.helpers.paths import ROOT

CARD = ModelCard(model="efficientvit_tiny", preprocessing="none")
every_model = pytest.mark.parametrize("name", list_models())


def network(name="efficientvit_tiny", seed=0, **architecture):
    torch.manual_seed(seed)
    return create_model(name, **architecture)


@pytest.fixture(scope="module")
def weights():
    return plain_state_dict(network())


@pytest.fixture
def saved(tmp_path, weights):
    path = tmp_path / "model.pt"
    save_model(path, weights, CARD)
    return path


@every_model
def test_round_trip_is_exact(tmp_path, name):
    model = network(name)
    path = tmp_path / "model.pt"
    card = replace(CARD, model=name, extra={"note": "überall"})
    save_model(path, plain_state_dict(model), card)
    loaded = load_model(path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.card == card
    assert read_card(path) == card
    image = torch.rand(1, 1, 400, 640)
    with torch.no_grad():
        assert torch.equal(loaded(image), model.eval()(image))
    for key, value in model.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value), key


def test_architecture_round_trip_keeps_tuples(tmp_path):
    architecture = {"embed_dim": (8, 8, 8), "num_heads": (1, 1, 1), "decoder_dim": 8}
    model = network("efficientvit", **architecture)
    card = ModelCard(model="efficientvit", architecture=architecture)
    save_model(tmp_path / "m.pt", plain_state_dict(model), card)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.card == card
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_torch_loads_a_plain_state_dict(saved, weights):
    plain = torch.load(saved, weights_only=True)
    assert type(plain) is dict
    assert plain.keys() == weights.keys()
    for key, value in plain.items():
        assert type(value) is torch.Tensor
        assert value.is_contiguous()
        assert torch.equal(value, weights[key])


def test_the_same_weights_and_card_give_the_same_bytes(tmp_path, saved):
    other = tmp_path / "elsewhere" / "other_name.pt"
    save_model(other, plain_state_dict(network()), CARD)
    assert other.read_bytes() == saved.read_bytes()
    with zipfile.ZipFile(other) as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    save_model(other, plain_state_dict(network(seed=1)), CARD)
    assert other.read_bytes() != saved.read_bytes()


def test_loading_and_saving_again_gives_the_same_bytes(tmp_path, saved):
    again = tmp_path / "again.pt"
    save_model(again, plain_state_dict(load_model(saved)), CARD)
    assert again.read_bytes() == saved.read_bytes()


def test_memory_layout_does_not_affect_the_file(tmp_path, saved):
    model = network().to(memory_format=torch.channels_last)
    save_model(tmp_path / "other.pt", plain_state_dict(model), CARD)
    assert (tmp_path / "other.pt").read_bytes() == saved.read_bytes()


def test_the_compilers_prefix_is_removed(weights):
    """`torch.compile(model)` wraps the model immediately, and compiles it when it is called."""
    model = network()
    wrapped = torch.compile(model)
    assert all(key.startswith("_orig_mod.") for key in wrapped.state_dict())
    found = plain_state_dict(wrapped)
    assert list(found) == list(weights)
    inner = torch.nn.Module()
    inner.head = wrapped
    assert not any("_orig_mod" in key for key in plain_state_dict(inner))


def test_a_state_dict_is_a_copy(weights):
    model = network()
    kept = plain_state_dict(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(kept[key], weights[key]) for key in weights)
    assert not any(value.requires_grad for value in kept.values())


def test_load_model_at_the_top(saved):
    assert pupilseg.load_model is load_model


# Invalid files


def refused(path, *texts):
    """Asserts that both loaders raise a CheckpointError that names the file."""
    for opener in (load_model, load_tensors):
        with pytest.raises(CheckpointError) as caught:
            opener(path)
        assert str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def test_a_missing_file_is_refused_with_a_hint(tmp_path):
    refused(tmp_path / "none.pt", "does not exist", "pipeline.train")


def test_a_directory_is_refused(tmp_path):
    refused(tmp_path, "expected a model file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(saved):
    saved.chmod(0)
    refused(saved, "Permission denied")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    refused(saved, "damaged", "train again or copy it again")


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02]q\x00.", b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    refused(path, "is not a model file or is damaged")


def test_a_flipped_bit_in_the_weights_is_detected(saved):
    """Torch itself ignores the archive's checksums."""
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        member = max(tensors, key=lambda info: info.file_size)
    data[member.header_offset + len(member.filename) + 200] ^= 1
    saved.write_bytes(data)
    torch.load(saved, weights_only=True)
    refused(saved, "checksum")


def test_flipped_bits_raise_no_other_error(saved):
    """Tries a sample of the bytes that are not weights: headers, pickle, card, directory."""
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        pickled = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
        card = archive.getinfo(CARD_MEMBER)
    start = pickled.header_offset
    places = [
        *range(start, start + pickled.file_size, 211),
        *range(card.header_offset, len(data), 67),
    ]
    outcomes = set()
    for number, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << number % 8
        saved.write_bytes(changed)
        try:
            load_model(saved)
            outcomes.add("loaded")  # a bit without effect, for example in a date
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def rewritten(path, member, content):
    """Replaces a member of the archive, with a correct checksum."""
    temporary = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
        for info in old.infolist():
            data = content if info.filename == member else old.read(info)
            if data is not None:
                new.writestr(info.filename, data)
    temporary.replace(path)


def card_with(path, **changes):
    rewritten(path, CARD_MEMBER, json.dumps({**read_card(path).to_dict(), **changes}))


def test_a_file_without_a_card_is_refused_with_a_hint(tmp_path, weights):
    path = tmp_path / "plain.pt"
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"plain\.pt does not record .* create_model\(\)"):
        load_model(path)
    assert load_tensors(path).keys() == weights.keys()


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b"3"])
def test_a_damaged_card_is_refused(saved, content):
    rewritten(saved, CARD_MEMBER, content)
    refused(saved)


def test_a_newer_format_requires_an_upgrade(saved):
    card_with(saved, format=2)
    with pytest.raises(CheckpointError, match=r"format 2, .* reads 1; upgrade pupilseg"):
        load_model(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "unet"},
        {"architecture": {"embed_dim": 3}},
        {"architecture": {"channels": 3}},
        {"architecture": {"embed_dim": [9, 9, 9], "num_heads": [2, 2, 2]}},
        {"architecture": {"decoder_dim": "eight"}},
    ],
    ids=str,
)
def test_a_network_that_cannot_be_built_is_refused(saved, changes):
    card_with(saved, **changes)
    with pytest.raises(CheckpointError, match=r"model\.pt .* cannot build") as caught:
        load_model(saved)
    assert caught.value.exit_code == 1


def test_weights_of_another_network_are_refused(saved):
    card_with(saved, model="efficientvit")
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert "model.pt does not hold the weights of TinyEfficientViTSeg" in str(caught.value)
    assert "pass a file of that network" in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "text"])
def test_a_differing_weight_is_named_and_nothing_is_loaded(weights, change):
    name = "head.score.weight"
    other = {key: value + 1 for key, value in weights.items()}
    if change == "missing":
        del other[name]
    else:
        wrong = {"extra": torch.zeros(2), "shape": torch.zeros(3, 3), "text": "no tensor"}[change]
        name = "head.other" if change == "extra" else name
        other[name] = wrong
    model = network()
    with pytest.raises(CheckpointError, match=rf"^m\.pt .* 1 weights differ, such as '{name}'"):
        load_weights(model, other, "m.pt")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_unnamed_tensors_are_refused(tmp_path):
    path = tmp_path / "list.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="holds a list, expected named tensors"):
        load_tensors(path)


class Evil:
    """Creates a directory when unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("form", ["torch", "pickle", "member"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, saved, form):
    flag = tmp_path / "run"
    evil = {"weight": Evil(flag)}
    if form == "torch":
        torch.save(evil, saved)
    elif form == "pickle":
        saved.write_bytes(pickle.dumps(evil))
    else:
        rewritten(saved, "archive/data.pkl", pickle.dumps(evil, protocol=2))
    refused(saved)
    assert not flag.exists()
    pickle.loads(pickle.dumps(evil))
    assert flag.exists()  # the payload works


# Writing


@pytest.mark.parametrize("write", [save_model, lambda p, w, _: save_state(p, w)], ids=["m", "s"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved, weights, write):
    """A file size limit makes the system call fail, as a full disk does."""
    old = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OutputError, match=r"model\.pt"):
            write(saved, {key: value + 1 for key, value in weights.items()}, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == ["model.pt"]


def test_a_rename_that_fails_leaves_the_old_file(saved, weights, monkeypatch):
    old = saved.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OutputError, match="disk is full"):
        save_model(saved, weights, replace(CARD, epoch=1))
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == ["model.pt"]


def test_killed_while_writing_leaves_a_whole_file(tmp_path, saved):
    """Kills a process that repeatedly overwrites the file."""
    program = (
        "import sys, torch\n"
        "from pupilseg.model_files.card import ModelCard\n"
        "from pupilseg.model_files.checkpoint import plain_state_dict, save_model\n"
        "from pupilseg.models import create_model\n"
        "weights = plain_state_dict(create_model('efficientvit_tiny'))\n"
        "card = ModelCard(model='efficientvit_tiny')\n"
        "print('go', flush=True)\n"
        "while True: save_model(sys.argv[1], weights, card)\n"
    )
    for number in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(saved)], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"go\n"
            torch.randn(200_000 * (number + 1)).sort()
            process.kill()
        load_model(saved)
    shutil.rmtree(tmp_path)


def test_a_state_round_trip_is_exact(tmp_path):
    generator = torch.Generator().manual_seed(3)
    state = {"step": 3, "text": "x", "random": generator.get_state(), "nested": {"a": [1.5, None]}}
    save_state(tmp_path / "s.pt", state)
    found = load_tensors(tmp_path / "s.pt")
    assert torch.equal(found.pop("random"), state.pop("random"))
    assert found == state


def test_the_wider_micro_network_of_version_0_1_0_is_recognized_by_its_weights(tmp_path):
    """Its files record no architecture, since its widths were the default."""
    widths = {"embed_dim": (16, 16, 16), "ratios": (1, 1, 1), "key_dim": 2, "stem_dim": 6}
    wide = create_model("efficientvit_tiny", **widths)
    path = tmp_path / "old.pt"
    save_model(path, wide.state_dict(), ModelCard(model="efficientvit_tiny"))
    loaded = load_model(path)
    assert sum(p.numel() for p in loaded.parameters()) == 9933
    assert loaded.card.architecture == widths
    assert read_initial_card(path, "efficientvit_tiny").architecture == widths
