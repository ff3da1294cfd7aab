"""Fixtures and settings of all tests."""

import logging
import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Limits torch to one thread: sums in another order would differ from recorded values."""
    import torch

    torch.set_num_threads(1)


def pytest_configure():
    """Handles Ctrl-C, which background jobs of a shell, and the programs they start, ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def library_log():
    """Restores the log settings of the library, which its programs change."""
    logger = logging.getLogger("pupilseg")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def pytest_collection_modifyitems(items):
    """Skips tests with the marker `gpu` on a machine without CUDA."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An MLflow server, one per session: it takes seconds to start."""
    from tests.helpers.mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def gate(server):
    """An address of the server that can hang, lose responses and refuse connections."""
    from tests.helpers.mlflow_server import Gate

    gate = Gate(server.port)
    yield gate
    gate.kill()


@pytest.fixture(scope="session")
def in_colab(tmp_path_factory):
    """Returns a function: name of a network -> folder of `run_in_colab` of its notebook."""
    from functools import partial

    from tests.helpers.notebooks import run_in_colab
    from tests.helpers.shared import once

    return lambda model: once(tmp_path_factory, f"colab-{model}", partial(run_in_colab, model))
