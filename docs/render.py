"""Write anew what is generated from the manifest and the bundles: README.md's weights and where
they are, docs/results.md and its figures.

With --check nothing is written; the exit status is 1 if a text would be.
"""

import sys
from pathlib import Path

from kn_zoo.checkpoints import manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import results

README = Path(__file__).parents[1] / "README.md"
STATISTICS = ("expected", "plain", "sampled")


def weights_table() -> str:
    """Markdown table of every weight in the manifest."""
    head = ["weight", "where", "evaluated on", "images", *STATISTICS, "parameters", "GFLOPs"]
    rows = [[*head, "reported by"], ["---"] * 3 + ["---:"] * 6 + ["---"]]
    rows += [weight_row(weight) for weight in manifest.load().values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def where(weight: Checkpoint) -> str:
    """Where a weight's file comes from."""
    if weight.source == "on the Hub" and weight.hub:
        return f"[on the Hub](https://huggingface.co/{weight.hub.repository})"
    return weight.source


def published() -> str:
    """Which weights are on the Hub, which travel with the package, which are imported."""
    weights = manifest.load().values()
    named = {w.name: f"`{w.name}` ({w.hub.id})" if w.hub else f"`{w.name}`" for w in weights}

    def listed(source: str) -> str:
        return ", ".join(named[w.name] for w in weights if source in w.sources)

    unpinned = any(w.upstream and not w.file for w in weights)
    state = "their hashes are not pinned by this project yet" if unpinned else "hashes pinned"
    return "\n".join(
        [
            f"- Published on the Hugging Face Hub: {listed('on the Hub') or 'nothing yet'}.",
            f"- Travel with the package and the repository: {listed('in the package') or 'none'}.",
            "- Imported from the authors' Google Drive on first use: "
            f"{listed('imported on first use')}; {state}.",
        ]
    )


def weight_row(weight: Checkpoint) -> list[str]:
    accuracies = weight.reported.statistics
    top1 = [f"{accuracies[name].top1:.2f}" if name in accuracies else "" for name in STATISTICS]
    return [
        f"`{weight.name}`",
        where(weight),
        f"{weight.dataset.name} {weight.dataset.split}",
        f"{weight.dataset.images:,}",
        *top1,
        f"{weight.parameters:,}",
        manifest.gflops(weight.flops),
        weight.reported.by,
    ]


def replaced(text: str, section: str, content: str) -> str:
    """`text` with what stands between the markers of `section` replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md has lost its markers {begin} ... {end}: restore them with git")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def texts() -> dict[Path, str]:
    """What each file that is generated, or partly, has to hold."""
    readme = replaced(README.read_text(encoding="utf-8"), "weights", weights_table())
    return {README: replaced(readme, "published", published()), results.PAGE: results.page()}


def main(check: bool) -> int:
    stale = {
        path: text
        for path, text in texts().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if check:
        return int(bool(stale))
    for path, text in stale.items():
        manifest.write_text(path, text)
    for path in [*stale, *results.plot()]:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
