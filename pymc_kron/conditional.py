"""Prediction on new points of a grid: its conditional distribution, factorwise.

The grid ``y`` is ``N(mu, K)``, with ``K = S_1 (x) ... (x) S_d`` alone or with noise. The new cells
``f`` are those of a grid whose axis i has other points, with covariances ``T_i`` with one another
and ``C_i`` with the points of ``y``, or the same points, ``T_i = C_i = S_i``. Then ``f`` given
``y`` is normal, with ::

    mean       mu_f + C inv(K) (y - mu)
    variance   diag(T) - diag(C inv(K) C'),    C = C_1 (x) ... (x) C_d,  T likewise

(Rasmussen, C. E. and Williams, C. K. I. (2006), "Gaussian processes for machine learning", MIT
Press, equation 2.19.) Its covariance ``T - C inv(K) C'`` is a difference of products, which has
no root that is one. A draw from it is what is left of a draw ``(s, e, f)`` of the signal on the
grid, the noise and the new cells from their joint distribution::

    f + C inv(K) (y - mu - s - e)

(Matheron's rule: Wilson, J. T. et al. (2020), "Efficiently sampling functions from Gaussian
process posteriors", Proceedings of the 37th International Conference on Machine Learning.) The
signal and the new cells have the roots of ``[[S_i, C_i'], [C_i, T_i]]`` in common, of which the
upper rows belong to the grid and the lower ones to the new cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pymc.distributions.continuous import Normal
from pymc.model.core import Deterministic, Model, modelcontext
from pytensor import tensor as pt
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.tensor import TensorLike
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance, KroneckerCovariance, KronSumCovariance
from pymc_kron.distributions.arguments import (
    check_dims,
    current_length,
    event_of,
    read_mu,
    read_new_points,
    read_noise,
)
from pymc_kron.distributions.grid_rv import GridMvNormalRV, raveled
from pymc_kron.kernels import finite_eigh
from pymc_kron.linalg import kron_matmul
from pymc_kron.structure import evaluated

__all__ = ["conditional"]


class Conditional(NamedTuple):
    """The variables of a conditional distribution.

    Attributes
    ----------
    draws
        Joint draws of the new cells.
    mean
        Their conditional mean.
    variance
        Their conditional variances.
    """

    draws: TensorVariable
    mean: TensorVariable
    variance: TensorVariable


def conditional(
    name: str,
    given: TensorVariable,
    cross_covs: Sequence[TensorLike | None],
    new_covs: Sequence[TensorLike | None],
    *,
    mu: TensorLike = 0,
    sigma: TensorLike | None = None,
    noise_covs: Sequence[TensorLike | None] | None = None,
    dims: Any = None,
    model: Model | None = None,
) -> Conditional:
    r"""
    Predict a grid on new points: at a new station, on new days, or both.

    The distribution of new cells given those of a `KroneckerMvNormal` or `TensorNormal`, as
    ``gp.conditional`` has it for Gaussian processes, for :func:`pymc.sample_posterior_predictive`.
    The new cells are a grid as well. On an axis with new points, their covariances with the points
    of the grid and with one another say where they are; the other axes keep their points.

    With :math:`N` cells of the grid and :math:`M` new ones, no array with :math:`N \times N`,
    :math:`M \times N` or :math:`M \times M` entries is ever formed.

    Parameters
    ----------
    name : str
        The name of the joint draws. The conditional mean and variances are the deterministic
        variables ``{name}_mean`` and ``{name}_variance``.
    given : TensorVariable
        A `KroneckerMvNormal` or `TensorNormal` of the model, observed or not. Without its noise,
        which has no part in the new cells.
    cross_covs : sequence of tensor_like of float
        For each factor, the covariances ``(..., m_i, n_i)`` of its new points with those of the
        grid, or None where there are no new points.
    new_covs : sequence of tensor_like of float
        For each factor, the covariances ``(..., m_i, m_i)`` of its new points with one another,
        or None.
    mu : tensor_like of float, default 0
        Mean of the new cells, in the shape of the result or broadcastable to it.
    sigma, noise_covs
        Noise of the new cells, as of `KroneckerMvNormal`, to predict new observations. It is
        independent of the noise of `given`. By default there is none.
    dims : str or sequence of str, optional
        Dims of the result.
    model : Model, optional
        Not needed in a ``with model:`` block.

    Returns
    -------
    Conditional
        The variables ``draws``, ``mean`` and ``variance``, of shape ``(..., M)`` in row-major
        order, or ``(..., m_1, ..., m_d)`` if `given` is a `TensorNormal`.

    Raises
    ------
    TypeError
        If `given` isn't a `KroneckerMvNormal` or `TensorNormal` of the model, or a list isn't one.
    ValueError
        If a cross-covariance doesn't fit the points of its factor, a factor has only one of the
        two covariances, the noise or `mu` doesn't fit the new cells, or there is nothing to
        predict: no new point, and no noise to be told from the signal; or if cells of `given` are
        missing.

    See Also
    --------
    pymc.gp.Marginal : Prediction with a dense covariance.

    Notes
    -----
    Add it to the model after sampling, and after :func:`pymc.compute_log_likelihood`. The draws are
    computed from standard normal variables, ``{name}_whitened``, which a sampler takes for
    parameters.

    The draws follow Matheron's rule (Wilson et al. (2020)). They need no jitter: a new point may be
    one of the grid.

    References
    ----------
    .. [1] Wilson, J. T., Borovitskiy, V., Terenin, A., Mostowsky, P. and Deisenroth, M. P. (2020).
       "Efficiently sampling functions from Gaussian process posteriors". Proceedings of the 37th
       International Conference on Machine Learning.

    Examples
    --------
    A station that wasn't observed, on the days of the others:

    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc_kron as pk

        position = np.array([0.0, 1.0, 2.5])
        K_day = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        y = np.random.default_rng(1).normal(size=(3, 4))
        coords = {"station": range(3), "day": range(4), "new_station": ["Dublin"]}

        with pm.Model(coords=coords) as model:
            length_scale = pm.LogNormal("length_scale")
            sigma = pm.HalfNormal("sigma")

            def covariance(a, b):
                return pm.math.exp(-np.abs(np.subtract.outer(a, b)) / length_scale)

            K_station = covariance(position, position)
            y_grid = pk.TensorNormal(
                "y", 0, [K_station, K_day], sigma=sigma, dims=("station", "day"), observed=y
            )
            # In place of pm.sample(), which takes longer
            idata = pm.sample_prior_predictive(20, random_seed=1)

        with model:
            new_position = np.array([1.8])
            pk.conditional(
                "dublin",
                given=y_grid,
                cross_covs=[covariance(new_position, position), None],
                new_covs=[covariance(new_position, new_position), None],
                dims=("new_station", "day"),
            )
            predictions = pm.sample_posterior_predictive(
                idata["prior"].to_dataset(),
                var_names=["dublin", "dublin_mean", "dublin_variance"],
                predictions=True,
                random_seed=1,
                progressbar=False,
            )
        predictions["predictions"]["dublin"].sel(new_station="Dublin", day=2).shape
    """
    model = modelcontext(model)
    mean_of_given, covariance, value = _read_given(given, model)
    event_ndim = given.owner.op.ndim_supp
    crosses, new_factors = read_new_points(covariance.signal, cross_covs, new_covs)
    if covariance.noise is None and all(cross is None for cross in crosses):
        raise ValueError(
            "There is nothing to predict: all cross_covs are None, so that the new cells are those "
            f"of {given.name}, which has no noise. Pass the covariances of new points with those "
            "of the grid for at least one factor."
        )
    noisy = read_noise(new_factors, sigma, noise_covs)
    prediction = Prediction(
        covariance,
        crosses,
        KroneckerCovariance(new_factors),
        None if noisy is None else KronSumCovariance(noisy).noise,
    )
    sizes = prediction.new.sizes
    mu = read_mu(mu, sizes, event_ndim)
    if dims is not None and event_ndim == len(sizes):
        lengths = {dim: current_length(length) for dim, length in model.dim_lengths.items()}
        check_dims(dims, lengths, sizes)

    def as_event(vectors: TensorVariable) -> TensorVariable:
        return vectors.reshape((*tuple(vectors.shape)[:-1], *event_of(sizes, event_ndim)))

    delta = raveled(value - mean_of_given, event_ndim)
    mean, variance = pt.broadcast_arrays(
        mu + as_event(prediction.mean(delta)), as_event(prediction.variance())
    )
    batch_shape = tuple(mean.shape)[: mean.type.ndim - event_ndim]
    z = Normal(f"{name}_whitened", size=(*batch_shape, prediction.n_whitened), model=model)
    draws = mu + as_event(prediction.draw(delta, z))
    return Conditional(
        Deterministic(name, draws, model=model, dims=dims),
        Deterministic(f"{name}_mean", mean, model=model, dims=dims),
        Deterministic(f"{name}_variance", variance, model=model, dims=dims),
    )


@dataclass(frozen=True)
class Prediction:
    """The distribution of new cells given the residual of a grid.

    Attributes
    ----------
    covariance
        The covariance of the grid.
    crosses
        For each factor, ``C_i``, or None without new points.
    new
        The covariance of the new cells, with factors ``T_i``.
    noise
        The covariance of the noise of the new cells, if they have any.
    """

    covariance: Covariance
    crosses: Sequence[TensorVariable | None]
    new: KroneckerCovariance
    noise: KroneckerCovariance | None

    def mean(self, delta: TensorVariable) -> TensorVariable:
        """Return the mean without that of the new cells themselves: ``(N)->(M)``."""
        return self.covariance.regress(self.crosses, delta)

    def variance(self) -> TensorVariable:
        """Return the variances, ``(..., M)``."""
        explained = self.covariance.explained_variance(self.crosses)
        # A point of the grid without noise has a variance of zero, up to rounding
        variance = pt.maximum(self.new.diagonal() - explained, 0)
        return variance if self.noise is None else variance + self.noise.diagonal()

    @property
    def n_whitened(self) -> TensorVariable | int:
        """How many standard normal variables a draw takes."""
        return sum(self._n_whitened)

    @property
    def _n_whitened(self) -> list[TensorVariable | int]:
        """How many there are for the signal and the new cells, the noise, and the new noise."""
        n_joint = math.prod(
            size if cross is None else size + new_size
            for size, new_size, cross in zip(
                self.covariance.sizes, self.new.sizes, self.crosses, strict=True
            )
        )
        n_noise = 0 if self.covariance.noise is None else math.prod(self.covariance.sizes)
        return [n_joint, n_noise, 0 if self.noise is None else math.prod(self.new.sizes)]

    def draw(self, delta: TensorVariable, z: TensorVariable) -> TensorVariable:
        """Return a draw without the mean of the new cells, from standard normal variables."""
        n_joint, n_noise, _ = self._n_whitened
        roots, new_roots = zip(*map(self._joint_root, range(len(self.crosses))), strict=True)
        joint = z[..., :n_joint]
        residual = delta - kron_matmul(roots, joint)
        if self.covariance.noise is not None:
            residual -= self.covariance.noise.color(z[..., n_joint : n_joint + n_noise])
        draw = kron_matmul(new_roots, joint) + self.mean(residual)
        return draw if self.noise is None else draw + self.noise.color(z[..., n_joint + n_noise :])

    def _joint_root(self, axis: int) -> tuple[TensorVariable, TensorVariable]:
        """Return the rows of a root of ``[[S, C'], [C, T]]``, which may be singular."""
        cross = self.crosses[axis]
        if cross is None:
            root = self.covariance.signal_root(axis)
            return root, root
        signal = self.covariance.signal[axis]
        values, vectors = finite_eigh(
            _block_matrix(signal.covariance(), cross, self.new.factors[axis].covariance())
        )
        root = vectors * pt.sqrt(pt.maximum(values, 0))[..., None, :]
        return root[..., : signal.size, :], root[..., signal.size :, :]


def _block(signal: TensorVariable, cross: TensorVariable, new: TensorVariable) -> TensorVariable:
    upper = pt.concatenate([signal, cross.mT], axis=-1)
    return pt.concatenate([upper, pt.concatenate([cross, new], axis=-1)], axis=-2)


_block_matrix = pt.vectorize(_block, "(n,n),(m,n),(m,m)->(r,r)")


def _read_given(
    given: TensorVariable, model: Model
) -> tuple[TensorVariable, Covariance, TensorVariable]:
    """Return the mean and the covariance of a variable, and its value."""
    if isinstance(given, Variable) and given in model.basic_RVs:
        op = given.owner.op
        if isinstance(op, GridMvNormalRV):
            _rng, _size, mu, *parts = given.owner.inputs
            observed = given in model.observed_RVs
            value = model.rvs_to_values[given] if observed else given
            missing = evaluated(pt.isnan(value), Constant, SharedVariable) if observed else None
            if missing is not None and missing.any():
                raise ValueError(
                    f"{given.name} has {missing.sum()} missing cells, and a prediction from the "
                    "others has no Kronecker structure. predict_missing predicts the missing cells."
                )
            return mu, op.covariance(*parts), value
    names = [rv.name for rv in model.basic_RVs if isinstance(rv.owner.op, GridMvNormalRV)]
    raise TypeError(
        "given must be a KroneckerMvNormal or TensorNormal of the model without missing cells, of "
        f"which there are {names}, got {given}. A pm.MvNormal, or a variable of pymc.dims, can be "
        "written as one."
    )
