"""Samplers compared: ``python -m tests.benchmarks.samplers [MODEL ...]`` prints a table of each.

Each run has a process of its own, without caches on disk. Seconds are those of the processor, in
all threads, which other programs on the machine change little. Compiling and tuning take what a
run of one draw takes; drawing, what a run of many takes more.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import arviz as az
import numpy as np

from tests import small_model
from tests.benchmarks import missing
from tests.benchmarks.non_centred import extreme
from tests.samplers import SAMPLERS, sample

ROOT = Path(__file__).parents[2]
FLAGS = "numba__cache=False"
DRAWS = 1000


def small():
    return small_model.build()


def middle():
    y = missing.data("smooth", "cells", 0)
    return missing.model("smooth", y, marginalize_missing=False)


MODELS = {"small": small, "middle": middle}


def measure(name, sampler, draws):
    """Return what a run takes and gives."""
    model = MODELS[name]()
    start = time.process_time()
    idata = sample(model, sampler, draws=draws)
    seconds = time.process_time() - start
    posterior = idata["posterior"].to_dataset()
    parameters = posterior[[rv.name for rv in model.free_RVs]]
    return {
        "seconds": seconds,
        "ess": extreme(az.ess(parameters), min) if draws > 1 else None,
        "gradients": int(np.sum(idata["sample_stats"]["n_steps"])),
        "divergences": int(idata["sample_stats"]["diverging"].sum()),
    }


def run(name, sampler, draws):
    """Measure in a process of its own."""
    flags = ",".join(filter(None, [os.environ.get("PYTENSOR_FLAGS"), FLAGS]))
    environment = os.environ | {"PYTENSOR_FLAGS": flags, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.samplers"]
    output = subprocess.run(
        [*command, "--one", name, sampler, str(draws)],
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
    ).stdout
    return json.loads(output.splitlines()[-1])


def row(name, sampler):
    start, whole = (run(name, sampler, draws) for draws in (1, DRAWS))
    drawing = whole["seconds"] - start["seconds"]
    cells = [
        sampler,
        f"{start['seconds']:.0f}",
        f"{drawing:.1f}",
        f"{whole['ess']:,.0f}",
        f"{whole['ess'] / drawing:,.0f}",
        f"{1e6 * drawing / whole['gradients']:,.0f}",
        str(whole["divergences"]),
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = [
    "sampler",
    "compiling and tuning, s",
    "drawing, s",
    "ESS",
    "ESS/s",
    "a gradient, us",
    "divergences",
]


def main(names):
    for name in names or MODELS:
        print(f"\n{name}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        for sampler in SAMPLERS:
            print(row(name, sampler), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", name, sampler, draws]:
            warnings.simplefilter("ignore")
            print(json.dumps(measure(name, sampler, int(draws))))
        case names:
            main(names)
