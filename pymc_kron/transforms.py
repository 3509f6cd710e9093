"""Transforms of the distributions: a latent field in the coordinates in which it is white.

With ``K = R R'``, the field ``x = mu + R z`` has standard normal ``z`` whatever the factors are:
the non-centred parametrization (Papaspiliopoulos, O., Roberts, G. O. and Sköld, M. (2007), "A
general framework for the parametrization of hierarchical models", Statistical Science 22(1),
59-73). Its log-density takes no solve and no determinant::

    log N(mu + R z; mu, K) + log|det R| = -1/2 |z|^2 - N/2 log(2 pi)

The log-density of the distribution sees by itself that its value is ``mu + R z``; see
`pymc_kron.distributions.grid_rv`.
"""

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
    """The transform `whiten` of a variable with a given covariance.

    Attributes
    ----------
    structure
        What the parts of the covariance are, or None where the variable isn't known yet.
    ndim_supp
        How many dimensions a value has.
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

    def _parameters(self, value, inputs) -> tuple[Covariance, TensorVariable]:
        match inputs:
            case (_rng, _size, mu, *parts) if self.structure is not None and parts:
                return covariance_of(self.structure, parts), mu
        raise _unfit(value)


def _unfit(value) -> TypeError:
    op = getattr(value, "owner_op", None)
    if isinstance(op, GridMvNormalRV):
        return TypeError(
            "PyMC doesn't pass a transform the variable that it is of: give it as "
            f"transform=whiten where {value} is created, or here as whiten.of({value})."
        )
    name = "unknown" if op is None else f"a {type(op).__name__}"
    return TypeError(
        "whiten is a transform of KroneckerMvNormal and TensorNormal, given as transform=whiten "
        f"or as whiten.of(variable), got a variable that is {name}. A pm.MvNormal with a product "
        "for its covariance is a KroneckerMvNormal with covs=[K_1, ..., K_d]; for independent "
        "normals there is nothing to whiten but mu + sigma * z."
    )


whiten = WhitenTransform()
