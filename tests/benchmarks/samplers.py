"""Samplers compared: ``python -m tests.benchmarks.samplers`` prints a table for each model.

Each run has a process of its own, which compiles without caches on disk, tunes and draws. Seconds
are those of the processor, in all threads: other programs on the machine change these little.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import arviz as az

from tests import small_model
from tests.benchmarks import missing
from tests.benchmarks.non_centred import extreme
from tests.samplers import SAMPLERS, sample

ROOT = Path(__file__).parents[2]
COLUMNS = ["sampler", "s in all", "least ESS", "ESS/s", "gradients", "divergences"]


def middle():
    y = missing.data("smooth", "cells", 0)
    return missing.model("smooth", y, marginalize_missing=False)


MODELS = {"small": small_model.build, "middle": middle}


def measure(name, sampler):
    """Return what a run takes and gives."""
    model = MODELS[name]()
    start = time.process_time()
    idata = sample(model, sampler)
    seconds = time.process_time() - start
    parameters = idata["posterior"].to_dataset()[[rv.name for rv in model.free_RVs]]
    return {
        "seconds": seconds,
        "ess": extreme(az.ess(parameters), min),
        "gradients": int(idata["sample_stats"]["n_steps"].sum()),
        "divergences": int(idata["sample_stats"]["diverging"].sum()),
    }


def row(name, sampler):
    """Measure in a process of its own."""
    flags = ",".join(filter(None, [os.environ.get("PYTENSOR_FLAGS"), "numba__cache=False"]))
    environment = os.environ | {"PYTENSOR_FLAGS": flags, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.samplers", name, sampler]
    output = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ).stdout
    run = json.loads(output.splitlines()[-1])
    cells = [
        sampler,
        f"{run['seconds']:.0f}",
        f"{run['ess']:,.0f}",
        f"{run['ess'] / run['seconds']:.0f}",
        f"{run['gradients']:,}",
        f"{run['divergences']}",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    for name in MODELS:
        print(f"\n{name}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        for sampler in SAMPLERS:
            print(row(name, sampler), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(*sys.argv[1:])))
