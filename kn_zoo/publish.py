"""Publish bundles on the Hugging Face Hub, each in a repository of its own, each verified before.

    hf auth login
    python train_scripts/push_to_hub.py knpreactresnet20_cifar.digits --dry-run
    python train_scripts/push_to_hub.py --all --tag v0.1.0

The repository is NAMESPACE/NAME, with the namespace of weights_manifest.json. Only what has changed
is uploaded, as one commit; its hash is written into the manifest, which is then to be committed.
"""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi

from kn_zoo import cli
from kn_zoo.checkpoints import hub, manifest
from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.evaluation import verify

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Waivable(str, Enum):
    data = "data"
    verify = "verify"


def check(weight: Checkpoint, data_dir: Path | None, waived: set[str]) -> None:
    """Evaluate a weight as `eval/verify.py` does; a PublishError says why it is not published."""
    settings = verify.Settings(data_dir, False, "cpu", 256, "expected")
    result = verify.verify(weight, settings)
    if result.status == "match":
        return
    needed = "data" if result.status == "skipped" else "verify"
    reasons = cli.one_line("; ".join(result.reasons))
    if needed not in waived:
        raise hub.PublishError(
            f"{weight.name} is not verified: {result.status}: {reasons}. "
            f"--waive {needed} publishes it all the same."
        )
    print(f"{weight.name}: not verified ({result.status}: {reasons}), which was waived")


def show(weight: Checkpoint, api: HfApi) -> None:
    """Print what a push would change."""
    files = hub.contents(weight)
    repository = f"{manifest.namespace()}/{weight.name}"
    try:
        head, names = hub.changed(api, repository, files)
    except Exception as error:
        raise hub.PublishError(f"{weight.name}: {hub.cure(error, repository, api)}") from error
    what = ", ".join(f"{name} ({len(files[name]):,} bytes)" for name in sorted(names))
    where = repository if head else f"{repository}, to be created"
    print(f"{where}: {what or 'nothing has changed'}")


@app.command(epilog="Exit status: 0 all are published; 2 bad usage, or one is not.")
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="architecture.tag")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All bundles of this checkout.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, tell what would change, write nothing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that is new a private one.")
    ] = False,
    tag: Annotated[list[str] | None, typer.Option(help="Name the commit; may be repeated.")] = None,
    waive: Annotated[
        list[Waivable] | None,
        typer.Option(help="Publish without its images (data), or though it differs (verify)."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="As eval/verify.py takes it.")] = None,
) -> int:
    """Publish bundles on the Hugging Face Hub, after `eval/verify.py` has found them to match."""
    if bool(names) == everything:
        raise cli.UsageError("give names, or --all")
    chosen = [cli.found_weight(name) for name in names or []]
    chosen = chosen or [weight for weight in manifest.load().values() if weight.bundle]
    api, failed = HfApi(), 0
    for weight in chosen:
        try:
            hub.contents(weight)  # what is broken needs no evaluation to be refused
            check(weight, data_dir, {waived.value for waived in waive or []})
            if dry_run:
                show(weight, api)
            else:
                print(f"{weight.name}: {hub.publish(weight, api, private, tag or ()).id}")
        except hub.PublishError as error:
            failed += 1
            print(f"push_to_hub.py: {cli.one_line(error)}", file=sys.stderr)
    return 2 if failed else 0
