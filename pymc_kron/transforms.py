"""Transforms of the distributions: a latent field in the coordinates in which it is white.

With ``K = R R'``, the field ``x = mu + R z`` has standard normal ``z`` whatever the factors are:
the non-centred parametrization (Papaspiliopoulos, O., Roberts, G. O. and Sköld, M. (2007), "A
general framework for the parametrization of hierarchical models", Statistical Science 22(1),
59-73). Its log-density takes no solve and no determinant::

    log N(mu + R z; mu, K) + log|det R| = -1/2 |z|^2 - N/2 log(2 pi)

The log-density of the distribution sees by itself that its value is ``mu + R z``; see
`pymc_kron.distributions.grid_rv`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pymc.logprob.transforms import Transform
from pytensor import tensor as pt
from pytensor.graph.basic import Variable
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance, Structure, covariance_of
from pymc_kron.distributions.grid_rv import GridMvNormalRV, colored, half_logdet, raveled
from pymc_kron.kron_sum import Layout


@dataclass(frozen=True)
class WhitenTransform(Transform):
    """
    Transform of a latent field into the coordinates in which it is white.

    Given as ``transform=whiten`` to a `pymc_kron.KroneckerMvNormal`, a `pymc_kron.TensorNormal` or
    a `pymc_kron.dims.KroneckerMvNormal`, it makes the sampler see independent standard normals
    ``z`` of the shape of the field, whose scales don't change with the hyperparameters. The
    variable, and so the trace, the model graph and predictions, stays the field ``x = mu + R z``
    with covariance ``R R'``. An ``initval`` is one of the field.

    ``R`` is the Kronecker product of the roots of the factors: their Cholesky factors for `covs`
    and `chols`, the transposed inverses of those of `taus`, ``Q diag(sqrt(w))`` for `evds`.

    Attributes
    ----------
    structure
        What the parts of the covariance are; None for `whiten` itself, which a distribution that
        it is given to completes.
    ndim_supp
        How many dimensions a value has.

    Raises
    ------
    NotImplementedError
        If the field has noise, `sigma` or `noise_covs`.
    ValueError
        If the field is observed.
    TypeError
        If the variable is of another distribution, or PyMC calls for a transform that no
        distribution has completed; use ``whiten.of(variable)`` then.

    Notes
    -----
    The log-density of ``z`` is ``-1/2 |z|^2 - N/2 log(2 pi)``, without a solve or a determinant.
    What remains is one product with each root, and its gradient.

    Where the data say much about each cell, the field is better sampled in its own coordinates,
    without a transform (Papaspiliopoulos et al. (2007), section 2).

    References
    ----------
    .. [1] Papaspiliopoulos, O., Roberts, G. O. and Sköld, M. (2007). "A general framework for the
       parametrization of hierarchical models". Statistical Science 22(1), 59-73.

    Examples
    --------
    Rare events on a grid of 3 stations and 4 days:

    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pymc_kron as pk
        from pymc_kron.transforms import whiten

        distance = np.abs(np.subtract.outer([0.0, 1.0, 2.5], [0.0, 1.0, 2.5]))
        lag = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        events = np.random.default_rng(1).poisson(0.5, size=(3, 4))

        coords = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(4)}
        with pm.Model(coords=coords) as model:
            amplitude = pm.HalfNormal("amplitude")
            length_scale = pm.LogNormal("length_scale", shape=2)
            field = pk.TensorNormal(
                "field",
                mu=-1,
                covs=[
                    amplitude**2 * pm.math.exp(-distance / length_scale[0]),
                    pm.math.exp(-lag / length_scale[1]),
                ],
                dims=("station", "day"),
                transform=whiten,
            )
            pm.Poisson("events", pm.math.exp(field), dims=("station", "day"), observed=events)
        model.initial_point()["field_whiten__"].shape

    A transform for a model that is there already:

    .. code-block:: python

        from pymc.model.transform.conditioning import change_value_transforms

        centred = change_value_transforms(model, {"field": None})
        again = change_value_transforms(centred, {"field": whiten.of(centred["field"])})
    """

    structure: Structure | None = None
    ndim_supp: int = 1

    name = "whiten"

    def of(self, rv: TensorVariable) -> "WhitenTransform":
        """Return the transform of one variable, for what changes transforms of a model."""
        op = rv.owner_op
        if not isinstance(op, GridMvNormalRV):
            raise _unfit(rv)
        return self.given(op.structure, op.ndim_supp)

    def given(self, structure: Structure, ndim_supp: int) -> "WhitenTransform":
        """Return the transform of variables with covariances of a structure."""
        if isinstance(structure, Layout):
            raise NotImplementedError(
                "whiten is for fields without noise, got one with sigma or noise_covs: the root "
                "of a sum has no derivative where eigenvalues repeat. Put the noise into the "
                "likelihood, pm.Normal(mu=field, sigma=sigma), and leave it out of the field."
            )
        return WhitenTransform(structure, ndim_supp)

    def forward(self, value: TensorVariable, *inputs: Variable) -> TensorVariable:
        """Return ``inv(R) (x - mu)``, of the shape of the value."""
        covariance, mu = self._parameters(value, inputs)
        delta = pt.as_tensor(value) - mu
        return covariance.whiten(raveled(delta, self.ndim_supp)).reshape(delta.shape)

    def backward(self, value: TensorVariable, *inputs: Variable) -> TensorVariable:
        """Return ``mu + R z``, of the shape of the value."""
        covariance, mu = self._parameters(value, inputs)
        return colored(covariance, mu, pt.as_tensor(value), self.ndim_supp)

    def log_jac_det(self, value: TensorVariable, *inputs: Variable) -> TensorVariable:
        """Return ``log|det R|``, for each entry of a batch."""
        covariance, _ = self._parameters(value, inputs)
        return half_logdet(covariance, raveled(value, self.ndim_supp))

    def _parameters(
        self, value: TensorVariable, inputs: Sequence[Variable]
    ) -> tuple[Covariance, TensorVariable]:
        if self.structure is None:
            raise _unfit(value)
        _rng, _size, mu, *parts = inputs
        return covariance_of(self.structure, parts), mu


def check_latent(observed: object) -> None:
    """Check that a variable with the transform isn't observed: PyMC would transform the data."""
    if observed is not None:
        raise ValueError(
            "whiten is for latent fields, got one with observed data, in which nothing is sampled. "
            "Leave out transform=whiten."
        )


def _unfit(value: object) -> TypeError:
    op = getattr(value, "owner_op", None)
    if isinstance(op, GridMvNormalRV):
        return TypeError(
            "PyMC doesn't tell a transform of which variable it is: give it as "
            f"transform=whiten where {value} is created, or here as whiten.of({value})."
        )
    got = "got one that isn't known" if op is None else f"got a {type(op).__name__}"
    return TypeError(
        "whiten is for variables of KroneckerMvNormal and TensorNormal, as transform=whiten or as "
        f"whiten.of(variable); {got}. A pm.MvNormal with a Kronecker product for its covariance is "
        "a KroneckerMvNormal with covs=[K_1, ..., K_d]."
    )


whiten = WhitenTransform()
