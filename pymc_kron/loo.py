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

from pymc.backends.arviz import apply_function_over_dataset, coords_and_dims_for_inferencedata
from pymc.dims.distributions.core import MeasurableXTensorFromTensor
from pymc.distributions.distribution import PartialObservedRV
from pymc.logprob.rewriting import construct_ir_fgraph
from pymc.model.core import Model, modelcontext
from pymc.model.transform.conditioning import remove_value_transforms
from pymc.pytensorf import resolve_backend_compile_kwargs
from pytensor import tensor as pt
from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.variable import TensorVariable
from pytensor.xtensor import as_xtensor
from pytensor.xtensor.type import XTensorVariable
from xarray import Dataset, DataTree

from pymc_kron.covariances import Covariance
from pymc_kron.distributions.grid_rv import GridMvNormalRV, raveled

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
    model = modelcontext(model)
    compile_kwargs = resolve_backend_compile_kwargs(backend, compile_kwargs)
    names = _names_of(model, var_names)
    # The posterior has the values that aren't transformed
    model = remove_value_transforms(model)
    densities = _leave_one_out_of(model, names, are_chosen=var_names is not None)

    used = set(ancestors(densities.values()))
    inputs = [value for value in model.value_vars if value in used]
    function = model.compile_fn(
        inputs=inputs, outs=list(densities.values()), on_unused_input="ignore", **compile_kwargs
    )
    posterior = idata["posterior"]
    if isinstance(posterior, DataTree):
        posterior = posterior.to_dataset()
    dtypes = {model.values_to_rvs[value].name: value.type.dtype for value in inputs}
    points = posterior[list(dtypes)].astype(dtypes, copy=False)
    coords, dims = coords_and_dims_for_inferencedata(model)
    dataset = apply_function_over_dataset(
        function,
        points,
        output_var_names=list(densities),
        sample_dims=sample_dims,
        dims=dims,
        coords=coords,
        progressbar=progressbar,
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


def _names_of(model: Model, var_names: Sequence[str] | None) -> list[str]:
    """Return the names of observed variables, after checking that they are."""
    observed = [rv.name for rv in model.observed_RVs]
    unknown = [name for name in var_names or () if name not in observed]
    if unknown:
        raise ValueError(
            f"var_names must name observed variables of the model, which are {observed}, got "
            f"{unknown}."
        )
    return observed if var_names is None else list(var_names)


def _leave_one_out_of(
    model: Model, names: Sequence[str], *, are_chosen: bool
) -> dict[str, TensorVariable | XTensorVariable]:
    """Return the log-densities of the cells of each likelihood, given values of the parameters.

    PyMC's intermediate representation of the model has the random variables that its log-density
    is computed from, after the rewrites of `pymc_kron.logprob`.

    Parameters
    ----------
    model
        A model without transforms.
    names
        The names of observed variables.
    are_chosen
        Whether they all have to have a Kronecker covariance, rather than one of them.
    """
    fgraph = construct_ir_fgraph(model.rvs_to_values)
    valued = dict(zip((rv.name for rv in model.rvs_to_values), fgraph.outputs, strict=True))
    densities, others = {}, []
    for name in names:
        rv, value = valued[name].owner.inputs
        density = _density_of(name, rv, value)
        if density is None:
            others.append(f"{name} ({_kind_of(rv)})")
        else:
            densities[name] = density
    if not densities or (others and are_chosen):
        raise ValueError(
            "Leaving one cell out needs an observed KroneckerMvNormal or TensorNormal, or a "
            "pm.MvNormal whose covariance is written with pt.linalg.kron, got "
            f"{'var_names' if are_chosen else 'observed variables'} {', '.join(others) or 'none'}. "
            "pm.compute_log_likelihood is for other likelihoods; pymc_kron.explain(model) says why "
            "a covariance isn't seen to be a Kronecker product."
        )
    values = {output: output.owner.inputs[1] for output in fgraph.outputs}
    return dict(zip(densities, clone_replace(list(densities.values()), values), strict=True))


def _density_of(
    name: str, rv: Variable, value: Variable
) -> TensorVariable | XTensorVariable | None:
    """Return the log-densities of the cells, or None if there is no Kronecker covariance."""
    node = rv.owner
    match node.op:
        case GridMvNormalRV():
            _rng, _size, mu, *parts = node.inputs
            event_ndim = node.op.ndim_supp
            covariance = node.op.covariance(*parts)
            density = leave_one_out(covariance, raveled(value - mu, event_ndim))
            if event_ndim == 1:
                return density
            return density.reshape((*tuple(density.shape)[:-1], *covariance.sizes))
        case MeasurableXTensorFromTensor(dims=dims):
            [tensor] = node.inputs
            if isinstance(tensor.owner.op, DimShuffle):
                order = tensor.owner.op.new_order
                [tensor] = tensor.owner.inputs
            else:
                order = range(len(dims))
            tensor_dims = [dim for _, dim in sorted(zip(order, dims, strict=True))]
            density = _density_of(name, tensor, value.transpose(*tensor_dims).values)
            if density is None:
                return None
            return as_xtensor(density, dims=tensor_dims).transpose(*dims)
        case PartialObservedRV() if isinstance(node.inputs[0].owner.op, GridMvNormalRV):
            raise ValueError(
                f"{name} has missing cells, which PyMC imputes, so that the others aren't observed "
                "alone. Leave out the levels of an axis that have missing cells, or name the other "
                "likelihoods in var_names."
            )
    return None


def _kind_of(rv: Variable) -> str:
    return getattr(rv.owner.op, "_print_name", (type(rv.owner.op).__name__,))[0]
