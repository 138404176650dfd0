"""Code in a process of its own."""

import os
import subprocess
import sys


# The ops alone: the package's own `__init__` imports diffusers, which takes longer than most of these processes.
OPS_ALONE = """
import sys, torch, types
from importlib.util import find_spec

package = types.ModuleType("diffusers_terdit")
package.__path__ = list(find_spec("diffusers_terdit").submodule_search_locations)
sys.modules["diffusers_terdit"] = package
"""


def run(code, **environment):
    """The last line that a new process prints."""
    command = [sys.executable, "-c", OPS_ALONE + code]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")[-1]
