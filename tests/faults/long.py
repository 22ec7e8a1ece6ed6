"""Everything at length: 100 kills inside saves and 100 anywhere, the whole matrix, 1000 damages, 50 faults of ranks.

python tests/faults/long.py [kills|matrix|damage|ranks ...]        # what `make faults` runs
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {"kills": "100", "matrix": "", "damage": "1000", "ranks": "10"}  # and how often


def main(names: list[str]) -> int:
    if wrong := [name for name in names if name not in PARTS]:
        print(f"Unknown part {wrong[0]!r}; available: {', '.join(PARTS)}.")
        return 2
    failed = []
    for name in names or PARTS:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *PARTS[name].split()]
        failed += [name] if subprocess.run(command).returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "every fault was survived")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
