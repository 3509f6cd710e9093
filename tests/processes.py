"""Sample the small model in two processes: ``python -m tests.processes START_METHOD MODE OUTPUT``.

A program of its own, as one that users start: a process that has used JAX must not fork.
"""

import sys
from pathlib import Path

import pymc as pm

from tests.helpers import PY
from tests.small_model import build

MODES = {"PY": PY, "NUMBA": "NUMBA", "JAX": "JAX"}


def main():
    _, start_method, mode, output = sys.argv
    with build():
        idata = pm.sample(
            200,
            tune=200,
            chains=2,
            cores=2,
            mp_ctx=start_method,
            compile_kwargs={"mode": MODES[mode]},
            nuts_sampler="pymc",
            random_seed=1,
            progressbar=False,
        )
    idata["posterior"].to_dataset().to_netcdf(Path(output), engine="h5netcdf")


if __name__ == "__main__":
    main()
