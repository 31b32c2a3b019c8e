"""Fixtures for every test, and the data sets beside the checkout."""

import fcntl
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kn_zoo import data

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Set KN_ZOO_DATA to the data sets in ../shared/data, unpacked once, unless it is set.

    pytest-xdist's workers inherit the variable.
    """
    packed = ROOT.parent / "shared" / "data"
    if "KN_ZOO_DATA" not in os.environ and packed.is_dir():
        os.environ["KN_ZOO_DATA"] = str(unpack(packed, data.cache_dir() / "test-data"))


def unpack(packed: Path, folder: Path) -> Path:
    """Provide each data set of `packed` in `folder`: by its unpack.py, else as a link."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source in sorted(path for path in packed.iterdir() if path.is_dir()):
            target, script = folder / source.name, source / "unpack.py"
            if target.is_dir():
                continue
            if not script.exists():
                target.unlink(missing_ok=True)  # a link to a folder that has moved
                target.symlink_to(source.resolve())
                continue
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                subprocess.run([sys.executable, script, temporary], check=True)
                os.chmod(temporary, 0o755)
                Path(temporary).rename(target)
                Path(temporary).mkdir()  # for TemporaryDirectory to remove
    return folder


@pytest.fixture(scope="session")
def dataset_folder() -> Callable[[str], Path]:
    """A function that returns the folder of a real data set, or skips the test."""
    root = data.data_dir()

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not in {root}: set KN_ZOO_DATA")
        return root / name

    return find


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Folder of reference outputs of the authors' published code."""
    return Path(__file__).parent / "fixtures" / "upstream"


TOLD = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line at the end of the run, such as the number of cases tried."""
    return request.config.stash.setdefault(TOLD, []).append


class Peak:
    """Peak memory of this process in MiB, since the object was created."""

    def __init__(self) -> None:
        with suppress(OSError):  # resets the peak on Linux
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["told"] = session.config.stash.get(TOLD, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect a worker's lines."""
    lines = getattr(node, "workeroutput", {}).get("told", [])
    node.config.stash.setdefault(TOLD, []).extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(TOLD, []):
        terminalreporter.write_line(line)
