"""Checkpoints for a machine without a network, and the order of the places searched."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from kn_zoo import cli
from kn_zoo.checkpoints import bundle, loading, manifest, offline
from kn_zoo.checkpoints.manifest import WEIGHTS_FILE
from tests.support import tiny_zoo
from tests.support.tiny_zoo import ARCHITECTURE, NAME, Child, Zoo

COMMIT = "c" * 40


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    monkeypatch.delenv("KN_ZOO_WEIGHTS", raising=False)
    return tiny_zoo.make(tmp_path / "zoo", monkeypatch)


def run(*arguments: object) -> int:
    return cli.run(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def directory(zoo: Zoo, tmp_path: Path) -> Path:
    assert run("download", NAME, tmp_path / "a stick") == 0
    return tmp_path / "a stick"


def test_a_directory_holds_whole_bundles_and_their_sums(zoo: Zoo, directory: Path) -> None:
    names = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }
    assert names == {offline.SUMS, *(f"{NAME}/{name}" for name in bundle.FILES)}
    assert run("check", directory) == 0
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", offline.SUMS], cwd=directory, check=True)
    assert run("download", "--all", directory) == 0, "again, over what is there"
    assert offline.problems(directory) == []


def test_it_serves_a_machine_without_network(zoo: Zoo, directory: Path, tmp_path: Path) -> None:
    """Another process has neither bundle nor cache, and its Hub does not answer."""
    on_hub = replace(zoo.checkpoint, bundle=None, hub=manifest.Hub("owner/tiny", COMMIT))
    lost = replace(on_hub, name=f"{ARCHITECTURE}.lost", hub=manifest.Hub("owner/lost", COMMIT))
    machine = tiny_zoo.copy_package(tmp_path / "machine", [on_hub, lost])
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:1"}
    environment = {**home, "HF_HUB_OFFLINE": "1", "HF_HUB_VERBOSITY": "critical"}
    with Child(machine, **environment, KN_ZOO_WEIGHTS=str(directory)) as child:
        loaded = child.load(NAME)
        assert set(loaded) == {"sha256"}
        assert child.load(f"local-dir:{directory / NAME}") == loaded
        answer = child.load(lost.name)
        assert answer["error"] == "MissingWeights" and "kn-zoo download" in answer["message"]
        file = directory / NAME / WEIGHTS_FILE
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        answer = child.load(NAME)
        assert answer["error"] == "CorruptWeights"
        assert f"kn-zoo check {directory}" in answer["message"]
    with Child(machine, **environment, KN_ZOO_WEIGHTS=str(tmp_path / "nowhere")) as child:
        answer = child.load(NAME)
        assert answer["error"] == "MissingWeights" and "not a directory" in answer["message"]


def test_the_order_of_places(
    zoo: Zoo, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package, directory, cache and Hub; the path of the file shows where it came from."""
    asked = []

    def download(repository: str, filename: str, revision: str, **options: object) -> str:
        asked.append((repository, filename, revision))
        return str(tmp_path / "from the hub")

    monkeypatch.setattr(loading, "hf_hub_download", download)
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(directory))
    checkpoint = replace(zoo.checkpoint, hub=manifest.Hub("owner/tiny", COMMIT))
    assert loading.locate(checkpoint) == zoo.file
    zoo.file.unlink()
    assert loading.locate(checkpoint) == directory / NAME / WEIGHTS_FILE
    assert not asked
    shutil.rmtree(directory / NAME)
    assert loading.locate(checkpoint) == tmp_path / "from the hub"
    assert asked == [("owner/tiny", WEIGHTS_FILE, COMMIT)]
    monkeypatch.delenv("KN_ZOO_WEIGHTS")
    assert loading.locate(replace(checkpoint, bundle=None)) == tmp_path / "from the hub"


