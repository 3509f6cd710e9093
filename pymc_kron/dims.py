"""Distributions for `pymc.dims`: every parameter carries the names of its dimensions.

Imported on its own, as `pymc.dims` is::

    import pymc.dims as pmd
    import pymc_kron.dims as pkd
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from pymc.dims.distributions.core import DimDistribution
from pymc.dims.distributions.transforms import DimTransform
from pymc.logprob.transforms import Transform
from pymc.util import UNSET
from pytensor import tensor as pt
from pytensor.graph.basic import Constant, Variable
from pytensor.tensor import TensorLike
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.variable import TensorVariable
from pytensor.xtensor import as_xtensor
from pytensor.xtensor.basic import XTensorFromTensor
from pytensor.xtensor.type import XTensorVariable
from xarray import DataArray

from pymc_kron.distributions.arguments import check_dims, check_missing, read_list
from pymc_kron.distributions.tensor_normal import TensorNormal
from pymc_kron.structure import current_length, evaluated
from pymc_kron.transforms import WhitenTransform, check_latent, whiten

__all__ = ["KroneckerMvNormal"]

type XTensorLike = XTensorVariable | DataArray | TensorLike

type Pair = tuple[str, str]


class KroneckerMvNormal(DimDistribution):
    """
    Normal distribution of a grid with named axes and a Kronecker-structured covariance.

    `pymc_kron.TensorNormal` for models with `pymc.dims`. The order of the axes of a parameter
    doesn't matter, since its dims say what they are; dims of no factor are a batch.

    Parameters
    ----------
    mu : xtensor_like of float, default 0
        Mean. It may have any of the dims of the grid.
    covs : sequence of xtensor_like of float, optional
        Covariance matrices of the factors, each with the two dims that `core_dims` names for it,
        or None where `chols`, `taus` or `evds` describes the factor.
    chols : sequence of xtensor_like of float, optional
        Cholesky factors of the covariance matrices, or None. The first core dim is that of the
        rows.
    taus : sequence of xtensor_like of float, optional
        Precision matrices, or None.
    evds : sequence of pairs of xtensor_like of float, optional
        Eigenvalues, with the second core dim, and eigenvectors, with both, the first one for the
        rows; or None.
    sigma : xtensor_like of float, optional
        Standard deviation of independent noise, a number or a batch.
    noise_covs : sequence of xtensor_like of float, optional
        For each factor, the covariance of the noise along its axis: a matrix with both core dims,
        the diagonal of one with the first, a number, or None for the identity.
    lower : bool, default True
        Whether the matrices in `chols` are the lower Cholesky factors.
    marginalize_missing : bool, default False
        Whether cells of ``observed`` that are NaN are integrated out. `pymc.dims` doesn't impute
        them.
    core_dims : sequence of pairs of str
        For each factor, the name of its axis in the grid and that of the other dim of the matrix:
        ``[("station", "other_station"), ("day", "other_day")]``.
    **kwargs
        As for any distribution of `pymc.dims`: ``dims``, ``observed`` and so on.

    Returns
    -------
    XTensorVariable
        The grid. Its dims are those of the batch and the first of each pair of `core_dims`, or in
        the order of ``dims``.

    Raises
    ------
    TypeError, ValueError
        As `pymc_kron.KroneckerMvNormal` does, and if `core_dims` isn't a pair of names for each
        factor, two factors have a dim in common, a parameter lacks a dim or has one of another
        factor, the size of a factor isn't that of the dim in the model, or cells are missing
        without `marginalize_missing`.

    Examples
    --------
    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc.dims as pmd
        import pymc_kron.dims as pkd
        from xarray import DataArray

        station, day = ["Malin Head", "Dublin", "Valentia"], np.arange(4)
        distance = DataArray(
            np.abs(np.subtract.outer([0.0, 1.0, 2.5], [0.0, 1.0, 2.5])),
            dims=("station", "other_station"),
        )
        lag = DataArray(np.abs(np.subtract.outer(day, day)), dims=("day", "other_day"))

        with pm.Model(coords={"station": station, "day": day}) as model:
            length_scale = pmd.HalfNormal("length_scale")
            pkd.KroneckerMvNormal(
                "y",
                covs=[pmd.math.exp(-pmd.as_xtensor(distance) / length_scale), 0.8**lag],
                core_dims=[("station", "other_station"), ("day", "other_day")],
            )
            prior = pm.sample_prior_predictive(10, random_seed=1)
        prior.prior["y"].sel(station="Dublin").sizes
    """

    def __new__(
        cls,
        name: str,
        *args: Any,
        core_dims: Sequence[Pair] | None = None,
        dims: Sequence[str | EllipsisType] | None = None,
        observed: Any = None,
        transform: Transform | None = UNSET,
        **kwargs: Any,
    ) -> XTensorVariable:
        """Create the variable in the model, in which the axes of the grid are dims."""
        if observed is not None:
            _check_observed(observed, core_dims, kwargs.get("marginalize_missing", False))
        if dims is None and observed is None:
            dims = (..., *(axis for axis, _ in _read_core_dims(core_dims)))
        if isinstance(transform, WhitenTransform):
            check_latent(observed)
            transform = DimWhitenTransform()
        return super().__new__(
            cls,
            name,
            *args,
            core_dims=core_dims,
            dims=dims,
            observed=observed,
            transform=transform,
            **kwargs,
        )

    @classmethod
    def dist(  # type: ignore[override]
        cls,
        mu: XTensorLike = 0,
        covs: Sequence[XTensorLike | None] | None = None,
        *,
        chols: Sequence[XTensorLike | None] | None = None,
        taus: Sequence[XTensorLike | None] | None = None,
        evds: Sequence[tuple[XTensorLike, XTensorLike] | None] | None = None,
        sigma: XTensorLike | None = None,
        noise_covs: Sequence[XTensorLike | None] | None = None,
        lower: bool = True,
        marginalize_missing: bool = False,
        core_dims: Sequence[Pair] | None = None,
        dim_lengths: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> XTensorVariable:
        pairs = _read_core_dims(core_dims)
        axes = tuple(axis for axis, _ in pairs)

        def matrix(i: int, name: str, entry: XTensorLike) -> _Parameter:
            return _Parameter.read(name, entry, pairs, required=pairs[i])

        def decomposition(i: int, name: str, entry: Any) -> Any:
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                # For the error
                return entry
            values, vectors = entry
            return (
                _Parameter.read(f"{name}[0]", values, pairs, required=pairs[i][1:]),
                _Parameter.read(f"{name}[1]", vectors, pairs, required=pairs[i]),
            )

        def noise(i: int, name: str, entry: XTensorLike) -> _Parameter:
            return _Parameter.read(name, entry, pairs, optional=pairs[i])

        mean = _Parameter.read("mu", mu, pairs, optional=axes)
        arguments: dict[str, Any] = {
            "covs": _per_factor("covs", covs, pairs, matrix),
            "chols": _per_factor("chols", chols, pairs, matrix),
            "taus": _per_factor("taus", taus, pairs, matrix),
            "evds": _per_factor("evds", evds, pairs, decomposition),
            "noise_covs": _per_factor("noise_covs", noise_covs, pairs, noise),
            "sigma": None if sigma is None else _Parameter.read("sigma", sigma, pairs),
        }
        batch = tuple(
            dict.fromkeys(dim for part in _parts((mean, arguments)) for dim in part.batch_dims)
        )
        extra = {
            dim: length
            for dim, length in (dim_lengths or {}).items()
            if dim not in batch and dim not in axes
        }
        mu = mean.lowered(batch, axes)
        if extra:
            # Before the dims of batches, which a mean without them hasn't
            mu = pt.atleast_Nd(mu, n=len(batch) + len(axes))
            mu = pt.broadcast_to(mu, (*extra.values(), *tuple(mu.shape)))
        grid = TensorNormal.dist(
            mu,
            lower=lower,
            marginalize_missing=marginalize_missing,
            **_lowered(arguments, batch),
            **kwargs,
        )
        lengths = {dim: current_length(length) for dim, length in (dim_lengths or {}).items()}
        check_dims(axes, lengths, grid.type.shape[-len(axes) :])
        return as_xtensor(grid, dims=(*extra, *batch, *axes))


class DimWhitenTransform(DimTransform):
    """The transform `pymc_kron.transforms.whiten` of variables with dims."""

    name = whiten.name

    def forward(self, value: XTensorVariable, *inputs: Variable) -> XTensorVariable:
        return self._mapped(WhitenTransform.forward, value, inputs)

    def backward(self, value: XTensorVariable, *inputs: Variable) -> XTensorVariable:
        return self._mapped(WhitenTransform.backward, value, inputs)

    def log_jac_det(self, value: XTensorVariable, *inputs: Variable) -> XTensorVariable:
        [rv] = inputs
        grid, dims = _grid_of(rv, value.type.dims)
        transform = whiten.of(grid)
        jacobian = transform.log_jac_det(value.transpose(*dims).values, *grid.owner.inputs)
        return as_xtensor(jacobian, dims=dims[: -transform.ndim_supp])

    def _mapped(
        self,
        mapping: Callable[..., TensorVariable],
        value: XTensorVariable,
        inputs: Sequence[Variable],
    ) -> XTensorVariable:
        [rv] = inputs
        grid, dims = _grid_of(rv, value.type.dims)
        mapped = mapping(whiten.of(grid), value.transpose(*dims).values, *grid.owner.inputs)
        return as_xtensor(mapped, dims=dims).transpose(*value.type.dims)


def _grid_of(var: Variable, dims: Sequence[str]) -> tuple[TensorVariable, tuple[str, ...]]:
    """Return the variable behind one with dims, and its dims in the order that it has them."""
    match var.owner_op_and_inputs:
        case (XTensorFromTensor(), grid):
            return _grid_of(grid, var.type.dims)
        case (DimShuffle(new_order=new_order), grid):
            return _grid_of(grid, [dims[new_order.index(i)] for i in range(grid.type.ndim)])
    return var, tuple(dims)


@dataclass(frozen=True)
class _Parameter:
    """An argument and those of its dims that aren't a batch, in their order."""

    value: XTensorVariable
    core_dims: tuple[str, ...]

    @classmethod
    def read(
        cls,
        name: str,
        value: Any,
        pairs: Sequence[Pair],
        *,
        required: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
    ) -> "_Parameter":
        """Read an argument, after checking its dims."""
        try:
            value = as_xtensor(value)
        except TypeError:
            raise ValueError(
                f"{name} has no dims. Say what its axes are: "
                "pymc.dims.as_xtensor(..., dims=...), or pass a DataArray."
            ) from None
        dims = value.type.dims
        missing = [dim for dim in required if dim not in dims]
        foreign = [
            dim for pair in pairs for dim in pair if dim in dims and dim not in required + optional
        ]
        if missing or foreign:
            expected = f"the dims {required}" if required else f"no core dims but {optional}"
            raise ValueError(
                f"{name} must have {expected}, and those of batches, got {dims} with core_dims="
                f"{list(pairs)}. Rename or transpose it, or correct core_dims."
            )
        return cls(value, tuple(dim for dim in required + optional if dim in dims))

    @property
    def batch_dims(self) -> list[str]:
        """The dims that are a batch."""
        return [dim for dim in self.value.type.dims if dim not in self.core_dims]

    def lowered(
        self, batch: tuple[str, ...], core: tuple[str, ...] | None = None
    ) -> TensorVariable:
        """Return a tensor with all batch dims and core dims, of length one where it has none."""
        dims = (*batch, *(self.core_dims if core is None else core))
        own = [dim for dim in dims if dim in self.value.type.dims]
        values = self.value.transpose(*own).values
        if not self.batch_dims:
            # A factor that a batch shares has no batch dims
            dims = dims[len(batch) :]
        axes = [axis for axis, dim in enumerate(dims) if dim not in own]
        return pt.expand_dims(values, axis=axes) if axes else values


