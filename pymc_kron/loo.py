"""Leave-one-out cross-validation of a Kronecker likelihood, cell by cell.

With ``P = inv(K)`` and ``g = P (y - mu)``, each cell given all others is normal, with variance
``1 / P_ii`` and mean ``y_i - g_i / P_ii``::

    log p(y_i | y_-i) = -1/2 log(2 pi) + 1/2 log P_ii - 1/2 g_i^2 / P_ii

(Sundararajan, S. and Keerthi, S. S. (2001), "Predictive approaches for choosing hyperparameters in
Gaussian processes", Neural Computation 13, 1103-1118.)
"""

import math
from collections.abc import Sequence
from typing import Any

from pymc.model.core import Model, modelcontext
from pymc.pytensorf import resolve_backend_compile_kwargs
from pytensor import tensor as pt
from pytensor.tensor.variable import TensorVariable
from xarray import Dataset, DataTree

from pymc_kron.covariances import Covariance
from pymc_kron.likelihoods import Likelihoods, compute_for_draws

__all__ = ["loo_pointwise"]


def loo_pointwise(
    idata: DataTree,
    model: Model | None = None,
    *,
    var_names: Sequence[str] | None = None,
    extend_inferencedata: bool = True,
    sample_dims: Sequence[str] = ("chain", "draw"),
    progressbar: bool = True,
    backend: str | None = None,
    compile_kwargs: dict[str, Any] | None = None,
) -> DataTree | Dataset:
    r"""
    Compute the log-density of each cell given all others, for leave-one-out cross-validation.

    A grid with a Kronecker covariance is one observation of a multivariate distribution, so that
    :func:`pymc.compute_log_likelihood` gives one number a draw, and :func:`arviz.loo` has nothing
    to leave out. What it needs instead is :math:`\log p(y_i \mid y_{-i}, \theta)` of each cell,
    which the diagonal of the precision matrix gives (Bürkner, Gabry and Vehtari (2021)): here
    factorwise, in as many operations as a log-density.

    Parameters
    ----------
    idata : DataTree
        With a posterior group.
    model : Model, optional
        Not needed in a ``with model:`` block.
    var_names : sequence of str, optional
        The likelihoods to compute. By default all `KroneckerMvNormal`, `TensorNormal`,
        `pymc_kron.dims.KroneckerMvNormal`, and `pymc.MvNormal` whose covariance is seen to be a
        Kronecker product, that are observed.
    extend_inferencedata : bool, default True
        Whether to extend `idata` or return a new dataset.
    sample_dims : sequence of str, default ("chain", "draw")
        The dimensions of the draws in the posterior group.
    progressbar : bool, default True
        Whether to show a progress bar over the draws.
    backend : str, optional
        The backend to compile for, for example ``"numba"`` or ``"jax"``.
    compile_kwargs : dict, optional
        As for :func:`pymc.compute_log_likelihood`.

    Returns
    -------
    DataTree or Dataset
        `idata`, with the values in its log_likelihood group, beside other likelihoods that are
        there; or a dataset of the values alone. They have the shape and dims of the likelihood,
        one for each cell of each grid of a batch.

    Raises
    ------
    ValueError
        If a variable isn't an observed one with a Kronecker covariance, there is none, or it has
        missing cells, which PyMC imputes.

    See Also
    --------
    arviz.loo, arviz.compare : What reads the result.
    pymc.compute_log_likelihood : Other likelihoods of the same model.

    References
    ----------
    .. [1] Bürkner, P.-C., Gabry, J. and Vehtari, A. (2021). "Efficient leave-one-out
       cross-validation for Bayesian non-factorized normal and Student-t models". Computational
       Statistics 36, 1243-1261.

    Examples
    --------
    .. code-block:: python

        import arviz as az
        import numpy as np
        import pymc as pm
        import pymc_kron as pk

        lag = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
        y = np.random.default_rng(1).normal(size=(3, 6))
        coords = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(6)}
        with pm.Model(coords=coords) as model:
            sigma = pm.HalfNormal("sigma")
            K_station = 0.5 * np.eye(3) + 0.5
            pk.TensorNormal(
                "y",
                covs=[K_station, 0.8**lag],
                sigma=sigma,
                dims=("station", "day"),
                observed=y,
            )
            # In place of pm.sample(), which takes longer
            idata = pm.sample_prior_predictive(200, random_seed=1)
        idata["posterior"] = idata["prior"]

        pk.loo_pointwise(idata, model, progressbar=False)
        idata["log_likelihood"]["y"].sel(station="Dublin", day=2).shape
    """
    compile_kwargs = resolve_backend_compile_kwargs(backend, compile_kwargs)
    likelihoods = Likelihoods.of(modelcontext(model), var_names)
    _check_likelihoods(likelihoods, are_chosen=var_names is not None)
    densities = {
        name: grid.arrange(leave_one_out(grid.covariance, grid.value - grid.mu))
        for name, grid in likelihoods.grids.items()
    }
    dataset = compute_for_draws(
        densities,
        idata,
        likelihoods.model,
        sample_dims=sample_dims,
        progressbar=progressbar,
        **compile_kwargs,
    )
    if not extend_inferencedata:
        return dataset
    if "log_likelihood" in idata.children:
        others = idata["log_likelihood"].to_dataset().drop_vars(densities, errors="ignore")
        dataset = others.merge(dataset, join="exact")
    idata["log_likelihood"] = dataset
    return idata


def leave_one_out(covariance: Covariance, delta: TensorVariable) -> TensorVariable:
    """Return the log-density of each entry of a residual given all others: ``(N)->(N)``."""
    precision, solution = covariance.precision_diagonal(), covariance.solve(delta)
    return 0.5 * (pt.log(precision) - solution**2 / precision - math.log(2 * math.pi))


def _check_likelihoods(likelihoods: Likelihoods, *, are_chosen: bool) -> None:
    """Check that there are likelihoods with a Kronecker covariance, or that all are."""
    grids, others = likelihoods.grids, likelihoods.others
    if likelihoods.imputed:
        raise ValueError(
            f"{likelihoods.imputed[0]} has missing cells, which PyMC imputes, so that the others "
            "aren't observed alone. Leave out the levels of an axis that have missing cells, or "
            "name the other likelihoods in var_names."
        )
    for name, grid in grids.items():
        if grid.is_missing is not None:
            raise ValueError(
                f"{name} has missing cells, which are integrated out. Leave out the levels of an "
                "axis that have missing cells, or name the other likelihoods in var_names."
            )
    if not grids or (others and are_chosen):
        got = ", ".join(f"{name} ({kind})" for name, kind in others.items())
        raise ValueError(
            "Leaving one cell out needs an observed KroneckerMvNormal or TensorNormal, or a "
            "pm.MvNormal whose covariance is written with pt.linalg.kron, got "
            f"{'var_names' if are_chosen else 'observed variables'} {got or 'none'}. "
            "pm.compute_log_likelihood is for other likelihoods; pymc_kron.explain(model) says why "
            "a covariance isn't seen to be a Kronecker product."
        )
