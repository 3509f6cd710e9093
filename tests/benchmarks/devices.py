"""Memory of one grid split over devices, as the compiler plans it: ``python -m ... OUTPUT``."""

import os
import sys
from pathlib import Path

import jax
import pymc as pm
import pytensor.tensor as pt

from pymc_kron import KroneckerMvNormal
from pymc_kron.sharding import sharded_logp
from tests.benchmarks import measure

SIZES = 100, 100, 100
DEVICES = [1, 2, 4]


def build(work):
    _, _, _, x = measure.arguments(work, SIZES)
    with pm.Model() as model:
        length_scale = pm.LogNormal("length_scale", shape=3)
        sigma = pm.HalfNormal("sigma") if work.noisy else None
        covs = [pt.exp(-measure.lags(n) / length_scale[i]) for i, n in enumerate(SIZES)]
        KroneckerMvNormal("y", pm.Normal("mu"), covs, sigma=sigma, observed=x)
    return model


def measure_devices(model, work, n_devices):
    logp, data = sharded_logp(model, jax.devices()[:n_devices])
    point = model.initial_point()
    program = jax.jit(jax.value_and_grad(logp)).lower(point, data).compile()
    jax.block_until_ready(program(point, data))
    return {
        "noisy": work.noisy,
        "sizes": SIZES,
        "devices": n_devices,
        "bytes": measure.bytes_held(program),
    }


if __name__ == "__main__":
    _, output = sys.argv
    # JAX reads it when it is first asked for devices
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    results = []
    for work in (measure.Work(False, True), measure.Work(True, True)):
        model = build(work)
        results += [measure_devices(model, work, n_devices) for n_devices in DEVICES]
    measure.save(Path(output), results, ["pymc", "pytensor", "jax"])