def _read_core_dims(core_dims: Any) -> list[Pair]:
    """Return the pairs of dims, after checking that they are pairs of different names."""
    example = 'core_dims=[("station", "other_station"), ("day", "other_day")]'
    if core_dims is None:
        raise ValueError(f"core_dims must name the two dims of each factor: {example}.")
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in core_dims]
    if not all(
        isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(dim, str) for dim in pair)
        for pair in pairs
    ):
        raise ValueError(
            f"core_dims must have a pair of names for each factor, the one of its axis in the grid "
            f"first, got {core_dims!r}. For example {example}."
        )
    names = [dim for pair in pairs for dim in pair]
    repeated = [dim for dim in dict.fromkeys(names) if names.count(dim) > 1]
    if repeated:
        factors = [str(i) for i, pair in enumerate(pairs) if repeated[0] in pair]
        raise ValueError(
            f"The dim {repeated[0]!r} comes more than once in core_dims, in that of factor "
            f"{' and '.join(factors)}, got {pairs}. Each needs a name of its own."
        )
    return pairs


def _check_observed(observed: Any, core_dims: Any, marginalize_missing: bool) -> None:
    """Check which cells of observed data are missing."""
    try:
        observed = as_xtensor(observed)
    except TypeError:
        # PyMC asks for the dims
        return
    data = evaluated(observed.values, Constant)
    if data is None or not np.isnan(data).any():
        return
    dims = observed.type.dims
    axes = [axis for axis, _ in _read_core_dims(core_dims) if axis in dims]
    order = [*(dim for dim in dims if dim not in axes), *axes]
    missing = np.isnan(data).transpose([dims.index(dim) for dim in order])
    check_missing(missing, order, len(axes), marginalize_missing=marginalize_missing)
    if not marginalize_missing:
        raise ValueError(
            f"observed with dims={dims} has {missing.sum()} missing cells, which pymc.dims doesn't "
            "impute. marginalize_missing=True integrates them out; pymc_kron.TensorNormal can "
            "impute them as well."
        )


def _per_factor(
    name: str, entries: Any, pairs: Sequence[Pair], read: Callable[[int, str, Any], Any]
) -> list | None:
    """Read the entries of a list, one a factor."""
    if entries is None:
        return None
    entries = read_list(name, entries, "entry", "K")
    if len(entries) != len(pairs):
        raise ValueError(
            f"{name} must have one entry for each of the {len(pairs)} pairs of core_dims {pairs}, "
            f"got {len(entries)}."
        )
    return [
        None if entry is None else read(i, f"{name}[{i}]", entry) for i, entry in enumerate(entries)
    ]


def _parts(argument: Any) -> Iterator[_Parameter]:
    match argument:
        case _Parameter():
            yield argument
        case list() | tuple():
            for entry in argument:
                yield from _parts(entry)
        case dict():
            yield from _parts(list(argument.values()))


def _lowered(argument: Any, batch: tuple[str, ...]) -> Any:
    match argument:
        case _Parameter():
            return argument.lowered(batch)
        case list() | tuple():
            return type(argument)(_lowered(entry, batch) for entry in argument)
        case dict():
            return {name: _lowered(entry, batch) for name, entry in argument.items()}
    return argument
