"""What the distributions and potentials of a model are computed from: products, and all else."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from pymc.distributions.multivariate import KroneckerNormalRV, MatrixNormalRV
from pymc.model import Model
from pytensor.graph.basic import Variable
from pytensor.graph.traversal import ancestors, toposort
from pytensor.tensor.random.type import RandomType
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance, KronSumCovariance
from pymc_kron.distributions.grid_rv import GridMvNormalRV
from pymc_kron.rewriting.journal import name_of
from pymc_kron.structure import Matrices, gram_root, inverted_matrix, kron_factors


@dataclass(frozen=True)
class ModelProduct:
    """A Kronecker product of covariance matrices, or of their roots or inverses.

    Attributes
    ----------
    key
        Products with the same key are the same.
    matrices
        The factors.
    names
        The names of the factors, "?" for those without one.
    """

    key: Hashable
    matrices: Matrices = field(compare=False)
    names: Sequence[str] = field(compare=False)


@dataclass(frozen=True)
class Reading:
    """What the distribution of a variable, or a potential, is computed from.

    Attributes
    ----------
    products
        Kronecker products.
    others
        Everything else: means, noise, a mixture's weights.
    formed
        The products that some of the others are computed from, as variables.
    """

    products: list[ModelProduct] = field(default_factory=list)
    others: list[Variable] = field(default_factory=list)
    formed: list[TensorVariable] = field(default_factory=list)


def read_model(model: Model) -> dict[Variable, Reading]:
    """Read each variable of a model, given the other ones, and each potential."""
    rvs = model.basic_RVs
    readings = {rv: Reading() for rv in rvs}
    for rv, reading in readings.items():
        _read_variable(rv, [other for other in rvs if other is not rv], reading)
    for potential in model.potentials:
        readings[potential] = Reading()
        _read_parameter(potential, rvs, readings[potential])
    return readings


def _read_variable(rv: Variable, given: Sequence[Variable], reading: Reading) -> None:
    # All that is random itself; where it meets what isn't, there are the parameters
    drawn: set[Variable] = set()
    for node in toposort([rv], blockers=given):
        if not any(isinstance(inp.type, RandomType) or inp in drawn for inp in node.inputs):
            continue
        drawn.update(node.outputs)
        parameters = list(node.inputs)
        match node.op:
            case GridMvNormalRV():
                parameters, parts = parameters[:3], parameters[3:]
                reading.products.extend(_products_of(node.op.covariance(*parts)))
            case KroneckerNormalRV():
                parameters, factors = parameters[:4], parameters[4:]
                reading.products.append(_product(tuple(factors), factors))
            case MatrixNormalRV():
                parameters, factors = parameters[:3], parameters[3:]
                reading.products.append(_product(tuple(factors), factors))
        for parameter in parameters:
            if parameter not in drawn and "float" in getattr(parameter.type, "dtype", ""):
                _read_parameter(parameter, given, reading)


def _read_parameter(parameter: Variable, given: Sequence[Variable], reading: Reading) -> None:
    """Read a parameter: the longest products in it, and what it is beside them."""
    products = {var for var in ancestors([parameter], blockers=given) if _is_product(var)}
    inner = {inp for var in products for inp in var.owner.inputs}
    formed = [var for var in products if var not in inner]
    reading.products.extend(_product((var,), kron_factors(var) or ()) for var in formed)
    if parameter not in formed:
        reading.formed.extend(formed)
        reading.others.append(parameter)


def _is_product(var: Variable) -> bool:
    return isinstance(var, TensorVariable) and var.type.ndim > 1 and kron_factors(var) is not None


def _products_of(covariance: Covariance) -> Iterator[ModelProduct]:
    match covariance:
        case KronSumCovariance(kron_sum):
            for i, scale in enumerate(kron_sum.scales):
                yield _product((*kron_sum.inputs, i), kron_sum.factors(i), scale)
        case _:
            factors = [factor.covariance() for factor in covariance.signal]
            yield _product(tuple(covariance.parts), factors)


def _product(key: Hashable, factors: Matrices, scale: TensorVariable | None = None) -> ModelProduct:
    names = tuple(map(_name_of, factors))
    if scale is not None:
        first, *others = factors
        factors = [scale[..., None, None] * first, *others]
    return ModelProduct(key, factors, names)


def _name_of(matrix: TensorVariable) -> str:
    """Return the name of a covariance, or of what it was computed from."""
    known = (matrix, inverted_matrix(matrix), gram_root(matrix))
    names = [name_of(var) for var in known if var is not None]
    return next((name for name in names if name != "?"), "?")
