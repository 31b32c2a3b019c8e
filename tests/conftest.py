"""Where real data and the authors' numbers lie, when they are there."""

from collections.abc import Callable
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


TOLD = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Have a line, a count of what was tried, printed at the end of the run."""
    return request.config.stash.setdefault(TOLD, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(TOLD, []):
        terminalreporter.write_line(line)
