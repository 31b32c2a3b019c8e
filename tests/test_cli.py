"""The command `kn-zoo`."""

import io
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kn_zoo import cli, data
from kn_zoo.checkpoints import bundle, manifest
from kn_zoo.evaluation import predict as evaluate
from tests.support import tiny_zoo
from tests.support.tiny_zoo import CLASSES, NAME, Zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return tiny_zoo.make(tmp_path, monkeypatch)


def run(*arguments: object) -> int:
    return cli.run(cli.app, [str(argument) for argument in arguments])


def names(table: str) -> list[str]:
    """Return the first column of the table that `list` prints."""
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    return [name for name in rows if name]


def test_list_has_every_network_and_checkpoint(
    zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list") == 0
    listed = names(capsys.readouterr().out)
    ours = {
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith("kn_zoo.")
    }
    assert set(listed) == ours - {tiny_zoo.ARCHITECTURE} | {NAME}
    assert listed == sorted(listed)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["knresnet8"], {"knresnet8_cifar"}),
        (["KNRESNET8"], {"knresnet8_cifar"}),
        (["digits"], {NAME}),
        (["--pretrained"], {NAME}),
        (["kn*20*_cifar"], {"kndensenet20x16_cifar"}),
        (["knresnet?8"], {"knresnet18"}),
    ],
)
def test_list_filters(
    zoo: Zoo, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: set[str]
) -> None:
    assert run("list", *arguments) == 0
    assert set(names(capsys.readouterr().out)) == expected


def test_info_shows_the_entry_of_the_manifest(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (NAME, tiny_zoo.ARCHITECTURE):
        assert run("info", name) == 0
        printed = capsys.readouterr().out
        assert zoo.checkpoint.file and zoo.checkpoint.file.sha256 in printed
        assert "top-1 25.00 %, top-5 75.00 %" in printed
        assert (
            f"{zoo.checkpoint.parameters:,}" in printed and f"{zoo.checkpoint.flops:,}" in printed
        )
        assert "in the package" in printed and "data CC-BY-4.0" in printed


def test_info_measures_a_network_without_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "knpreactresnet18_cifar") == 0
    model = timm.create_model("knpreactresnet18_cifar")
    printed = capsys.readouterr().out
    assert f"{sum(x.numel() for x in model.parameters()):,}" in printed
    assert f"{bundle.flops(model, (3, 32, 32)):,}" in printed


def digit(folder: Path, number: int = 3) -> Path:
    path = folder / f"digit {number}.png"
    data.load("digits", "test")[number][0].save(path)
    return path


