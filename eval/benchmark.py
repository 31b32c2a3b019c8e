"""Measure the cost of kernel normalization; see `python eval/benchmark.py --help`."""

import sys

from kn_zoo import cli
from kn_zoo.evaluation.benchmark_command import app

if __name__ == "__main__":
    sys.exit(cli.run(app))
