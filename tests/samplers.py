"""Samplers that `pymc.sample` knows, and the backends that they compile for."""

import pymc as pm

SAMPLERS = {
    "pymc, numba": ("pymc", {"backend": "numba"}),
    "pymc, JAX": ("pymc", {"backend": "jax"}),
    "nutpie, numba": ("nutpie", {"backend": "numba"}),
    "nutpie, JAX": ("nutpie", {"backend": "jax"}),
    "nutpie, gradient by JAX": (
        "nutpie",
        {"backend": "jax", "compile_kwargs": {"gradient_backend": "jax"}},
    ),
    # In parallel, chains need a device each; JAX has one, if it ran before PyMC asked for more
    "numpyro": ("numpyro", {"nuts": {"chain_method": "vectorized"}}),
    "blackjax": ("blackjax", {"nuts": {"chain_method": "vectorized"}}),
}


def sample(model, sampler, *, draws=1000, tune=500):
    """Sample two chains, in this process."""
    nuts_sampler, options = SAMPLERS[sampler]
    return pm.sample(
        draws,
        tune=tune,
        chains=2,
        cores=1,
        nuts_sampler=nuts_sampler,
        random_seed=1,
        progressbar=False,
        model=model,
        **options,
    )
