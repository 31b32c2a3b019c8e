"""Train a network with differential privacy from a recipe with a `privacy` section.

- `python train_scripts/train_private.py train_scripts/recipes/private_small.yaml
  knpreactresnet20_cifar.cifar10_dp8`

The noise follows from the recipe's epsilon and delta. The run folder runs/NAME/ contains the
training state, which stays on this machine, train_log.csv and, at the end, bundle/, which states
the guarantee. Requires `pip install -e '.[privacy]'`.

Rerun the same command to resume an interrupted run. Sampling and noise have no seed, so no two runs
are equal. Ctrl-C and SIGTERM stop the run after the current step.

Exit status: 0 success; 2 invalid input or no disk space; 75 --minutes reached; 130 Ctrl-C.
"""

import sys
from pathlib import Path

from kn_zoo.training import command as options
from kn_zoo.training.data import DataConfig
from kn_zoo.training.recipe import Recipe, UserError
from kn_zoo.training.trainer import RunConfig

app = options.create_app()


@app.command(help=__doc__)
def main(
    path: options.RecipePath,
    variant: options.Variant = None,
    output: options.Output = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    epochs: options.Epochs = None,
    minutes: options.Minutes = float("inf"),
    save_minutes: options.SaveMinutes = 10.0,
    in_package: options.InPackage = False,
) -> int:
    def train() -> None:
        try:
            from kn_zoo.training.private import train_private
        except ModuleNotFoundError as error:
            raise UserError(f"{error}: pip install 'kn_zoo[privacy]'") from None
        recipe = Recipe.read(path, variant).override(epochs)
        folder, data_config = output or Path("runs") / recipe.name, DataConfig(data_dir, download)
        run_config = RunConfig(save_minutes=save_minutes, minutes=minutes)
        train_private(recipe, path, folder, data_config, run_config, in_package)

    return options.exit_status(train)


if __name__ == "__main__":
    sys.exit(options.run(app))
