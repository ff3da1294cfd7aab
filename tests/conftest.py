"""What every test gets: one thread for torch, so that sums are formed in one order."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Golden values and "the same bytes" hold for a fixed number of threads."""
    import torch

    torch.set_num_threads(1)
