"""Samplers, against the exact posterior of a small model."""

import os
import subprocess
import sys
from pathlib import Path

import arviz as az
import pytest
import xarray as xr

from tests.samplers import SAMPLERS, sample
from tests.small_model import assert_exact, build, log_parameters

ROOT = Path(__file__).parents[1]

# Others run in test_models.py, on a model without noise
BY_DEFAULT = [("TensorNormal", "blackjax")]


def assert_converged(idata):
    assert az.rhat(log_parameters(idata)).to_array().max() < 1.02
    assert idata["sample_stats"]["diverging"].sum() < 10


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        pytest.param(
            kind, sampler, marks=() if (kind, sampler) in BY_DEFAULT else pytest.mark.nightly
        )
        for kind in ("TensorNormal", "MvNormal of kron")
        for sampler in SAMPLERS
    ],
)
def test_posterior(kind, sampler):
    idata = sample(build(kind), sampler)
    assert_converged(idata)
    assert_exact(idata)


@pytest.mark.parametrize(
    ("start_method", "mode"),
    [
        pytest.param("fork", "PY", marks=pytest.mark.nightly),
        pytest.param("spawn", "PY", marks=pytest.mark.nightly),
        pytest.param("forkserver", "PY", marks=pytest.mark.nightly),
        pytest.param("fork", "NUMBA", marks=pytest.mark.nightly),
        pytest.param("spawn", "NUMBA", marks=pytest.mark.nightly),
        pytest.param("forkserver", "NUMBA", marks=pytest.mark.nightly),
        pytest.param("spawn", "JAX", marks=pytest.mark.nightly),
        pytest.param("forkserver", "JAX", marks=pytest.mark.nightly),
    ],
)
def test_processes(start_method, mode, tmp_path):
    output = tmp_path / "posterior.nc"
    arguments = [start_method, mode, str(output)]
    warnings = ["-W", "error", "-W", "ignore:PyTensor could not link to a BLAS installation"]
    command = [sys.executable, *warnings, "-m", "tests.processes", *arguments]
    finished = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with xr.open_dataset(output, engine="h5netcdf") as posterior:
        assert_exact(xr.DataTree.from_dict({"posterior": posterior.load()}))
