"""Build steps of the documentation site, so that a page loads nothing from other hosts.

Formulas become MathML, the tutorial notebook becomes a Markdown page, and figures in results/ join
the site.
"""

import html
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
# pymdownx.arithmatex writes <span class="arithmatex">\(...\)</span> and <div ...>\[...\]</div>
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tutorial with its outputs, and the figures that pages take from results/."""
    text, resources = MarkdownExporter().from_filename(str(ROOT / "docs" / "tutorial.ipynb"))
    files.append(File.generated(config, "tutorial.md", content=text))
    for name, data in resources["outputs"].items():
        files.append(File.generated(config, name, content=data))
    for path in sorted((ROOT / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to figures, which in the repository lie beside docs/, into the site."""
    return markdown.replace("](../results/", "](results/")


def on_page_content(content: str, **_: object) -> str:
    """Convert LaTeX to MathML, which browsers draw themselves."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, opening, latex = match.groups()
    display = "block" if opening == "[" else "inline"
    mathml = latex2mathml.converter.convert(html.unescape(latex).strip(), display=display)
    return f'<{tag} class="formula">{mathml}</{tag}>'
