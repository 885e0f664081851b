"""What `import normfast` adds to `import numpy`: medians over fresh interpreters, of the clock and of the CPU's time.

python -m benchmarks.import_time [interpreters]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
from time import perf_counter, process_time
import numpy
clock, cpu = perf_counter(), process_time()
import normfast
print(perf_counter() - clock, process_time() - cpu)
"""


def main(count: int = 30) -> None:
    # The first finds nothing in the caches of the file system.
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True) for _ in range(1 + count)][1:]
    clock, cpu = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    for name, times in ("clock", clock), ("CPU", cpu):
        least, median, most = (1e3 * value for value in (min(times), statistics.median(times), max(times)))
        print(f"{name:<5} {median:5.1f} ms, {least:.1f} to {most:.1f} over {count} interpreters")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
