"""What every test gets: one thread for torch, so that sums are formed in one order."""

import logging
import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Golden values and "the same bytes" hold for a fixed number of threads."""
    import torch

    torch.set_num_threads(1)


def pytest_configure():
    """Listens to Ctrl-C, which a shell's background job ignores, and all that it starts with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def library_log():
    """The library's log is afterwards what it was: programs that run in tests show theirs."""
    logger = logging.getLogger("pupilseg")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def pytest_collection_modifyitems(items):
    """Skips what is marked `gpu` where there is none."""
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
