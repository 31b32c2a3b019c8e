"""The demo in a headless browser, and what its page computes."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from kn_zoo import cli, layers
from kn_zoo.evaluation.predict import eval_transform

gradio = pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by Playwright"
)

from kn_zoo import demo  # noqa: E402  # needs gradio

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SPACE = Path(__file__).parents[1] / "space"
TIMEOUT = 120_000  # milliseconds; a loaded machine is slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = demo.build()
    yield demo.launch(page, server_name="127.0.0.1", prevent_thread_lock=True)
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page in a new window, which may ask nothing of any other host."""
    width, height = request.param
    window = browser.new_page(viewport=dict(width=width, height=height))
    window.set_default_timeout(TIMEOUT)
    requested: list[str] = []
    window.on("request", lambda request: requested.append(request.url))
    window.goto(address)
    window.get_by_text("Window means").wait_for()
    yield window
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    window.close()


def upload(page: Any, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def test_upload_is_classified_under_three_statistics(page: Any, tmp_path: Path) -> None:
    demo.drawings()["sunflower"].save(tmp_path / "mine.png")
    upload(page, tmp_path / "mine.png")
    page.get_by_text("(yellow)").nth(1).wait_for()
    for title in demo.STATISTICS.values():
        block = page.locator(".block", has=page.get_by_text(title)).last
        assert block.get_by_text("sunflower").count() == 1
        assert block.get_by_text("%").count() == 5
    assert page.locator("img").count() >= 3


def test_sample_brings_its_checkpoint(page: Any) -> None:
    page.locator("#samples button", has_text="digit 3").click()
    page.get_by_text("(yellow)").nth(1).wait_for()
    assert page.get_by_label("Checkpoint", exact=True).input_value().endswith(".digits")
    block = page.locator(".block", has=page.get_by_text(demo.STATISTICS["expected"])).last
    assert block.locator("dt").first.inner_text().strip() == "3"


def test_a_text_file_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("This is no image.")
    upload(page, tmp_path / "notes.png")
    page.get_by_text("This file cannot be classified: not an image that Pillow can read").wait_for()
    demo.drawings()["orange"].save(tmp_path / "mine.png")  # the page is still of use
    page.get_by_label("Clear").or_(page.get_by_label("Remove this file")).first.click()
    upload(page, tmp_path / "mine.png")
    page.get_by_text("(yellow)").nth(1).wait_for()


@pytest.mark.parametrize("name", demo.checkpoints()[:2])
def test_window_statistics_are_those_the_layer_divides_by(name: str) -> None:
    """A filter that picks a window's middle gives (x - mean) / std."""
    model, _ = demo.load(name)
    x = eval_transform(model)(Image.new("RGB", (8, 8), "gray"))[None]
    x = torch.rand_like(x, dtype=torch.float64)
    model = model.double()
    try:
        mean, std = demo.window_statistics(model, x)
        layer = next(m for m in model.modules() if isinstance(m, layers.KNConv2d))
        probe = layers.KNConv2d(
            layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding_sides,
            bias=False, inference_statistics="plain", dtype=torch.float64,
        ).eval()  # fmt: skip
        torch.nn.init.zeros_(probe.weight)
        middle = [size // 2 for size in layer.kernel_size]
        probe.weight.data[0, 0, middle[0], middle[1]] = 1.0
        pixels = x[0, 0]
        expected = (pixels - mean) / (std.square() + probe.eps).sqrt()
        torch.testing.assert_close(probe(x)[0, 0], expected)
    finally:
        model.float()


def test_a_map_keeps_its_extremes() -> None:
    picture, caption = demo.picture_of(torch.tensor([[-1.5, 0.0], [0.0, 2.25]]))
    assert caption == "-1.500 (blue) to 2.250 (yellow)"
    assert picture.size == (demo.SIDE, demo.SIDE)
    corners = picture.getpixel((0, 0)), picture.getpixel((demo.SIDE - 1, demo.SIDE - 1))
    assert corners == ((0x16, 0x20, 0x5B), (0xFB, 0xE4, 0x5B))


def test_kn_zoo_demo_serves_on_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: served.append(page))
    try:
        assert cli.run(cli.app, ["demo", "--port", "0"]) == 0
        assert capsys.readouterr().out.startswith("http://127.0.0.1:")
        assert served[0].server_name == "127.0.0.1" and not served[0].share
    finally:
        served[0].close()


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "kn_zoo.demo")
    monkeypatch.delattr("kn_zoo.demo")
    assert cli.run(cli.app, ["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'kn_zoo[demo]'" in error


def test_the_space_is_laid_out_as_the_hub_wants_it() -> None:
    _, header, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(header)
    assert settings["sdk"] == "gradio"
    assert (SPACE / settings["app_file"]).is_file()
    assert "kn_zoo[demo]" in (SPACE / "requirements.txt").read_text()
    assert len(settings["short_description"]) <= 60


def test_an_overlay_keeps_the_image_above_its_legend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    untrained = demo.create_segmentation_model("fcn_knresnet18")
    monkeypatch.setattr(demo, "create_segmentation_model", lambda name, pretrained: untrained)
    demo.drawings()["sea"].save(tmp_path / "sea.png")
    picture = demo.segment(str(tmp_path / "sea.png"), "fcn_knresnet18.camvid")
    assert picture is not None and picture.width == 256 and picture.height > 256
