"""Missing cells that are integrated out, given the observed ones and draws of the parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pymc.backends.arviz import coords_and_dims_for_inferencedata
from pymc.model.core import Model, modelcontext
from pymc.pytensorf import resolve_backend_compile_kwargs
from pymc.util import RandomState
from pytensor import tensor as pt
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant
from pytensor.tensor.variable import TensorVariable
from pytensor.xtensor.type import XTensorVariable
from xarray import DataArray, Dataset, DataTree, merge

from pymc_kron.likelihoods import Likelihood, Likelihoods, compute_for_draws
from pymc_kron.missing import Cells
from pymc_kron.structure import evaluated

__all__ = ["predict_missing"]


def predict_missing(
    idata: DataTree,
    model: Model | None = None,
    *,
    var_names: Sequence[str] | None = None,
    sample_dims: Sequence[str] = ("chain", "draw"),
    random_seed: RandomState = None,
    progressbar: bool = True,
    backend: str | None = None,
    compile_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    r"""
    Predict the missing cells of grids that were integrated out while sampling.

    For each draw of the parameters :math:`\theta`, the missing cells given the observed ones are
    normal, :math:`x_m \mid x_o, \theta \sim \mathcal{N}(\mu_m - P_{mm}^{-1} P_{mo} (x_o -
    \mu_o), P_{mm}^{-1})` with the precision matrix :math:`P` of all cells (Rue and Held (2005),
    theorem 2.5). With noise, a prediction is one of an observation and has noise too, as a cell
    that PyMC imputes.

    Parameters
    ----------
    idata : DataTree
        With a posterior group.
    model : Model, optional
        Not needed in a ``with model:`` block.
    var_names : sequence of str, optional
        The variables to predict. By default all with ``marginalize_missing=True`` and missing
        cells.
    sample_dims : sequence of str, default ("chain", "draw")
        The dimensions of the draws in the posterior group.
    random_seed : int, sequence of int, Generator, optional
        The seed of the draws.
    progressbar : bool, default True
        Whether to show a progress bar over the draws.
    backend : str, optional
        The backend to compile for, for example ``"numba"`` or ``"jax"``.
    compile_kwargs : dict, optional
        As for :func:`pymc.compute_log_likelihood`.

    Returns
    -------
    Dataset
        For each variable ``y``:

        - ``y_mean`` and ``y_sd``, with the dims of ``y``: posterior mean and standard deviation,
          from the moments of each draw rather than from random numbers; the observed value and
          zero where a cell is observed.
        - ``y_unobserved``, of shape ``(chain, draw, M)``: a draw of the missing cells together for
          each draw of the parameters. The coordinates ``y_unobserved_<dim>`` say where each of
          them is.

    Raises
    ------
    ValueError
        If a variable isn't an observed one with ``marginalize_missing=True`` and missing cells,
        or there is none.

    See Also
    --------
    KroneckerMvNormal : Integrates missing cells out.
    pymc.sample_posterior_predictive : New grids, rather than the missing cells of this one.

    References
    ----------
    .. [1] Rue, H. and Held, L. (2005). "Gaussian Markov random fields: theory and applications".
       Chapman & Hall/CRC.

    Examples
    --------
    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc_kron as pk

        lag = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
        y = np.random.default_rng(1).normal(size=(3, 6))
        y[1, 2:5] = np.nan
        coords = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(6)}
        with pm.Model(coords=coords) as model:
            sigma = pm.HalfNormal("sigma")
            pk.TensorNormal(
                "y",
                covs=[0.5 * np.eye(3) + 0.5, 0.8**lag],
                sigma=sigma,
                dims=("station", "day"),
                observed=y,
                marginalize_missing=True,
            )
            # In place of pm.sample(), which takes longer
            idata = pm.sample_prior_predictive(200, random_seed=1)
        idata["posterior"] = idata["prior"]

        missing = pk.predict_missing(idata, model, random_seed=1, progressbar=False)
        missing["y_mean"].sel(station="Dublin").values
    """
    compile_kwargs = resolve_backend_compile_kwargs(backend, compile_kwargs)
    model = modelcontext(model)
    likelihoods = Likelihoods.of(model, var_names)
    grids = {n: grid for n, grid in likelihoods.grids.items() if grid.is_missing is not None}
    _check_grids(grids, likelihoods, var_names)

    data = {name: _grid_of(name, grid, model) for name, grid in grids.items()}
    outputs, dims = {}, {}
    for name, grid in grids.items():
        cells = np.nonzero(np.isnan(data[name].values))
        for kind, values in _predictions_of(grid).items():
            outputs[f"{name}_{kind}"] = _arranged(grid, values)[cells]
            dims[f"{name}_{kind}"] = [f"{name}_unobserved_dim_0"]
    draws = compute_for_draws(
        outputs,
        idata,
        likelihoods.model,
        sample_dims=sample_dims,
        progressbar=progressbar,
        dims=dims,
        random_seed=random_seed,
        **compile_kwargs,
    )
    return merge([_summary(name, grid, draws, sample_dims) for name, grid in data.items()])


def _check_grids(
    grids: Mapping[str, Likelihood], likelihoods: Likelihoods, var_names: Sequence[str] | None
) -> None:
    """Check that there are grids to predict, or that all are that were asked for."""
    if grids and (var_names is None or len(grids) == len(var_names)):
        return
    if likelihoods.imputed:
        [name, *_] = likelihoods.imputed
        raise ValueError(
            f"The missing cells of {name} are parameters, which are sampled: they are in the "
            f"posterior group as {name.removesuffix('_observed')}_unobserved. With "
            "marginalize_missing=True they are integrated out, and predicted here."
        )
    others = [name for name in (*likelihoods.grids, *likelihoods.others) if name not in grids]
    raise ValueError(
        "There is nothing to predict without a KroneckerMvNormal or TensorNormal that has "
        "marginalize_missing=True and missing cells, NaN or masked in observed, got "
        f"{'observed variables' if var_names is None else 'var_names'} {others or 'none'}."
    )


def _predictions_of(grid: Likelihood) -> dict[str, TensorVariable]:
    """Return moments and a draw of the missing cells, ``(..., N)``, with zeros elsewhere."""
    regression = Cells.of(pt.constant(grid.is_missing)).regression(grid.covariance)
    missing = regression.cells.missing
    x = pt.switch(pt.isnan(grid.value), 0, grid.value - grid.mu)
    mu = grid.mu[..., missing]
    mean = mu + regression.mean(x)
    rng, shape = pt.random.shared_rng(seed=None), (*tuple(mean.shape)[:-1], x.shape[-1])
    _, z = pt.random.normal(size=shape, rng=rng, return_next_rng=True)
    predictions = {
        "mean": mean,
        "variance": pt.broadcast_to(regression.variance(), mean.shape),
        "unobserved": mu + regression.draw(x, z),
    }
    zeros = pt.zeros(z.shape, dtype=mean.type.dtype)
    return {
        kind: pt.set_subtensor(zeros[..., missing], values) for kind, values in predictions.items()
    }


def _arranged(grid: Likelihood, cells: TensorVariable) -> TensorVariable:
    arranged = grid.arrange(cells)
    return arranged.values if isinstance(arranged, XTensorVariable) else arranged


def _grid_of(name: str, grid: Likelihood, model: Model) -> DataArray:
    """Return the data, with dims and coords."""
    coords, model_dims = coords_and_dims_for_inferencedata(model)
    data = evaluated(_arranged(grid, grid.value), Constant, SharedVariable)
    assert data is not None
    dims = model_dims.get(name, [f"{name}_dim_{axis}" for axis in range(data.ndim)])
    return DataArray(data, {dim: coords[dim] for dim in dims if dim in coords}, dims)


def _summary(name: str, data: DataArray, draws: Dataset, sample_dims: Sequence[str]) -> Dataset:
    """Return posterior moments as grids, and the draws with the coordinates of each cell."""
    is_missing = np.isnan(data.values)
    cells = np.nonzero(is_missing)
    means, variances = draws[f"{name}_mean"], draws[f"{name}_variance"]
    mean, sd = data.copy(), data.copy(data=np.zeros(data.shape))
    mean.values[cells] = means.mean(sample_dims)
    # The law of total variance
    sd.values[cells] = np.sqrt(variances.mean(sample_dims) + means.var(sample_dims))
    unobserved = draws[f"{name}_unobserved"]
    where = {
        f"{name}_unobserved_{dim}": (f"{name}_unobserved_dim_0", data[dim].values[index])
        for dim, index in zip(data.dims, cells, strict=True)
    }
    return Dataset(
        {f"{name}_mean": mean, f"{name}_sd": sd, f"{name}_unobserved": unobserved}
    ).assign_coords(where)