def test_a_damaged_file_in_a_directory_is_left_where_it_is(
    zoo: Zoo, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory is not the cache, even if named like it: no file in it is replaced."""
    snapshots = directory.rename(directory.with_name("snapshots"))
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(snapshots))
    manifest.write_entry(
        replace(zoo.checkpoint, bundle=None, hub=manifest.Hub("owner/tiny", COMMIT))
    )
    tiny_zoo.register(monkeypatch)
    monkeypatch.setattr(loading, "hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    file = snapshots / NAME / WEIGHTS_FILE
    flip(file)
    with pytest.raises(loading.CorruptWeights, match="kn-zoo check"):
        timm.create_model(NAME, pretrained=True)
    assert file.is_file()


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def make_file(path: Path) -> None:
    path.parent.write_text("not a bundle")


@pytest.mark.parametrize("make", [make_folder, make_file], ids=lambda make: make.__name__)
def test_something_else_in_the_place_of_a_bundle_is_named(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    make(directory / NAME / WEIGHTS_FILE)
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(directory))
    with pytest.raises(loading.CorruptWeights, match=f"KN_ZOO_WEIGHTS={directory}") as caught:
        loading.locate(replace(zoo.checkpoint, bundle=None))
    assert f"kn-zoo download {NAME} {directory}" in str(caught.value)


def test_an_authors_file_without_its_pin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is not in the manifest, so that the file cannot be checked."""
    entry = replace(manifest.find("knresnet18"), file=None)
    path = tmp_path / entry.name / WEIGHTS_FILE
    path.parent.mkdir()
    path.write_text("anything")
    monkeypatch.setenv("KN_ZOO_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    assert loading.locate(entry) == path
    with pytest.raises(loading.MissingWeights, match=f"{path} cannot be checked"):
        loading.read(path, entry)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def put_beside(path: Path) -> None:
    path.with_name("extra.bin").write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, Path.unlink, put_beside], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, bundle.PREDICTIONS, bundle.CARD])
def test_check_names_what_is_wrong(
    directory: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(directory / NAME / name)
    capsys.readouterr()
    assert run("check", directory) == 1
    printed = capsys.readouterr().out
    assert f"{NAME}/{'extra.bin' if damage is put_beside else name}: " in printed
    assert "problem" in printed.splitlines()[-1]


def test_sums_that_fit_a_forged_file_do_not_help(directory: Path) -> None:
    """The weights are compared with the manifest, not with the directory's own sums."""
    file = directory / NAME / WEIGHTS_FILE
    before = (directory / offline.SUMS).read_text()
    right = offline.files.sha256(file)
    flip(file)
    (directory / offline.SUMS).write_text(before.replace(right, offline.files.sha256(file)))
    (problem,) = offline.problems(directory)
    assert "expected" in problem


def test_a_checkpoint_that_this_version_does_not_know(
    zoo: Zoo, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_zoo.empty_manifest(tmp_path / "zoo", monkeypatch)
    manifest._load.cache_clear()
    assert "Upgrade kn_zoo" in offline.problems(directory)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", NAME], "a directory"),
        (["download", NAME, "--all", "x"], "or --all"),
        (["download", "no.such", "x"], "no.such"),
        (["check", "nowhere"], "nowhere"),
        (["import", NAME, "x"], "is not a checkpoint of the authors"),
        (["import", "knresnet18", "nowhere.pth"], "nowhere.pth"),
        (["pin", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    zoo: Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KN_ZOO_CACHE", str(tmp_path / "cache"))
    ours = manifest._load(tiny_zoo.ROOT / "weights_manifest.json")
    manifest.write_entry(replace(ours["knresnet18.upstream_in1k"], file=None))
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert message in error and len(error.strip().splitlines()) == 1 and not out


def test_a_full_disk_is_reported_with_the_path(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run("download", NAME, tmp_path / "x") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "x" / NAME / WEIGHTS_FILE
    assert f"{path} cannot be written (No space left on device)" in message
    assert "Free some space, or choose another directory" in message
    assert not [p for p in (tmp_path / "x").rglob("*") if p.is_file()]


def test_timm_lists_the_imported_checkpoints() -> None:
    for size in (18, 34, 50):
        assert f"knresnet{size}.upstream_in1k" in timm.list_pretrained()
