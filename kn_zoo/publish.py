"""Publish bundles on the Hugging Face Hub, one repository each, after verifying them.

    hf auth login
    python train_scripts/push_to_hub.py knpreactresnet20_cifar.digits --dry-run
    python train_scripts/push_to_hub.py --all --tag v0.1.0

The repository is NAMESPACE/NAME, with the namespace of weights_manifest.json. The changed files are
uploaded as one commit. Its hash is written into the manifest, which is to be committed.
"""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi

from kn_zoo.checkpoints import hub, manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.cli import find_checkpoint
from kn_zoo.command import UsageError, one_line
from kn_zoo.evaluation import verify

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Waivable(str, Enum):
    data = "data"
    verify = "verify"


def require_match(checkpoint: Checkpoint, data_dir: Path | None, waived: set[str]) -> None:
    """Verify a checkpoint as `eval/verify.py` does; raise `PublishError` if it does not match."""
    settings = verify.Settings(data_dir, False, "cpu", 256, "expected")
    result = verify.verify(checkpoint, settings)
    if result.status == "match":
        return
    needed = "data" if result.status == "skipped" else "verify"
    reasons = one_line("; ".join(result.reasons))
    if needed not in waived:
        raise hub.PublishError(
            f"{checkpoint.name} is not verified: {result.status}: {reasons}. "
            f"Use --waive {needed} to publish it nevertheless."
        )
    print(f"{checkpoint.name}: not verified ({result.status}: {reasons}), waived")


def show_changes(checkpoint: Checkpoint, api: HfApi) -> None:
    """Print what a push would change."""
    files = hub.contents(checkpoint)
    repository = f"{manifest.namespace()}/{checkpoint.name}"
    try:
        head, names = hub.changed(api, repository, files)
    except Exception as error:
        reason = hub.describe(error, repository, api)
        raise hub.PublishError(f"{checkpoint.name}: {reason}") from error
    changes = ", ".join(f"{name} ({len(files[name]):,} bytes)" for name in sorted(names))
    new = "" if head else ", to be created"
    print(f"{repository}{new}: {changes or 'nothing has changed'}")


@app.command(epilog="Exit status: 0 if all are published; 2 for bad usage, or if one is not.")
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="architecture.tag")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All bundles of this clone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, print the changes, write nothing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make new repositories private.")
    ] = False,
    tag: Annotated[list[str] | None, typer.Option(help="Tag the commit; may be repeated.")] = None,
    waive: Annotated[
        list[Waivable] | None,
        typer.Option(help="Publish although its images are missing (data) or differ (verify)."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="As for eval/verify.py.")] = None,
) -> int:
    """Publish bundles on the Hugging Face Hub that match in `eval/verify.py`."""
    if bool(names) == everything:
        raise UsageError("give names, or --all")
    selected = [find_checkpoint(name) for name in names or []]
    if everything:
        selected = [entry for entry in manifest.load().values() if entry.bundle and entry.file]
    api, failed = HfApi(), 0
    for checkpoint in selected:
        try:
            hub.contents(checkpoint)  # a broken bundle is refused without an evaluation
            require_match(checkpoint, data_dir, {waived.value for waived in waive or []})
            if dry_run:
                show_changes(checkpoint, api)
            else:
                print(f"{checkpoint.name}: {hub.publish(checkpoint, api, private, tag or ()).id}")
        except hub.PublishError as error:
            failed += 1
            print(f"push_to_hub.py: {one_line(error)}", file=sys.stderr)
    return 2 if failed else 0
