"""Samplers, against the exact posterior of a small model."""

import arviz as az
import pytest
import xarray as xr

from tests.helpers import run_python
from tests.samplers import SAMPLERS, sample
from tests.small_model import assert_exact, build, log_parameters

# nutpie runs in test_models.py, on a model without noise
BY_DEFAULT = [("TensorNormal", "numpyro")]


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


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("start_method", "mode"),
    [
        ("fork", "PY"),
        ("spawn", "PY"),
        ("forkserver", "PY"),
        ("fork", "NUMBA"),
        ("spawn", "NUMBA"),
        ("forkserver", "NUMBA"),
        ("spawn", "JAX"),
        ("forkserver", "JAX"),
    ],
)
def test_processes(start_method, mode, tmp_path):
    output = tmp_path / "posterior.nc"
    run_python("-m", "tests.processes", start_method, mode, str(output))
    with xr.open_dataset(output, engine="h5netcdf") as posterior:
        assert_exact(xr.DataTree.from_dict({"posterior": posterior.load()}))
