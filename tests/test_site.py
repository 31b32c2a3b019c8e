"""The documentation site builds, is whole and loads nothing from elsewhere; the tutorial runs."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("material", reason="the site needs the extra docs")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


class References(HTMLParser):
    """What a page loads, what it links to, and the names of its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "src" in values:
            self.loaded.append(values["src"])
        if "href" in values:
            only_names = tag == "link" and values.get("rel") in ("canonical", "next", "prev")
            (self.linked if tag == "a" or only_names else self.loaded).append(values["href"])


Pages = dict[Path, References]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> Pages:
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    return {path: References(text) for path, text in texts.items()}


def test_every_page_of_the_menu_is_built(site: Path, pages: Pages) -> None:
    menu = re.findall(r": (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    built = {path.parent.relative_to(site).as_posix() for path in pages}
    assert len(menu) >= 15 and {name for name in menu if name != "index"} <= built


def test_nothing_is_loaded_from_other_hosts(site: Path, pages: Pages) -> None:
    loaded = [url for references in pages.values() for url in references.loaded]
    for path in site.rglob("*.css"):
        loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", path.read_text(encoding="utf-8"))
    assert len(loaded) > 50
    assert [url for url in loaded if url.startswith(("http:", "https:", "//"))] == []


def test_links_within_the_site_lead_somewhere(site: Path, pages: Pages) -> None:
    broken: list[str] = []
    checked = 0
    for path, references in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for url in references.linked + references.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else set()
            checked += 1
            if not target.is_file() or (target in pages and parts.fragment not in known | {""}):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert checked > 500 and broken == []


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "kernel-normalization" / "index.html").read_text(encoding="utf-8")
    assert text.count("<math") > 10 and "arithmatex" not in text


def test_every_public_name_is_documented(pages: Pages, site: Path) -> None:
    import kn_zoo

    documented = pages[site / "api" / "index.html"].anchors
    public = {f"kn_zoo.{name}" for name in kn_zoo.__all__ if name not in ("__version__", "models")}
    assert public <= documented


def test_committed_outputs_of_the_tutorial_are_complete() -> None:
    code = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert "image/png" in outputs[-1].data or any("image/png" in o.get("data", {}) for o in outputs)
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.timeout(600)
def test_tutorial_runs() -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    printed = "".join(o.text for o in outputs if o.get("name") == "stdout")
    final = [float(value) for value in re.findall(r"([\d.]+) % after 400 updates", printed)]
    assert len(final) == 2 and min(final) > 50  # chance is 10 %
