"""The observed grids of a model, and what is computed from them for each draw of the parameters.

PyMC's intermediate representation of a model has the random variables that its log-density is
computed from, after the rewrites of `pymc_kron.logprob`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pymc.backends.arviz import apply_function_over_dataset, coords_and_dims_for_inferencedata
from pymc.dims.distributions.core import MeasurableXTensorFromTensor
from pymc.distributions.distribution import PartialObservedRV
from pymc.logprob.rewriting import construct_ir_fgraph
from pymc.model.core import Model
from pymc.model.transform.conditioning import remove_value_transforms
from pytensor import tensor as pt
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.variable import TensorVariable
from pytensor.xtensor import as_xtensor
from xarray import Dataset, DataTree

from pymc_kron.covariances import Covariance
from pymc_kron.distributions.arguments import event_of
from pymc_kron.distributions.grid_rv import GridMvNormalRV, raveled
from pymc_kron.structure import evaluated


@dataclass(frozen=True)
class Likelihood:
    """An observed grid.

    Attributes
    ----------
    covariance
        The covariance of all cells.
    mu
        Their mean, ``(..., N)``.
    value
        The data, ``(..., N)``.
    is_missing
        Which cells are missing and integrated out, ``(N,)``; None if none is.
    arrange
        The function that arranges something about each cell, ``(..., N)``, as the data are.
    """

    covariance: Covariance
    mu: TensorVariable
    value: TensorVariable
    is_missing: np.ndarray | None
    arrange: Callable[[TensorVariable], Variable]


@dataclass(frozen=True)
class Likelihoods:
    """The observed variables of a model, by name.

    Attributes
    ----------
    model
        The model without transforms: draws are of values that aren't transformed.
    grids
        Those with a Kronecker covariance.
    imputed
        Those of which PyMC imputes missing cells.
    others
        What the others are.
    """

    model: Model
    grids: Mapping[str, Likelihood]
    imputed: Sequence[str]
    others: Mapping[str, str]

    @classmethod
    def of(cls, model: Model, var_names: Sequence[str] | None) -> "Likelihoods":
        """Read observed variables, all or some of them.

        Parameters
        ----------
        model
            The model.
        var_names
            The names of observed variables, or None for all.

        Raises
        ------
        ValueError
            If a name isn't one of an observed variable.
        """
        observed = [rv.name for rv in model.observed_RVs]
        unknown = [name for name in var_names or () if name not in observed]
        if unknown:
            raise ValueError(
                f"var_names must name observed variables of the model, which are {observed}, got "
                f"{unknown}."
            )
        model = remove_value_transforms(model)
        valued = construct_ir_fgraph(model.rvs_to_values).outputs
        values = {output: output.owner.inputs[1] for output in valued}
        # The parameters are values from here on
        rvs = clone_replace([output.owner.inputs[0] for output in valued], values)
        names = [rv.name for rv in model.rvs_to_values]
        variables = dict(zip(names, zip(rvs, values.values(), strict=True), strict=True))

        grids, imputed, others = {}, [], {}
        for name in observed if var_names is None else var_names:
            rv, value = variables[name]
            op = rv.owner.op
            likelihood = _likelihood_of(rv, value)
            if likelihood is not None:
                grids[name] = likelihood
            elif isinstance(op, PartialObservedRV) and isinstance(
                rv.owner.inputs[0].owner.op, GridMvNormalRV
            ):
                imputed.append(name)
            else:
                others[name] = getattr(op, "_print_name", (type(op).__name__,))[0]
        return cls(model, grids, imputed, others)


def _likelihood_of(rv: Variable, value: Variable) -> Likelihood | None:
    node = rv.owner
    match node.op:
        case GridMvNormalRV(ndim_supp=event_ndim):
            _rng, _size, mu, *parts = node.inputs
            covariance = node.op.covariance(*parts)
            event = event_of(covariance.sizes, event_ndim)
            mu = pt.broadcast_to(mu, (*tuple(mu.shape)[:-event_ndim], *event))
            value = raveled(value, event_ndim)
            return Likelihood(
                covariance,
                raveled(mu, event_ndim),
                value,
                _missing_cells(value) if node.op.marginalize_missing else None,
                lambda cells: cells.reshape((*tuple(cells.shape)[:-1], *event)),
            )
        case MeasurableXTensorFromTensor(dims=dims):
            [tensor] = node.inputs
            if isinstance(tensor.owner.op, DimShuffle):
                order = tensor.owner.op.new_order
                [tensor] = tensor.owner.inputs
            else:
                order = range(len(dims))
            tensor_dims = [dim for _, dim in sorted(zip(order, dims, strict=True))]
            likelihood = _likelihood_of(tensor, value.transpose(*tensor_dims).values)
            if likelihood is None:
                return None

            def arrange(cells: TensorVariable) -> Variable:
                grid = likelihood.arrange(cells)
                return as_xtensor(grid, dims=tensor_dims).transpose(*dims)

            return replace(likelihood, arrange=arrange)
    return None


def _missing_cells(value: TensorVariable) -> np.ndarray | None:
    known = evaluated(pt.isnan(value), Constant, SharedVariable)
    if known is None or not known.any():
        return None
    return known[(0,) * (known.ndim - 1)]


def compute_for_draws(
    outputs: Mapping[str, Variable],
    idata: DataTree,
    model: Model,
    *,
    sample_dims: Sequence[str],
    progressbar: bool,
    dims: Mapping[str, Sequence[str]] | None = None,
    **compile_kwargs: Any,
) -> Dataset:
    """Compute something for each draw in the posterior group.

    Parameters
    ----------
    outputs
        What is computed from values of the free variables of the model, by name.
    idata, sample_dims, progressbar
        As of `pymc.compute_log_likelihood`.
    model
        A model without transforms.
    dims
        The dims of what doesn't have those of a variable of the model.
    **compile_kwargs
        As of `pymc.pytensorf.compile`.
    """
    used = set(ancestors(outputs.values()))
    inputs = [value for value in model.value_vars if value in used]
    function = model.compile_fn(
        inputs=inputs, outs=list(outputs.values()), on_unused_input="ignore", **compile_kwargs
    )
    posterior = idata["posterior"]
    if isinstance(posterior, DataTree):
        posterior = posterior.to_dataset()
    dtypes = {model.values_to_rvs[value].name: value.type.dtype for value in inputs}
    points = posterior[list(dtypes)].astype(dtypes, copy=False)
    coords, model_dims = coords_and_dims_for_inferencedata(model)
    return apply_function_over_dataset(
        function,
        points,
        output_var_names=list(outputs),
        sample_dims=sample_dims,
        dims={**model_dims, **(dims or {})},
        coords=coords,
        progressbar=progressbar,
    )
