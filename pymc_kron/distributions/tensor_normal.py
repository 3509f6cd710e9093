"""The normal distribution of a grid, with the grid for its value."""

from collections.abc import Sequence

from pymc.model.core import Model, modelcontext

from pymc_kron.distributions.arguments import Dims, check_dims
from pymc_kron.distributions.grid_rv import TensorNormalRV
from pymc_kron.distributions.kronecker_mvnormal import KroneckerMvNormal
from pymc_kron.structure import Size, current_length


class TensorNormal(KroneckerMvNormal):
    r"""
    Normal distribution of a grid with a Kronecker-structured covariance.

    The tensor (or array) normal distribution, and with two factors the matrix normal one: it is
    `KroneckerMvNormal` with values of shape :math:`(n_1, \dots, n_d)` in place of vectors.

    .. math::

       \operatorname{vec}(X) \sim \mathcal{N}(\operatorname{vec}(M), K_1 \otimes \dots \otimes K_d),
       \qquad \operatorname{cov}(X_{ij}, X_{kl}) = (K_1)_{ik} (K_2)_{jl}

    with :math:`\operatorname{vec}` in row-major (C) order (Hoff (2011), section 2).

    ========  ========================================================
    Support   :math:`X \in \mathbb{R}^{n_1 \times \dots \times n_d}`
    Mean      :math:`M`
    ========  ========================================================

    Parameters
    ----------
    mu : tensor_like of float, default 0
        Mean, of shape ``(..., n_1, ..., n_d)`` or broadcastable to it: a mean for each station
        is ``mu_station[:, None]``.
    covs, chols, taus, evds, sigma, noise_covs, lower, marginalize_missing
        As of `KroneckerMvNormal`: what describes each factor, one for each axis of the grid in
        their order, the noise, and what missing cells are.
    **kwargs
        As for any PyMC distribution. The last d of ``shape`` or ``dims`` are those of the grid.

    Raises
    ------
    TypeError, ValueError
        As `KroneckerMvNormal` does, and if ``dims`` doesn't name each axis of the grid, names two
        of them alike, or has a number of coords that isn't the size of the factor.

    See Also
    --------
    KroneckerMvNormal : The same distribution of a vector, with the same log-density and, for one
        seed, the same draws.
    pymc.MatrixNormal : Two factors, without noise or a batch.

    References
    ----------
    .. [1] Hoff, P. D. (2011). "Separable covariance arrays via the Tucker product, with
       applications to multivariate relational data". Bayesian Analysis 6(2), 179-196.

    Examples
    --------
    Three stations and four days, with names:

    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc_kron as pk

        K_space = np.exp(-np.abs(np.subtract.outer([0.0, 1.0, 2.5], [0.0, 1.0, 2.5])))
        K_time = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        y = np.random.default_rng(1).normal(size=(3, 4))

        coords = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(4)}
        with pm.Model(coords=coords) as model:
            level = pm.Normal("level", dims="station")
            sigma = pm.HalfNormal("sigma")
            pk.TensorNormal(
                "y",
                mu=level[:, None],
                covs=[K_space, K_time],
                sigma=sigma,
                dims=("station", "day"),
                observed=y,
            )
            prior = pm.sample_prior_predictive(10, random_seed=1)
        prior.prior_predictive["y"].sel(station="Dublin", day=2).shape
    """

    rv_type = TensorNormalRV
    rv_op = TensorNormalRV.rv_op

    @classmethod
    def event_ndim(cls, n_factors: int) -> int:
        """Return how many dimensions a value has."""
        return n_factors

    @classmethod
    def _check_dims(cls, dims: Dims, sizes: Sequence[Size], model: Model | None) -> None:
        lengths = modelcontext(model).dim_lengths
        check_dims(dims, {dim: current_length(length) for dim, length in lengths.items()}, sizes)
