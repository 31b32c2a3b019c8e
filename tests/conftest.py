"""Where real data and the authors' numbers lie, when they are there."""

import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Folder of numbers made by the authors' published code."""
    return Path(__file__).parent / "fixtures" / "upstream"


TOLD = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Have a line, a count of what was tried, printed at the end of the run."""
    return request.config.stash.setdefault(TOLD, []).append


class Peak:
    """The most memory, in MiB, that this process has held since the object was made."""

    def __init__(self) -> None:
        with suppress(OSError):  # Linux forgets its own record then
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.now()

    @staticmethod
    def now() -> float:
        status = Path("/proc/self/status")
        if status.exists() and "VmHWM" in (text := status.read_text()):
            return int(text.split("VmHWM:")[1].split()[0]) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    @property
    def grown(self) -> float:
        return self.now() - self.before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(TOLD, []):
        terminalreporter.write_line(line)
