"""What the tests of compat share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """For torch's part of it: its arrays are so small here that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
