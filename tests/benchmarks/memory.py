"""Peak memory of one log-density with its gradient: ``python -m ... [NOISY N] OUTPUT``.

Each call is in a fresh process: what the function allocates beyond what the process holds after
compilation and a first call on a small grid.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import measure
from tests.benchmarks.distributions import DISTRIBUTIONS, PACKAGES, compile_work

SIZES = [10, 20, 50, 100]


def resident(field: str) -> int:
    """Return the resident bytes of this process, VmRSS, or their peak, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def peak_of_a_call(noisy: bool, n: int) -> int:
    work = measure.Work(noisy, with_gradient=True)
    values = measure.arguments(work, (n, n, n))
    function = compile_work(work, DISTRIBUTIONS["KroneckerMvNormal"], *values, static=False)

    def call(covs, sigma, mu, x):
        function(*covs, *([] if sigma is None else [sigma]), mu, x)

    call(*measure.arguments(work, (2, 3, 4)))
    # Starts the peak anew
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call(*values)
    return resident("VmHWM") - before


def measure_grid(noisy: bool, n: int) -> dict:
    command = [sys.executable, "-m", __spec__.name, str(int(noisy)), str(n)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = json.loads(run.stdout.splitlines()[-1])
    return {"noisy": noisy, "sizes": (n, n, n), "arrays": peak / (8 * n**3)}


if __name__ == "__main__":
    match sys.argv[1:]:
        case noisy, n:
            print(peak_of_a_call(bool(int(noisy)), int(n)))
        case [output]:
            results = [measure_grid(noisy, n) for noisy in (False, True) for n in SIZES]
            measure.save(Path(output), results, PACKAGES)
