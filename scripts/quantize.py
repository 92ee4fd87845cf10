"""Run `python scripts/quantize.py --help`; the installed program is `qat-quantize`."""

import pathlib
import sys

# Runs from a checkout, installed or not.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from qat.programs.quantize import run  # noqa: E402

if __name__ == "__main__":
    run()
