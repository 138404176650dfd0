"""Code in a process of its own."""

import os
import subprocess
import sys


def run(code, **environment):
    """The last line that a new process prints."""
    command = [sys.executable, "-c", "import torch\n" + code]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")[-1]
