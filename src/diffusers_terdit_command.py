"""Entry point of `terdit`, outside the package: Ctrl-C is one line from the start, also while the package imports."""

import os
import signal


def main() -> int:
    """Import the command, and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background of a script
        signal.signal(signal.SIGINT, lambda *_: os.write(2, b"terdit: interrupted\n") and os._exit(130))
    from diffusers_terdit.cli import main, run_program

    return run_program("terdit", main)
