"""The random variable of the cells of a grid, as a vector or as the grid that they are."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pytensor
from pymc.distributions.dist_math import check_parameters
from pymc.distributions.distribution import SymbolicRandomVariable, _support_point
from pymc.distributions.moments.means import _mean
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.abstract import _logprob
from pymc.logprob.transform_value import TransformedValue
from pymc.pytensorf import normalize_rng_param
from pytensor import tensor as pt
from pytensor.compile.mode import optdb
from pytensor.graph.basic import Apply, Variable, equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import _vectorize_node, clone_replace
from pytensor.graph.rewriting.basic import SequentialGraphRewriter, in2out
from pytensor.tensor import TensorLike
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.random.utils import normalize_size_param
from pytensor.tensor.rewriting.elemwise import local_dimshuffle_lift
from pytensor.tensor.variable import TensorVariable
from pytensor.xtensor.basic import TensorFromXTensor

from pymc_kron.covariances import Covariance, Structure, covariance_of
from pymc_kron.distributions.arguments import check_value, event_of
from pymc_kron.missing import marginal_log_density
from pymc_kron.structure import Size

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class GridMvNormalRV(SymbolicRandomVariable):
    """Random variable of the cells of a grid: its inner graph draws ``mu + R z``.

    Parameters
    ----------
    structure
        What the parts of the covariance are.
    marginalize_missing
        Whether the log-density of a value is that of those of its cells that aren't NaN.
    """

    def __init__(
        self,
        *args: Any,
        structure: Structure,
        marginalize_missing: bool = False,
        **kwargs: Any,
    ) -> None:
        self.structure = structure
        self.marginalize_missing = marginalize_missing
        super().__init__(*args, **kwargs)

    @classmethod
    @abstractmethod
    def event_signature(cls, n_axes: int) -> str:
        """Return the core shape of a value, as in the signature of a gufunc."""

    def covariance(self, *parts: TensorVariable) -> Covariance:
        """Return the covariance whose parts these are."""
        return covariance_of(self.structure, parts)

    @classmethod
    def rv_op(
        cls,
        mu: TensorLike,
        *parts: TensorLike,
        structure: Structure,
        marginalize_missing: bool = False,
        size: Variable | Sequence[Size] | None = None,
        rng: Variable | None = None,
        dtype: str | None = None,
    ) -> TensorVariable:
        mu = pt.as_tensor_variable(mu)
        parts = tuple(map(pt.as_tensor_variable, parts))
        rng = normalize_rng_param(rng)
        size = normalize_size_param(size)
        covariance = covariance_of(structure, parts)
        sizes = covariance.sizes
        core_shapes = [cls.event_signature(len(sizes)), *covariance.core_shapes]

        ndims_params = [
            len(core_shape.split(",")) if "n" in core_shape else 0 for core_shape in core_shapes
        ]

        if rv_size_is_none(size):
            # PyMC resizes a variable by its size, which therefore has to be there
            size = implicit_size_from_params(mu, *parts, ndims_params=ndims_params)
        next_rng, z = pt.random.normal(
            size=(*size, *event_of(sizes, ndims_params[0])), rng=rng, return_next_rng=True
        )
        draws = colored(covariance, mu, z, ndims_params[0])
        return cls(
            inputs=[rng, size, mu, *parts],
            outputs=[next_rng, draws.astype(dtype or pytensor.config.floatX)],
            structure=structure,
            marginalize_missing=marginalize_missing,
            extended_signature=f"[rng],[size],{','.join(core_shapes)}->[rng],{core_shapes[0]}",
        )(rng, size, mu, *parts)

    def rebuild_rv(self, *args: Variable, **kwargs: Variable) -> TensorVariable:
        dtype = self.output_types[1].dtype
        return self.rv_op(
            *args,
            structure=self.structure,
            marginalize_missing=self.marginalize_missing,
            dtype=dtype,
            **kwargs,
        )


class KroneckerMvNormalRV(GridMvNormalRV):
    """Random variable of `KroneckerMvNormal`, whose values are vectors ``(..., N)``."""

    ndim_supp = 1
    _print_name = ("KroneckerMvNormal", "\\operatorname{KroneckerMvNormal}")

    @classmethod
    def event_signature(cls, n_axes: int) -> str:
        return "(n)"


class TensorNormalRV(GridMvNormalRV):
    """Random variable of `TensorNormal`, whose values are grids ``(..., n_1, ..., n_d)``."""

    _print_name = ("TensorNormal", "\\operatorname{TensorNormal}")

    @classmethod
    def event_signature(cls, n_axes: int) -> str:
        return f"({','.join(f'n{i}' for i in range(n_axes))})"


@_logprob.register(GridMvNormalRV)
def grid_mvnormal_logp(
    op: GridMvNormalRV,
    values: Sequence[TensorVariable],
    rng: Variable,
    size: Variable,
    mu: TensorVariable,
    *parts: TensorVariable,
    **kwargs: Any,
) -> TensorVariable:
    [value] = values
    covariance = op.covariance(*parts)
    check_value(value, op.output_types[1].shape, covariance.sizes, op.ndim_supp)
    z = whitened(value, covariance, mu, op.ndim_supp)
    if z is not None:
        # The determinant comes last, where it cancels against that of the Jacobian
        logp = -0.5 * (z**2).sum(axis=-1) - math.prod(covariance.sizes) * HALF_LOG_2PI
        logp = check_parameters(logp, covariance.exists, msg="posdef covariance")
        return logp - half_logdet(covariance, z)
    delta = raveled(value - mu, op.ndim_supp)
    if not op.marginalize_missing:
        logp, exists = covariance.log_density(delta)
        return check_parameters(logp, exists, msg="posdef covariance")
    is_missing = raveled(pt.isnan(value), op.ndim_supp)
    first = is_missing[(0,) * (is_missing.type.ndim - 1)]
    logp, exists = marginal_log_density(covariance, delta, first)
    logp = check_parameters(logp, exists, msg="posdef covariance")
    msg = "the same missing cells in all values of a batch"
    return check_parameters(logp, pt.eq(is_missing, first), msg=msg)


@_mean.register(GridMvNormalRV)
@_support_point.register(GridMvNormalRV)
def grid_mvnormal_mean(
    op: GridMvNormalRV,
    rv: TensorVariable,
    rng: Variable,
    size: Variable,
    mu: TensorVariable,
    *parts: TensorVariable,
) -> TensorVariable:
    return pt.full_like(rv, mu)


@_vectorize_node.register(GridMvNormalRV)
def vectorize_grid_mvnormal(
    op: GridMvNormalRV, node: Apply, rng: Variable, size: Variable, *params: TensorVariable
) -> Apply:
    """Put new batch dimensions of the parameters before those of the size."""
    size_ndim = node.outputs[1].type.ndim - op.ndim_supp
    n_new, aligned = 0, []
    for old, new, core_ndim in zip(op.dist_params(node), params, op.ndims_params, strict=True):
        n_added = new.type.ndim - old.type.ndim
        if n_added:
            missing = size_ndim - (old.type.ndim - core_ndim)
            new = pt.expand_dims(new, tuple(range(n_added, n_added + missing)))
        n_new = max(n_new, n_added)
        aligned.append(new)
    implied = tuple(implicit_size_from_params(*aligned, ndims_params=op.ndims_params))
    return op.rebuild_rv(*aligned, size=(*implied[:n_new], *tuple(size)), rng=rng).owner


def colored(
    covariance: Covariance, mu: TensorVariable, z: TensorVariable, event_ndim: int
) -> TensorVariable:
    """Return ``mu + R z`` for vectors ``(..., N)`` or grids ``(..., n_1, ..., n_d)``."""
    vectors = covariance.color(raveled(z, event_ndim))
    return mu + vectors.reshape((*tuple(vectors.shape)[:-1], *tuple(z.shape)[-event_ndim:]))


def half_logdet(covariance: Covariance, z: TensorVariable) -> TensorVariable:
    """Return ``log|det R|`` for each of a batch of vectors, ``(..., N)->(...)``."""
    half = 0.5 * covariance.logdet
    return pt.broadcast_to(half, tuple(z.shape)[:-1]) if z.type.ndim > 1 else half


def whitened(
    value: TensorVariable, covariance: Covariance, mu: TensorVariable, event_ndim: int
) -> TensorVariable | None:
    """Return the vectors ``z`` if a value was transformed from them, ``mu + R z``.

    By comparing the graph of the value with that of ``mu + R z``, since a log-density isn't told of
    which transform a value comes.
    """
    transformed = value
    while not isinstance(transformed.owner_op, TransformedValue):
        # Dims are taken off after the transform
        match transformed.owner_op_and_inputs:
            case (TensorFromXTensor() | DimShuffle(), transformed):
                continue
        return None
    x, z = (clone_replace(value, {transformed: before}) for before in transformed.owner.inputs)
    fgraph = FunctionGraph(outputs=[x, colored(covariance, mu, z, event_ndim)], clone=True)
    without_dims.rewrite(fgraph)
    x, expected = fgraph.outputs
    return raveled(z, event_ndim) if equal_computations([x], [expected]) else None


without_dims = SequentialGraphRewriter(
    optdb.query("+lower_xtensor"), in2out(local_dimshuffle_lift, name="lift_dimshuffles")
)


def raveled(value: TensorVariable, event_ndim: int) -> TensorVariable:
    """Return grids as vectors, ``(..., n_1, ..., n_d)->(..., N)``."""
    if event_ndim == 1:
        return value
    return pt.join_dims(value, start_axis=-event_ndim, n_axes=event_ndim)
