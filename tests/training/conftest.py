"""A fresh Accelerate state for every test."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate's settings are global; each test has its own run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
