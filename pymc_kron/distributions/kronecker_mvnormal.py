"""The multivariate normal with a Kronecker-structured covariance."""

import math
from collections.abc import Sequence
from itertools import chain

import pytensor
from pymc.distributions.continuous import Continuous
from pymc.distributions.dist_math import check_parameters
from pymc.distributions.distribution import SymbolicRandomVariable
from pymc.distributions.moments.means import _mean
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.abstract import _logprob
from pymc.pytensorf import normalize_rng_param
from pytensor import tensor as pt
from pytensor.tensor import TensorLike
from pytensor.tensor.random.utils import normalize_size_param
from pytensor.tensor.variable import TensorVariable

from pymc_kron.distributions.arguments import (
    check_shape,
    check_value,
    read_factors,
    read_mu,
    read_noise,
)
from pymc_kron.distributions.kron_sum_mvnormal import KronSumMvNormalRV
from pymc_kron.factors import Form, core_ndims, factors_of
from pymc_kron.kronecker_logp import KroneckerLogp
from pymc_kron.linalg import apply_to_vectors


class KroneckerMvNormalRV(SymbolicRandomVariable):
    """Random variable of `KroneckerMvNormal`: its inner graph draws ``mu + (R_1 (x) ...) z``."""

    ndim_supp = 1
    _print_name = ("KroneckerMvNormal", "\\operatorname{KroneckerMvNormal}")

    def __init__(self, *args, forms: tuple[Form, ...], **kwargs):
        self.forms = forms
        super().__init__(*args, **kwargs)

    @classmethod
    def rv_op(cls, mu, *parts, forms: Sequence[Form], size=None, rng=None, dtype=None):
        mu = pt.as_tensor_variable(mu)
        parts = tuple(map(pt.as_tensor_variable, parts))
        rng = normalize_rng_param(rng)
        size = normalize_size_param(size)
        factors = factors_of(forms, parts)

        if rv_size_is_none(size):
            # PyMC resizes a variable by its size, which therefore has to be there
            ndims_params = [1, *chain.from_iterable(map(core_ndims, forms))]
            size = implicit_size_from_params(mu, *parts, ndims_params=ndims_params)
        sizes = [factor.size for factor in factors]
        next_rng, z = pt.random.normal(
            size=(*size, math.prod(sizes)), rng=rng, return_next_rng=True
        )
        colors = [factor.root().color for factor in factors]
        batch_ndim = max(factor.batch_ndim for factor in factors)
        draws = mu + apply_to_vectors(colors, sizes, sizes, z, batch_ndim=batch_ndim)

        signatures = [
            f"({','.join([f'n{i}'] * ndim)})"
            for i, form in enumerate(forms)
            for ndim in core_ndims(form)
        ]
        return cls(
            inputs=[rng, size, mu, *parts],
            outputs=[next_rng, draws.astype(dtype or pytensor.config.floatX)],
            forms=tuple(forms),
            extended_signature=f"[rng],[size],(n),{','.join(signatures)}->[rng],(n)",
        )(rng, size, mu, *parts)

    def rebuild_rv(self, *args, **kwargs):
        return self.rv_op(*args, forms=self.forms, dtype=self.output_types[1].dtype, **kwargs)


@_logprob.register(KroneckerMvNormalRV)
def kronecker_mvnormal_logp(op, values, rng, size, mu, *parts, **kwargs):
    [value] = values
    factors = factors_of(op.forms, parts)
    check_value(value, op.output_types[1].shape, [factor.size for factor in factors])
    logp, exists = KroneckerLogp(forms=op.forms)(value - mu, *parts)
    return check_parameters(logp, exists, msg="posdef covariance")


@_mean.register(KroneckerMvNormalRV)
def kronecker_mvnormal_mean(op, rv, rng, size, mu, *parts):
    return pt.full_like(rv, mu)


