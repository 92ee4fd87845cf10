"""Run `python scripts/benchmark.py --help`; the installed program is `qat-benchmark`."""

import pathlib
import sys

# Runs from a checkout, installed or not.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from qat.programs.benchmark import run  # noqa: E402

if __name__ == "__main__":
    run()
