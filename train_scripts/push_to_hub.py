"""Publish checkpoints on the Hub; see `python train_scripts/push_to_hub.py --help`."""

import sys

from kn_zoo import cli
from kn_zoo.publish import app

if __name__ == "__main__":
    sys.exit(cli.run(app))
