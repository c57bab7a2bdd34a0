"""What every test may rely on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums do not depend on the number of cores, and tests in parallel do not fight for them."""
    torch.set_num_threads(1)
