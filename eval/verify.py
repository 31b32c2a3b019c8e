"""Recompute the reported accuracy of checkpoints; see `python eval/verify.py --help`."""

import sys

from kn_zoo import cli
from kn_zoo.evaluation.verify_command import app

if __name__ == "__main__":
    sys.exit(cli.run(app))
