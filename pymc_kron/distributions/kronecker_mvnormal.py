"""The multivariate normal with a Kronecker-structured covariance."""

from collections.abc import Sequence
from typing import Any

from pymc.distributions.continuous import Continuous
from pymc.logprob.transforms import Transform
from pymc.model.core import Model
from pymc.util import UNSET
from pytensor.tensor import TensorLike
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance
from pymc_kron.distributions.arguments import (
    Dims,
    check_shape,
    read_covariance,
    read_mu,
    read_observed,
)
from pymc_kron.distributions.grid_rv import GridMvNormalRV, KroneckerMvNormalRV
from pymc_kron.structure import Size
from pymc_kron.transforms import WhitenTransform, check_latent


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
    marginalize_missing : bool, default False
        Whether missing cells, NaN or masked in ``observed``, are integrated out: exactly, with
        ``O(M^3)`` operations for M of them beside those of the whole grid. They are then predicted
        with `pymc_kron.predict_missing`. By default they are parameters that are sampled, as of
        any PyMC distribution.
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
        doesn't fit its factor; if all cells are missing, or with `marginalize_missing` not the
        same ones in all observations of a batch.
    pymc.logprob.utils.ParameterValueError
        If the covariance isn't positive definite, when the log-density is evaluated. While
        sampling, the log-density is minus infinity. Without noise, each factor has to be
        positive definite; with it, a factor may be singular.

    See Also
    --------
    pymc.MvNormal : The same distribution with a dense covariance.
    pymc_kron.transforms.whiten : The ``transform`` that samples a latent field non-centred.

    Notes
    -----
    With :math:`K_i = L_i L_i^{\prime}` and the whitened residual
    :math:`w = (L_1^{-1} \otimes \dots \otimes L_d^{-1})(x - \mu)`, the log-density is

    .. math::

       -\frac{1}{2} |w|^2 - \sum_i \frac{N}{n_i} \sum_j \log (L_i)_{jj} - \frac{N}{2}\log 2\pi

    (Saatçi (2011), section 5.2). With noise, it is computed in the generalised eigenvectors of the
    factors; see ``pymc_kron.kron_sum``. Gradients are closed forms, not derivatives of Cholesky
    factors or eigenvectors: with noise they are exact at repeated eigenvalues too, such as those
    of an identity matrix (``pymc_kron.kronecker_logp``, ``pymc_kron.kron_sum_logp``).

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

    rv_type: type[GridMvNormalRV] = KroneckerMvNormalRV
    rv_op = KroneckerMvNormalRV.rv_op

    def __new__(
        cls,
        name: str,
        *args: Any,
        dims: Dims = None,
        observed: Any = None,
        transform: Transform | None = UNSET,
        **kwargs: Any,
    ) -> TensorVariable:
        """Create the variable in the model, after checking what only the model knows of."""
        covariance = cls._covariance_of(*args, **kwargs)
        event_ndim = cls.event_ndim(len(covariance.sizes))
        if dims is not None:
            cls._check_dims(dims, covariance.sizes, kwargs.get("model"))
        if observed is not None:
            marginalize_missing = kwargs.get("marginalize_missing", False)
            observed = read_observed(
                observed, dims, event_ndim, marginalize_missing=marginalize_missing
            )
        if isinstance(transform, WhitenTransform):
            check_latent(observed)
            # PyMC doesn't tell a transform what the covariance is
            transform = transform.given(covariance.structure, event_ndim)
        return super().__new__(
            cls, name, *args, dims=dims, observed=observed, transform=transform, **kwargs
        )

    @classmethod
    def _covariance_of(
        cls,
        mu: Any = 0,
        covs: Any = None,
        *,
        chols: Any = None,
        taus: Any = None,
        evds: Any = None,
        sigma: Any = None,
        noise_covs: Any = None,
        lower: bool = True,
        **kwargs: Any,
    ) -> Covariance:
        """Return the covariance, given all arguments of `dist`."""
        return read_covariance(covs, chols, taus, evds, sigma, noise_covs, lower=lower)

    @classmethod
    def _check_dims(cls, dims: Dims, sizes: Sequence[Size], model: Model | None) -> None:
        """Check dims that name the axes of a grid, which those of a vector don't."""

    @classmethod
    def event_ndim(cls, n_factors: int) -> int:
        """Return how many dimensions a value has."""
        return 1

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
        marginalize_missing: bool = False,
        **kwargs: Any,
    ) -> TensorVariable:
        covariance = read_covariance(covs, chols, taus, evds, sigma, noise_covs, lower=lower)
        sizes = covariance.sizes
        event_ndim = cls.event_ndim(len(sizes))
        mu = read_mu(mu, sizes, event_ndim)
        check_shape(kwargs.get("shape"), sizes, event_ndim)
        return super().dist(
            [mu, *covariance.parts],
            structure=covariance.structure,
            marginalize_missing=marginalize_missing,
            **kwargs,
        )
