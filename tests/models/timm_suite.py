"""Run timm's own tests/test_models.py on the models of this package.

    python tests/models/timm_suite.py [arguments of pytest]

pip downloads the source distribution of the installed timm to `.timm-suite/`. Its tests cover all
models that `timm.list_models()` returns. This module is a pytest plugin of that run: it restricts
the list to our models, whatever module a test asks for, and deselects tests of particular models of
timm.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import timm

from kn_zoo.checkpoints import manifest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".timm-suite"


def main(arguments: list[str]) -> int:
    """Return pytest's exit status, or 2 if timm's tests cannot be downloaded."""
    try:
        suite = fetch(timm.__version__)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(f"Cannot download timm's source distribution: {error}", file=sys.stderr)
        return 2
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = dict(
        os.environ, TORCH_BACKEND="kn_zoo", PYTHONPATH=os.pathsep.join(filter(None, paths))
    )
    # Without timeouts: a slow machine is no failure.
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite", "-p", "no:timeout"]
    command += ["-c", "pyproject.toml", "tests/test_models.py", *arguments]
    return subprocess.call(command, cwd=suite, env=environment)


def fetch(version: str) -> Path:
    """Return the folder of this version of timm's tests; pip downloads it if it is missing."""
    folder = CACHE / f"timm-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        download = ["download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", scratch]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *download]
        subprocess.run([*pip, f"timm=={version}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            # Do not extract timm itself: it would shadow the installed package.
            wanted = [m for m in tar if m.name.split("/")[1] in ("tests", "pyproject.toml")]
            # Python before 3.10.12 and 3.11.4 has no filters.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(scratch, wanted)
        (Path(scratch) / f"timm-{version}").rename(folder)
    return folder


def pytest_configure(config: Any) -> None:
    """Restrict `list_models` to our models, before timm's tests are imported."""
    import kn_zoo.models  # noqa: F401  registers them

    config.addinivalue_line("markers", "timeout(seconds): meant for timm's machines, not applied")
    list_models = timm.list_models

    def list_ours(filter: Any = "", module: Any = "", *args: Any, **kwargs: Any) -> list[str]:
        return [name for name in list_models(filter, "", *args, **kwargs) if is_ours(name)]

    timm.list_models = list_ours


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of our models."""
    kept: list[Any] = []
    dropped: list[Any] = []
    for item in items:
        parameters = (getattr(item, "callspec", None) and item.callspec.params) or {}
        (kept if is_ours(parameters.get("model_name")) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def is_ours(name: Any) -> bool:
    """Return whether `name` is a model of this package, or a checkpoint in the package."""
    architecture, _, tag = name.partition(".") if isinstance(name, str) else ("", "", "")
    checkpoint = manifest.load().get(name)
    if not timm.is_model(architecture) or (tag and not (checkpoint and checkpoint.bundle)):
        return False
    return timm.model_entrypoint(architecture).__module__.startswith("kn_zoo.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
