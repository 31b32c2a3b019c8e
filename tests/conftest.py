"""Where real data and the authors' numbers lie, when they are there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Folder of numbers made by the authors' published code."""
    folder = SHARED / "fixtures" / "upstream"
    if not folder.is_dir():
        pytest.skip(f"the authors' numbers are not at {folder}")
    return folder
