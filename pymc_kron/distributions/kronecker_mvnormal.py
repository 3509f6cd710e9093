"""The multivariate normal with a Kronecker-structured covariance."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import pytensor
from pymc.distributions.continuous import Continuous
from pymc.distributions.dist_math import check_parameters
from pymc.distributions.distribution import SymbolicRandomVariable
from pymc.distributions.moments.means import _mean
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.abstract import _logprob
from pymc.pytensorf import normalize_rng_param
from pytensor import tensor as pt
from pytensor.assumptions.specify import assume
from pytensor.compile.mode import Mode
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import graph_inputs
from pytensor.tensor import TensorLike
from pytensor.tensor.random.utils import normalize_size_param
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import apply_to_vectors, factors_batch_ndim, kron
from pymc_kron.rewriting import bundle_rewriter
from pymc_kron.roots import Root
from pymc_kron.structure import Size, column_sizes, is_provably_not_square

type Form = Literal["cov", "chol", "tau"]
"""What a factor is: a covariance, its lower Cholesky factor, or its inverse."""


def covariance(factor: TensorVariable, form: Form) -> TensorVariable:
    """Write down the covariance that a factor stands for: ``(n,n)->(n,n)``."""
    match form:
        case "cov":
            cov = factor
        case "chol":
            chol = assume(factor, lower_triangular=True)
            cov = chol @ chol.mT
        case "tau":
            cov = pt.linalg.inv(factor)
    return assume(cov, positive_definite=True)


def covariance_root(factor: TensorVariable, form: Form) -> Root:
    """Return the root of the covariance that a factor stands for."""
    chol = factor if form == "chol" else pt.linalg.cholesky(factor)
    return Root(chol, of_precision=form == "tau")


def dense_logp(
    value: TensorVariable,
    mu: TensorVariable,
    factors: Sequence[TensorVariable],
    forms: Sequence[Form],
) -> TensorVariable:
    """Write down the log-density of a multivariate normal with covariance ``kron(*covs)``.

    ``-1/2 (x - mu)' K^-1 (x - mu) - 1/2 log|K| - N/2 log(2 pi)``, with the dense ``K``: the
    formula that `rewritten_logp` turns into the one that is computed.
    """
    covs = list(map(covariance, factors, forms))
    if len(covs) == 1:
        # The bundle is for products, and K = K (x) 1 is one
        covs.append(pt.eye(1, dtype=covs[0].type.dtype))
    K = kron(*covs)
    delta = value - mu
    quadratic_form = (delta * pt.linalg.solve(K, delta, assume_a="pos", b_ndim=1)).sum(axis=-1)
    _, logdet = pt.linalg.slogdet(K)
    N = math.prod(column_sizes(factors))
    return -0.5 * quadratic_form - 0.5 * logdet - N * (0.5 * math.log(2 * math.pi))


def rewritten_logp(
    value: TensorVariable,
    mu: TensorVariable,
    factors: Sequence[TensorVariable],
    forms: Sequence[Form],
) -> TensorVariable:
    """Return the log-density in its factorwise form: `dense_logp` after the rewrite bundle.

    The bundle sees the formula alone, on inputs that stand for the arguments, so that nothing
    else in the graph is touched.
    """
    arguments = [value, mu, *factors]
    inputs = [argument.type(name=argument.name) for argument in arguments]
    logp = dense_logp(inputs[0], inputs[1], inputs[2:], forms)
    fgraph = FunctionGraph(inputs, [logp], clone=False)
    bundle_rewriter().rewrite(fgraph)
    replacements = dict(zip(inputs, arguments, strict=True))
    [logp] = clone_replace(fgraph.outputs, replace=replacements)
    return logp


class KroneckerMvNormalRV(SymbolicRandomVariable):
    """Random variable of `KroneckerMvNormal`: its inner graph draws ``mu + (R_1 (x) ...) z``."""

    ndim_supp = 1
    _print_name = ("KroneckerMvNormal", "\\operatorname{KroneckerMvNormal}")

    def __init__(self, *args, forms: tuple[Form, ...], **kwargs):
        self.forms = forms
        super().__init__(*args, **kwargs)

    @classmethod
    def rv_op(cls, mu, *factors, forms: Sequence[Form], size=None, rng=None, dtype=None):
        mu = pt.as_tensor_variable(mu)
        factors = tuple(map(pt.as_tensor_variable, factors))
        rng = normalize_rng_param(rng)
        size = normalize_size_param(size)

        if rv_size_is_none(size):
            # PyMC resizes a variable by its size, which therefore has to be there
            ndims_params = [1, *(2 for _ in factors)]
            size = implicit_size_from_params(mu, *factors, ndims_params=ndims_params)
        sizes = column_sizes(factors)
        next_rng, z = pt.random.normal(
            size=(*size, math.prod(sizes)), rng=rng, return_next_rng=True
        )
        colors = [root.color for root in map(covariance_root, factors, forms)]
        batch_ndim = factors_batch_ndim(factors)
        draws = mu + apply_to_vectors(colors, sizes, sizes, z, batch_ndim=batch_ndim)

        core_shapes = ",".join(f"(n{i},n{i})" for i in range(len(factors)))
        return cls(
            inputs=[rng, size, mu, *factors],
            outputs=[next_rng, draws.astype(dtype or pytensor.config.floatX)],
            forms=tuple(forms),
            extended_signature=f"[rng],[size],(n),{core_shapes}->[rng],(n)",
        )(rng, size, mu, *factors)

    def rebuild_rv(self, *args, **kwargs):
        return self.rv_op(*args, forms=self.forms, dtype=self.output_types[1].dtype, **kwargs)


@_logprob.register(KroneckerMvNormalRV)
def kronecker_mvnormal_logp(op, values, rng, size, mu, *factors, **kwargs):
    [value] = values
    _check_length("value", value, column_sizes(factors))
    _check_batch_shape(value, op.output_types[1].shape)
    exist = [root.exists for root in map(covariance_root, factors, op.forms)]
    return check_parameters(
        rewritten_logp(value, mu, factors, op.forms),
        reduce(pt.and_, exist),
        msg="posdef covariance",
    )


@_mean.register(KroneckerMvNormalRV)
def kronecker_mvnormal_mean(op, rv, rng, size, mu, *factors):
    return pt.full_like(rv, mu)


class KroneckerMvNormal(Continuous):
    r"""
    Multivariate normal distribution with a Kronecker-structured covariance.

    .. math::

       f(x \mid \mu, K) = \frac{1}{(2\pi)^{N/2} |K|^{1/2}}
           \exp\left\{-\frac{1}{2} (x - \mu)^{\prime} K^{-1} (x - \mu)\right\},
       \qquad K = K_1 \otimes \dots \otimes K_d

    The values are those of :class:`pymc.MvNormal` with ``cov=np.kron(K_1, K_2)`` and so on, but
    no array with :math:`N \times N` entries is ever formed: a log-density or a draw takes
    :math:`O(N \sum_i n_i + \sum_i n_i^3)` operations and :math:`O(N + \sum_i n_i^2)` memory.

    ========  ==============================================
    Support   :math:`x \in \mathbb{R}^N, N = n_1 \dots n_d`
    Mean      :math:`\mu`
    Variance  :math:`K_1 \otimes \dots \otimes K_d`
    ========  ==============================================

    Parameters
    ----------
    mu : tensor_like of float, default 0
        Mean, of shape ``(..., N)`` or broadcastable to it. The cells of the grid are in
        row-major (C) order: the first factor belongs to the slowest-varying axis, so that a
        grid ``X`` of shape ``(n_1, ..., n_d)`` has the value ``X.ravel()``.
    covs : sequence of tensor_like of float, optional
        Covariance matrices of the factors, each of shape ``(..., n_i, n_i)``, or None where
        `chols` or `taus` describes the factor.
    chols : sequence of tensor_like of float, optional
        Cholesky factors of the covariance matrices, or None. Used as they are, not multiplied.
    taus : sequence of tensor_like of float, optional
        Precision matrices, the inverses of the covariance matrices, or None. Factorised, not
        inverted.
    lower : bool, default True
        Whether the matrices in `chols` are the lower Cholesky factors.
    **kwargs
        As for any PyMC distribution: ``shape``, ``size``, ``dims``, ``observed``, ``initval``,
        ``transform`` and so on. A stack of observations of shape ``(m, N)`` that shares its
        factors takes one solve with all right-hand sides.

    Raises
    ------
    TypeError
        If `covs`, `chols` or `taus` is a single array rather than a list or tuple.
    ValueError
        If there is no factor, a factor has no description or more than one, the lists differ in
        length, a factor isn't a square matrix, or `mu` or ``shape`` doesn't fit ``N``.
    pymc.logprob.utils.ParameterValueError
        If a factor isn't positive definite, when the log-density is evaluated. While sampling,
        the log-density is minus infinity.

    See Also
    --------
    pymc.MvNormal : The same distribution with a dense covariance.

    Notes
    -----
    With :math:`K_i = L_i L_i^{\prime}` and the whitened residual
    :math:`w = (L_1^{-1} \otimes \dots \otimes L_d^{-1})(x - \mu)`, the log-density is

    .. math::

       -\frac{1}{2} |w|^2 - \sum_i \frac{N}{n_i} \sum_j \log (L_i)_{jj} - \frac{N}{2}\log 2\pi

    (Saatçi (2011), section 5.2). The factors are determined up to scales:
    :math:`A \otimes B = cA \otimes B/c`. Give all but one of them a fixed scale, for example a
    correlation matrix.

    References
    ----------
    .. [1] Saatçi, Y. (2011). "Scalable inference for structured Gaussian process models". PhD
       thesis, University of Cambridge.

    Examples
    --------
    A separable model of 3 stations and 4 days, whose temporal correlation is known:

    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc_kron as pk

        distance = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 1.5], [2.0, 1.5, 0.0]])
        K_time = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        y = np.random.default_rng(1).normal(size=(3, 4))

        with pm.Model() as model:
            variance = pm.HalfNormal("variance")
            length_scale = pm.Gamma("length_scale", 2, 1)
            K_space = variance * pm.math.exp(-distance / length_scale)
            pk.KroneckerMvNormal("y", mu=0, covs=[K_space, K_time], observed=y.ravel())
            prior = pm.sample_prior_predictive(10, random_seed=1)

    A covariance and a precision:

    .. code-block:: python

        x = pk.KroneckerMvNormal.dist(covs=[np.eye(3) + 1, None], taus=[None, np.eye(4)])
        pm.draw(x, random_seed=1).shape
    """

    rv_type = KroneckerMvNormalRV
    rv_op = KroneckerMvNormalRV.rv_op

    @classmethod
    def dist(  # type: ignore[override]
        cls,
        mu: TensorLike = 0,
        covs: Sequence[TensorLike | None] | None = None,
        *,
        chols: Sequence[TensorLike | None] | None = None,
        taus: Sequence[TensorLike | None] | None = None,
        lower: bool = True,
        **kwargs,
    ) -> TensorVariable:
        factors, forms = _read_factors(covs, chols, taus)
        if not lower:
            factors = [
                factor.mT if form == "chol" else factor
                for factor, form in zip(factors, forms, strict=True)
            ]
        mu = _read_mu(mu, column_sizes(factors))
        _check_shape(kwargs.get("shape"), column_sizes(factors))
        return super().dist([mu, *factors], forms=tuple(forms), **kwargs)

    def support_point(rv, rng, size, mu, *factors):
        return pt.full_like(rv, mu)


def _read_factors(covs, chols, taus) -> tuple[list[TensorVariable], list[Form]]:
    """Return the factors and what each of them is, after checking that this is clear."""
    lists: dict[Form, Sequence] = {}
    given: dict[Form, Any] = {"cov": covs, "chol": chols, "tau": taus}
    for form, matrices in given.items():
        if matrices is None:
            continue
        if not isinstance(matrices, list | tuple):
            shape = getattr(getattr(matrices, "type", matrices), "shape", None)
            raise TypeError(
                f"{form}s must be a list or tuple with one matrix a factor, got a single "
                f"{type(matrices).__name__}{'' if shape is None else f' of shape {shape}'}. "
                f"Wrap it in a list if there is only one factor: {form}s=[K]."
            )
        lists[form] = matrices

    if not any(map(len, lists.values())):
        raise ValueError(
            "KroneckerMvNormal has no factors: pass their covariances (covs), Cholesky factors "
            "(chols) or precisions (taus), for example covs=[K_space, K_time]."
        )
    if len({len(matrices) for matrices in lists.values()}) > 1:
        lengths = [f"len({form}s) = {len(matrices)}" for form, matrices in lists.items()]
        raise ValueError(
            "covs, chols and taus must have one entry a factor each, with None where another "
            f"list describes the factor, got {', '.join(lengths)}."
        )

    factors: list[TensorVariable] = []
    forms: list[Form] = []
    for i, matrices in enumerate(zip(*lists.values(), strict=True)):
        described: dict[Form, Any] = {
            form: matrix for form, matrix in zip(lists, matrices, strict=True) if matrix is not None
        }
        if len(described) != 1:
            entries = " and ".join(f"{form}s[{i}]" for form in described)
            raise ValueError(
                f"Factor {i} needs exactly one of covs, chols and taus, got {entries or 'none'}. "
                "Put None in the lists that don't describe it."
            )
        [(form, matrix)] = described.items()
        factors.append(_read_factor(f"{form}s[{i}]", matrix))
        forms.append(form)
    return factors, forms


def _read_factor(name: str, matrix: TensorLike) -> TensorVariable:
    factor = pt.as_tensor_variable(matrix)
    if factor.type.ndim < 2 or is_provably_not_square(factor):
        raise ValueError(
            f"{name} must be a square matrix of shape (n, n), or a batch of them of shape "
            f"(..., n, n), got shape {_show(factor.type.shape)}."
        )
    if factor.type.numpy_dtype.kind in "biu":
        factor = factor.astype(pytensor.config.floatX)
    if factor.type.numpy_dtype.kind != "f":
        raise ValueError(f"{name} must be real, got dtype {factor.type.dtype}.")
    return factor


def _read_mu(mu: TensorLike, sizes: Sequence[Size]) -> TensorVariable:
    mu = pt.atleast_1d(pt.as_tensor_variable(mu))
    if mu.type.numpy_dtype.kind == "c":
        raise ValueError(f"mu must be real, got dtype {mu.type.dtype}.")
    _check_length("mu", mu, sizes, broadcasts=True)
    return mu


def _check_length(
    name: str, vector: TensorVariable, sizes: Sequence[Size], *, broadcasts: bool = False
) -> None:
    N, length = math.prod(sizes), vector.type.shape[-1]
    if isinstance(N, int) and length not in ((None, 1, N) if broadcasts else (None, N)):
        raise ValueError(
            f"The last dimension of {name} must be {'1 or ' if broadcasts else ''}"
            f"N = {_show_product(sizes)}, the number of cells of the grid, "
            f"got {name} of shape {_show(vector.type.shape)}."
        )


def _check_batch_shape(value: TensorVariable, shape: Sequence[int | None]) -> None:
    """Check that the static batch shape of a value broadcasts against that of the variable."""
    batches = zip(reversed(value.type.shape[:-1]), reversed(shape[:-1]), strict=False)
    if any(None not in sizes and 1 not in sizes and len(set(sizes)) > 1 for sizes in batches):
        raise ValueError(
            f"A value of shape {_show(value.type.shape)} doesn't broadcast against a variable of "
            f"shape {_show(shape)}. The size of the variable, and the batch dimensions of its "
            "parameters, must be those of the observations."
        )


def _check_shape(shape, sizes: Sequence[Size]) -> None:
    """Check the last entry of ``shape``, which may come from observed data or dims."""
    known = [size for size in map(_current_length, sizes) if size is not None]
    if not isinstance(shape, int | list | tuple) or len(known) < len(sizes):
        return
    shape = [shape] if isinstance(shape, int) else shape
    length = _current_length(shape[-1]) if shape else "()"
    if length not in (None, math.prod(known)):
        raise ValueError(
            f"The last dimension of shape, dims or observed must be N = {_show_product(known)}, "
            f"the number of cells of the grid, got {length}. A grid of observations goes in as "
            "observed=grid.ravel(), with the first factor's axis first."
        )


def _current_length(length) -> int | None:
    """Return a length that is known or that data and coords have now."""
    if not isinstance(length, Variable):
        return int(length)
    if length.type.ndim or not all(
        isinstance(inp, Constant | SharedVariable) for inp in graph_inputs([length])
    ):
        return None
    return int(length.eval(mode=Mode(linker="py", optimizer=None)))


def _show(shape: Sequence[int | None]) -> str:
    sizes = ["?" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _show_product(sizes: Sequence[Size]) -> str:
    product = " * ".join(map(str, sizes))
    return product if len(sizes) == 1 else f"{product} = {math.prod(sizes)}"