class KroneckerMvNormal(Continuous):
    r"""
    Multivariate normal distribution with a Kronecker-structured covariance.

    .. math::

       f(x \mid \mu, K) = \frac{1}{(2\pi)^{N/2} |K|^{1/2}}
           \exp\left\{-\frac{1}{2} (x - \mu)^{\prime} K^{-1} (x - \mu)\right\},
       \qquad K = K_1 \otimes \dots \otimes K_d

    or, with noise, :math:`K = K_1 \otimes \dots \otimes K_d + \sigma^2 I` or
    :math:`K = K_1 \otimes \dots \otimes K_d + D_1 \otimes \dots \otimes D_d`.

    The values are those of :class:`pymc.MvNormal` with ``cov=np.kron(K_1, K_2)`` and so on, but
    no array with :math:`N \times N` entries is ever formed: a log-density or a draw takes
    :math:`O(N \sum_i n_i + \sum_i n_i^3)` operations and :math:`O(N + \sum_i n_i^2)` memory.

    ========  ==============================================
    Support   :math:`x \in \mathbb{R}^N, N = n_1 \dots n_d`
    Mean      :math:`\mu`
    Variance  :math:`K`
    ========  ==============================================

    Parameters
    ----------
    mu : tensor_like of float, default 0
        Mean, of shape ``(..., N)`` or broadcastable to it. The cells of the grid are in
        row-major (C) order: the first factor belongs to the slowest-varying axis, so that a
        grid ``X`` of shape ``(n_1, ..., n_d)`` has the value ``X.ravel()``.
    covs : sequence of tensor_like of float, optional
        Covariance matrices of the factors, each of shape ``(..., n_i, n_i)``, or None where
        `chols`, `taus` or `evds` describes the factor.
    chols : sequence of tensor_like of float, optional
        Cholesky factors of the covariance matrices, or None. Used as they are, not multiplied.
    taus : sequence of tensor_like of float, optional
        Precision matrices, the inverses of the covariance matrices, or None. Without noise,
        factorised and not inverted.
    evds : sequence of pairs of tensor_like of float, optional
        Eigenvalues ``(..., n_i)`` and eigenvectors ``(..., n_i, n_i)`` of the covariance
        matrices, as `numpy.linalg.eigh` returns them, or None. Used as they are.
    sigma : tensor_like of float, optional
        Standard deviation of independent noise, in the units of the values: one for all cells,
        or a batch ``(...)``.
    noise_covs : sequence of tensor_like of float, optional
        For each factor, the covariance matrix of the noise along its axis, ``(..., n_i, n_i)``
        and positive definite; or its diagonal ``(n_i,)``, a number for a multiple of the
        identity, or None for the identity. ``noise_covs=[D_task, None]`` is noise with a
        covariance over tasks that is independent over inputs.
    lower : bool, default True
        Whether the matrices in `chols` are the lower Cholesky factors.
    **kwargs
        As for any PyMC distribution: ``shape``, ``size``, ``dims``, ``observed``, ``initval``,
        ``transform`` and so on. A stack of observations of shape ``(m, N)`` that shares its
        factors takes one solve with all right-hand sides.

    Raises
    ------
    TypeError
        If `covs`, `chols`, `taus`, `evds` or `noise_covs` is a single array rather than a list
        or tuple, or an entry of `evds` is no pair.
    ValueError
        If there is no factor, a factor has no description or more than one, the lists differ in
        length, a factor isn't a square matrix, or `mu` or ``shape`` doesn't fit ``N``; if
        `sigma` has an entry for each cell, doesn't come alone, or an entry of `noise_covs`
        doesn't fit its factor.
    pymc.logprob.utils.ParameterValueError
        If the covariance isn't positive definite, when the log-density is evaluated. While
        sampling, the log-density is minus infinity. Without noise, each factor has to be
        positive definite; with it, a factor may be singular.

    See Also
    --------
    pymc.MvNormal : The same distribution with a dense covariance.

    Notes
    -----
    With :math:`K_i = L_i L_i^{\prime}` and the whitened residual
    :math:`w = (L_1^{-1} \otimes \dots \otimes L_d^{-1})(x - \mu)`, the log-density is

    .. math::

       -\frac{1}{2} |w|^2 - \sum_i \frac{N}{n_i} \sum_j \log (L_i)_{jj} - \frac{N}{2}\log 2\pi

    (Saatçi (2011), section 5.2). With noise, it is computed in the generalised eigenvectors of the
    factors; see `pymc_kron.kron_sum`. Gradients are closed forms, not derivatives of Cholesky
    factors or eigenvectors: with noise they are exact at repeated eigenvalues too, such as those
    of an identity matrix (`pymc_kron.kronecker_logp`, `pymc_kron.kron_sum_logp`).

    A factor that is constant in the model is decomposed once, when the model is compiled.

    The factors are determined up to scales:
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

    Noise of its own variance at each station, independent over days:

    .. code-block:: python

        K_space = np.exp(-distance)
        with pm.Model() as noisy:
            nugget = pm.HalfNormal("nugget", shape=3)
            pk.KroneckerMvNormal(
                "y", 0, [K_space, K_time], noise_covs=[nugget**2, None], observed=y.ravel()
            )
            prior = pm.sample_prior_predictive(10, random_seed=1)
    """

    rv_type = KroneckerMvNormalRV

    @staticmethod
    def rv_op(mu, *parts, **kwargs):
        """Return the random variable: with noise, its covariance is a sum of products."""
        rv_type = KronSumMvNormalRV if "layout" in kwargs else KroneckerMvNormalRV
        return rv_type.rv_op(mu, *parts, **kwargs)

    @classmethod
    def dist(  # type: ignore[override]
        cls,
        mu: TensorLike = 0,
        covs: Sequence[TensorLike | None] | None = None,
        *,
        chols: Sequence[TensorLike | None] | None = None,
        taus: Sequence[TensorLike | None] | None = None,
        evds: Sequence[tuple[TensorLike, TensorLike] | None] | None = None,
        sigma: TensorLike | None = None,
        noise_covs: Sequence[TensorLike | None] | None = None,
        lower: bool = True,
        **kwargs,
    ) -> TensorVariable:
        factors = read_factors(covs, chols, taus, evds, lower=lower)
        sizes = [factor.size for factor in factors]
        mu = read_mu(mu, sizes)
        check_shape(kwargs.get("shape"), sizes)
        noisy = read_noise(factors, sigma, noise_covs)
        if noisy is not None:
            return super().dist([mu, *noisy.inputs], layout=noisy.layout, **kwargs)
        parts = chain.from_iterable(factor.parts for factor in factors)
        forms = tuple(factor.form for factor in factors)
        return super().dist([mu, *parts], forms=forms, **kwargs)

    def support_point(rv, rng, size, mu, *parts):
        return pt.full_like(rv, mu)
