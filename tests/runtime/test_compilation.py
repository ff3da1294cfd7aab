"""In-place compilation keeps names and values; without a compiler, training continues."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from pupilseg.models.layers import TokenMixing
from pupilseg.runtime.compilation import Compiled, compile_network
from tests.helpers.paths import ROOT

OFF = {"device_type": "cpu", "enabled": False}
PROGRAM = """
import logging, torch
from pupilseg.runtime.compilation import compile_network
from pupilseg.models.layers import TokenMixing
logging.basicConfig(format="%(message)s")
model = TokenMixing(1)
image = torch.rand(2, 1, 8, 8)
done = compile_network(model, image, torch.sum, {"device_type": "cpu", "enabled": False})
print(done, tuple(model(image).shape))
"""


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = TokenMixing(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(2, 2, 8, 8)
    expected = copy.deepcopy(model)(image).detach()
    torch._dynamo.reset()
    counters.clear()
    done = compile_network(model, image, torch.sum, OFF, mode="default")
    graphs = counters["stats"]["unique_graphs"]
    return model, before, image, expected, (done, graphs)


def test_a_compiled_network_computes_the_same(compiled):
    model, _, image, expected, found = compiled
    assert found == (True, 1)
    torch.testing.assert_close(model(image).detach(), expected)
    assert counters["stats"]["unique_graphs"] == 1  # the step reuses the graph of the trial run


def test_names_and_values_do_not_change(compiled):
    model, before, *_ = compiled
    assert list(model.state_dict()) == list(before)  # no "_orig_mod."
    weight = "conv.0.weight"
    assert torch.equal(model.state_dict()[weight], before[weight])


def test_the_trial_run_has_no_side_effects():
    """It leaves no gradients or batch statistics, which would make compiled runs differ."""
    model = TokenMixing(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compile_network(model, torch.rand(2, 1, 8, 8), torch.sum, OFF, mode="default")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def own(caplog):
    """Returns the messages of the library, without those of torch's compiler."""
    return [record.message for record in caplog.records if record.name.startswith("pupilseg")]


def three(x):
    return x.reshape(3) * 2


@pytest.fixture
def traced(monkeypatch):
    """Traces functions without generating code for them, which takes seconds."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))


@pytest.mark.usefixtures("traced")
def test_a_function_is_compiled_at_its_first_call(caplog):
    function = Compiled(three, "this")
    assert function.compiled is None
    assert function(torch.ones(3, 1)).tolist() == [2, 2, 2]
    assert function.compiled is True
    # Later errors are raised, and do not turn compilation off.
    with pytest.raises(RuntimeError):
        function(torch.ones(4))
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert function.compiled is True
    assert own(caplog) == []


@pytest.mark.usefixtures("traced")
def test_an_error_of_the_function_at_its_first_call_is_not_the_compilers(caplog):
    function = Compiled(three, "this")
    with pytest.raises(RuntimeError, match="shape"):
        function(torch.ones(4))
    assert own(caplog) == []
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert function.compiled is True


def test_a_function_that_cannot_be_compiled_is_called_as_it_is(caplog, monkeypatch):
    def refuse(_graph, _inputs):
        raise RuntimeError("no compiler\nmore lines")

    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=refuse))
    function = Compiled(three, "this")
    for _ in range(2):
        assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert function.compiled is False
    (message,) = own(caplog)
    assert message == (
        "this is not compiled and therefore slower: RuntimeError: no compiler; install a C compiler"
    )


def test_without_a_compiler_it_warns_once_and_continues(tmp_path):
    """Runs in a new process and cache, because Inductor caches compilers and kernels."""
    environment = {
        **os.environ,
        "CXX": "/nowhere/g++",
        "PATH": "/nowhere",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False (2, 1, 8, 8)\n"
    warnings = [line for line in done.stderr.splitlines() if "is not compiled" in line]
    assert len(warnings) == 1
    assert "install a C compiler, or pass --no-compile" in warnings[0]
    assert "Traceback" not in done.stderr