def test_predict_is_what_the_model_says(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [digit(tmp_path, number) for number in (3, 70)]
    assert run("predict", *images) == 0  # by default with the first checkpoint in the package
    printed = capsys.readouterr().out
    assert run("predict", *images, "--model", NAME) == 0
    assert capsys.readouterr().out == printed
    lines = printed.splitlines()
    assert (lines[0], lines[6], len(lines)) == (str(images[0]), str(images[1]), 12)
    model = timm.create_model(NAME, pretrained=True).eval()
    for image, block in zip((3, 70), (lines[1:6], lines[7:]), strict=True):
        pixels = torch.tensor(data.Digits(train=False).data[image] / 255).float()
        with torch.inference_mode():
            probabilities = model(pixels[None, None]).softmax(dim=1)[0].sort(descending=True)
        expected = zip(probabilities.values.tolist(), probabilities.indices.tolist(), strict=True)
        assert block == [f"  {100 * p:6.2f} %  {CLASSES[i]}" for p, i in list(expected)[:5]]


def test_predict_with_a_bundle_of_ones_own(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    tiny_zoo.write(zoo.model, tiny_zoo.draft(), tmp_path / "log", target=folder)
    image = digit(tmp_path)
    assert run("predict", image, "--model", NAME) == 0
    expected = capsys.readouterr().out
    assert run("predict", image, "--model", f"local-dir:{folder}") == 0
    assert capsys.readouterr().out == expected


def png_of(width: int, height: int) -> bytes:
    """Return a PNG with this size in its header, and few bytes of black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    row = bytes(1 + (width + 7) // 8)
    deflate, pixels = zlib.compressobj(), b""
    for _ in range(min(height, 100)):  # a large image is refused before its pixels are read
        pixels += deflate.compress(row)
    pixels += deflate.flush()
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
UNUSABLE = {
    "text.png": (b"not an image", "not an image that Pillow can read"),
    "empty.jpg": (b"", "not an image that Pillow can read"),
    "truncated.jpg": (encoded(NOISE, "JPEG")[:1500], "corrupt image"),
    "truncated.png": (encoded(NOISE, "PNG")[:5000], "corrupt image"),
    "huge.png": (png_of(12_000, 10_000), "12,000 x 10,000 are more than 100,000,000 pixels"),
    "bomb.png": (png_of(100_000, 100_000), "more than 100,000,000 pixels"),
    "ribbon.png": (png_of(80_000, 2), "longer than 50 times its width"),
    "deep.tif": (encoded(Image.new("F", (9, 9)), "TIFF"), "8 bits a channel"),
    "deep.png": (encoded(Image.new("I;16", (9, 9)), "PNG"), "8 bits a channel"),
    "line\nbreak.png": (b"?", "not an image that Pillow can read"),
}


def test_an_unusable_image_is_one_line_and_the_rest_go_on(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {tmp_path / name: content for name, (content, _) in UNUSABLE.items()}
    for path, content in files.items():
        path.write_bytes(content)
    reasons = [reason for _, reason in UNUSABLE.values()]
    paths = [*files, tmp_path / "nowhere.png", tmp_path]
    reasons += ["No such file or directory", "Is a directory"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("predict", *paths, digit(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6  # the digit
    lines = err.splitlines()
    assert len(lines) == len(paths)
    for path, reason, line in zip(paths, reasons, lines, strict=True):
        assert line.startswith(f"{' '.join(str(path).split())}: ") and reason in line, line


@pytest.mark.parametrize("flip", range(40))
def test_damaged_files_never_raise(tmp_path: Path, flip: int) -> None:
    """A damaged file gives an image or an `UnusableImage`."""
    random = np.random.RandomState(flip)
    form = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO")[flip % 8]
    content = bytearray(encoded(NOISE, form))
    for place in random.randint(0, min(len(content), 400), 4):
        content[place] = random.randint(256)
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        assert isinstance(cli.open_image(str(path)), Image.Image)
    except cli.UnusableImage as error:
        assert str(error)


def test_images_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    image = Image.new("RGB", (40, 20))
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert cli.open_image(str(tmp_path / "photo.jpg")).size == (20, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nothing-like-it"], "nothing matches 'nothing-like-it'"),
        (["info", "knresnet18_cifra"], "Did you mean knresnet18_cifar"),
        (["predict"], "IMAGE"),
        (["predict", "x.png", "--model", "knresnet8_cifar"], "There is no checkpoint"),
        (["predict", "x.png", "--model", "local-dir:nowhere"], "nowhere"),
        (["frobnicate"], "frobnicate"),
        (["list", "--frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    zoo: Zoo, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_a_corrupt_checkpoint_is_one_line(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(zoo.file.read_bytes())
    content[-1] ^= 1
    zoo.file.write_bytes(content)
    assert run("predict", digit(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert "SHA-256" in err and err.count("\n") == 1 and not out


def test_predict_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_zoo.empty_manifest(tmp_path, monkeypatch)
    assert run("predict", "x.png") == 2
    assert "name one with --model" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["list"], ["info", "knresnet18"]], ids=lambda a: a[0])
def test_standard_output_on_a_full_disk_is_one_line(arguments: list[str]) -> None:
    """Both for output that fills Python's buffer, and for output that is written at exit."""
    command = [sys.executable, "-m", "kn_zoo.cli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "cli.py: standard output cannot be written: No space left on device\n"


def test_list_suggests_names_and_quotes_what_was_typed(
    zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", "knresnet18_cifr") == 2
    message = capsys.readouterr().err
    assert "'knresnet18_cifr'. Did you mean knresnet18_cifar" in message
    assert run("list", "nosuch") == 2
    message = capsys.readouterr().err
    assert "'nosuch'. Run `kn-zoo list`" in message and "*" not in message


def test_from_the_command_line(tmp_path: Path) -> None:
    """The installed command in another process, with a file name that is not text."""
    command = Path(sys.executable).with_name("kn-zoo")
    if not command.exists():
        pytest.skip("kn_zoo is not installed")
    name = str(tmp_path).encode() + b"/\xff.png"
    embedded = [checkpoint for checkpoint in manifest.load().values() if checkpoint.bundle]
    done = subprocess.run([command, "predict", name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert ("No such file" if embedded else "name one with --model") in done.stderr
    done = subprocess.run([command], capture_output=True, text=True)
    assert done.returncode == 0 and "predict" in done.stdout and done.stderr == ""


def test_evaluation_and_prediction_see_the_same_input(tmp_path: Path) -> None:
    model = timm.create_model("knresnet8_cifar", pretrained_cfg_overlay=dict(crop_pct=0.875))
    NOISE.save(tmp_path / "noise.png")
    transform = evaluate.eval_transform(model)
    assert torch.equal(transform(cli.open_image(str(tmp_path / "noise.png"))), transform(NOISE))
