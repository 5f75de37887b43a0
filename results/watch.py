"""CPU time of a run, beside its steps: for "return over minutes" in results/README.md.

    python results/watch.py PID LOG OUT

Every ten seconds, until the process PID ends, OUT gets a JSON line: the CPU seconds that it has
used so far, and the last step in LOG, its metrics.jsonl or the authors' scores.jsonl. CPU time, not
time on the clock: other work on the machine changes it less. Linux only.
"""

import json
import os
import sys
import time
from pathlib import Path


def main():
    """The command line."""
    stat, log, out = Path(f"/proc/{sys.argv[1]}/stat"), *map(Path, sys.argv[2:])
    while stat.exists():
        user, system = map(int, stat.read_text().rpartition(")")[2].split()[11:13])
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        lines = whole.splitlines()
        step = json.loads(lines[-1])["step"] if lines else 0
        with open(out, "a") as file:
            seconds = (user + system) / os.sysconf("SC_CLK_TCK")
            file.write(json.dumps({"cpu": seconds, "step": step}) + "\n")
        time.sleep(10)


if __name__ == "__main__":
    main()
