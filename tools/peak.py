"""The peak resident set of a command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

# A process counts what it was forked from as its own peak, so a small one starts it, and not one that has torch in it.
_STARTER = """
import os, sys
_, status, used = os.wait4(os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


def peak_of(command: Sequence[object]) -> int:
    """Run it, its output unseen; KiB. Raises `CalledProcessError` if it fails."""
    starter = [sys.executable, "-S", "-c", _STARTER, *map(str, command)]
    done = subprocess.run(starter, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.splitlines()[-1])
