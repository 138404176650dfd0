"""`python -m diffusers_terdit` is `terdit`."""

import sys

from .cli import main, run_program


if __name__ == "__main__":
    sys.exit(run_program("terdit", main))
