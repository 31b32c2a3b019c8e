"""Record the first losses of every recipe; see `python train_scripts/fingerprint.py --help`."""

import sys

from kn_zoo import cli
from kn_zoo.training.fingerprint import app

if __name__ == "__main__":
    sys.exit(cli.run(app))
