"""Scales that factors of a Kronecker product share: ``A (x) B = cA (x) (B / c)``.

The factors of the products in a model are functions ``K_i(theta)`` of its free variables, in the
coordinates in which they are sampled. The data say nothing about a direction ``v`` of theta with ::

    dK_i v = s_i K_i,    s_1 + ... + s_d = 0 for each product,    s != 0

along which nothing else changes that they depend on: means, noise, the distributions of other
variables, potentials. The products don't, ``d(K_1 (x) ... (x) K_d) v = (s_1 + ... + s_d) K``.
Whether parameters are locally identified is decided by the rank of a Jacobian, at all points but
for a set of measure zero (Rothenberg, T. J. (1971), "Identification in parametric models",
Econometrica 39(3), 577-591, theorem 1). Hence such directions are looked for at one point, as
solutions of a linear system in ``v`` and ``s``, and it doesn't matter how an amplitude is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from math import prod

import numpy as np
import pytensor
from numpy.typing import NDArray
from pymc.initial_point import make_initial_point_expression
from pymc.model import Model
from pytensor.compile.executor import Function
from pytensor.compile.mode import Mode
from pytensor.graph.basic import Variable
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import ancestors
from scipy.linalg import block_diag, null_space

from pymc_kron.diagnostics.reading import ModelProduct, Reading, read_model
from pymc_kron.diagnostics.report import Factor, ScaledFactor, SharedScale

MAX_COORDINATES = 2000
"""Each takes four evaluations of the factors. Of a model with more of them nothing is said."""

MAX_CELLS = 4000
"""Of a model of more, nothing is said if it takes an array of the size of a dense covariance."""

type Array = NDArray[np.floating]
type Point = Mapping[Variable, np.ndarray]


@dataclass(frozen=True)
class _Linear:
    """What an array is near a point, to first order.

    Attributes
    ----------
    shape
        The shape of the array.
    value
        Its entries at the point, or of a large matrix as many combinations of them as it takes.
    jacobian
        Their derivatives, with a column for each coordinate.
    """

    shape: tuple[int, ...]
    value: Array
    jacobian: Array


class Undecided(Exception):
    """The scales of a model can't be told to be identified or not."""


def shared_scales(model: Model) -> tuple[SharedScale, ...]:
    """Return the factors of Kronecker products whose scales the data can't tell apart.

    None, where nothing can be said.
    """
    readings = read_model(model)
    owners: dict[ModelProduct, list[str]] = {}
    for root, reading in readings.items():
        for product in dict.fromkeys(reading.products):
            owners.setdefault(product, []).append(root.name)
    counts = [len(product.matrices) for product in owners]
    matrices = [matrix for product in owners for matrix in product.matrices]
    graphs = model.replace_rvs_by_values(matrices) if matrices else []
    is_free = iter([bool(_values_in([graph], model.continuous_value_vars)) for graph in graphs])
    if all(sum(islice(is_free, count)) < 2 for count in counts):
        return ()
    try:
        coordinates = _Coordinates.of(model, graphs)
        factors = coordinates.linearized(graphs)
        scales, moves = _unidentified(factors, counts, coordinates.eps)
        if scales.size:
            beside = coordinates.beside_products(readings)
            _check_size(factors, counts, readings, beside)
            others = coordinates.linearized(beside)
            scales, moves = _unidentified(factors, counts, coordinates.eps, others)
    except Undecided:
        return ()
    found = []
    for product, count, end in zip(owners, counts, accumulate(counts), strict=True):
        changes = scales[end - count : end]
        scaled = tuple(
            ScaledFactor(
                position,
                Factor(name, factor.shape),
                coordinates.variables_that_change(factor, moves),
            )
            for position, (name, factor, change) in enumerate(
                zip(product.names, factors[end - count : end], changes, strict=True), 1
            )
            if np.linalg.norm(change) > coordinates.visible
        )
        if scaled:
            n_unidentified = int(np.linalg.matrix_rank(changes, tol=coordinates.visible))
            found.append(SharedScale(", ".join(owners[product]), scaled, n_unidentified))
    return tuple(found)


def _check_size(
    factors: Sequence[_Linear],
    counts: Sequence[int],
    readings: Mapping[Variable, Reading],
    beside: Sequence[Variable],
) -> None:
    """Check that no dense covariance of a large grid has to be formed."""
    sizes = iter([factor.shape[-1] for factor in factors])
    n_cells = max(prod(islice(sizes, count)) for count in counts)
    is_formed = any(reading.formed for reading in readings.values())
    if n_cells > MAX_CELLS and is_formed and any(graph.type.ndim > 1 for graph in beside):
        raise Undecided(f"the covariance of {n_cells} cells")


def _unidentified(
    factors: Sequence[_Linear], counts: Sequence[int], eps: float, others: Sequence[_Linear] = ()
) -> tuple[Array, Array]:
    """Return a basis of all ``s``, a column each, and a ``v`` for each of them.

    Parameters
    ----------
    factors
        The factors of all products, one product after the other.
    counts
        The number of factors of each product.
    eps
        The precision of the numbers.
    others
        What has to stay the same.
    """
    tolerance = eps**0.4
    norms = [np.linalg.norm(factor.value) for factor in factors]
    rows = [factor.jacobian / norm for factor, norm in zip(factors, norms, strict=True)]
    for other in others:
        size = np.linalg.norm(other.jacobian)
        if size > eps**0.7 * np.linalg.norm(other.value):
            rows.append(other.jacobian / size)
    jacobian = np.vstack(rows)

    # s with the sum zero for each product, and what they do to the factors
    contrasts = block_diag(*(null_space(np.ones((1, count))) for count in counts))
    columns = [factor.value[:, None] / norm for factor, norm in zip(factors, norms, strict=True)]
    scaled = block_diag(*columns) @ contrasts
    targets = np.vstack([scaled, np.zeros((len(jacobian) - len(scaled), scaled.shape[1]))])

    lengths = np.linalg.norm(jacobian, axis=0)
    lengths[lengths < tolerance] = np.inf
    U, singular, Vt = np.linalg.svd(jacobian / lengths, full_matrices=False)
    rank = np.count_nonzero(singular > tolerance * singular.max())
    U, singular, Vt = U[:, :rank], singular[:rank], Vt[:rank]
    # What no v does is orthogonal to the range of the Jacobian
    _, distances, Wt = np.linalg.svd(targets - U @ (U.T @ targets), full_matrices=False)
    shared = Wt[distances < tolerance].T
    moves = (Vt.T / singular) @ (U.T @ targets @ shared) / lengths[:, None]
    return contrasts @ shared, moves


@dataclass(frozen=True)
class _Coordinates:
    """The coordinates that the factors are computed from, near where a sampler starts.

    Attributes
    ----------
    model
        The model.
    values
        The variables whose coordinates they are, as they are sampled.
    point
        The point that they are near, and values of other variables that the factors depend on.
    eps
        The precision of the numbers.
    """

    model: Model
    values: Sequence[Variable]
    point: Point
    eps: float

    @classmethod
    def of(cls, model: Model, graphs: Sequence[Variable]) -> "_Coordinates":
        """Return the coordinates that graphs depend on, at a point where these are numbers."""
        values = _values_in(graphs, model.continuous_value_vars)
        start = _start(model, _values_in(graphs, model.value_vars))
        n_coordinates = sum(start[value].size for value in values)
        if n_coordinates > MAX_COORDINATES:
            raise Undecided(f"{n_coordinates} coordinates")
        eps = max(float(np.finfo(var.type.dtype).eps) for var in (*graphs, *values))
        function = _compiled(list(start), graphs)
        rng = np.random.default_rng(1)
        for width in (0.3, 0.1, 0.03):
            # A point without symmetries
            point = {**start}
            for value in values:
                array = start[value]
                moved = array + width * np.maximum(1, abs(array)) * rng.normal(size=array.shape)
                point[value] = np.asarray(moved, dtype=array.dtype)
            with suppress(Undecided):
                if all(x.any() for x in _numbers(function, point)):
                    return cls(model, values, point, eps)
        raise Undecided("factors that aren't numbers")

    @property
    def rvs(self) -> list[Variable]:
        """The random variables whose coordinates they are."""
        return [self.model.values_to_rvs[value] for value in self.values]

    @property
    def visible(self) -> float:
        """What is larger isn't an error."""
        return self.eps**0.2

    def linearized(self, outputs: Sequence[Variable]) -> list[_Linear]:
        """Return what the outputs are near the point."""
        if not outputs:
            return []
        others = [value for value in self.model.value_vars if value not in self.point]
        point = {**self.point, **_start(self.model, _values_in(outputs, others))}
        function = _compiled(list(point), outputs)
        arrays = _numbers(function, point)
        combine = [self._combinations(array.shape) for array in arrays]

        def entries(point: Point) -> list[Array]:
            numbers = zip(_numbers(function, point), combine, strict=True)
            return [np.ravel(x if mix is None else x @ mix).astype(float) for x, mix in numbers]

        values = entries(point)
        jacobian = np.column_stack(
            [
                _derivative(lambda point: np.concatenate(entries(point)), point, *where, self.eps)
                for where in self._each()
            ]
        )
        ends = list(accumulate(value.size for value in values))[:-1]
        return [
            _Linear(array.shape, value, rows)
            for array, value, rows in zip(arrays, values, np.split(jacobian, ends), strict=True)
        ]

    def _each(self) -> Iterator[tuple[Variable, tuple[int, ...]]]:
        for value in self.values:
            for index in np.ndindex(self.point[value].shape):
                yield value, index

    def _combinations(self, shape: tuple[int, ...]) -> Array | None:
        """Return what takes columns of a large matrix to some random combinations of them.

        They have more entries than there are coordinates, so that almost surely two matrices that
        the coordinates lead to are equal if their combinations are.
        """
        n_columns = len(list(self._each())) // shape[-2] + 4 if len(shape) > 1 else 0
        if n_columns == 0 or n_columns >= shape[-1]:
            return None
        return np.random.default_rng(2).normal(size=(shape[-1], n_columns))

    def beside_products(self, readings: Mapping[Variable, Reading]) -> list[Variable]:
        """Return what depends on the coordinates other than through the products.

        The distributions of the variables whose coordinates they are don't count: the prior of what
        moves says nothing about the data.
        """
        moved = self.rvs
        likelihoods = [reading for root, reading in readings.items() if root not in moved]
        others = [other for reading in likelihoods for other in reading.others]
        formed = [product for reading in likelihoods for product in reading.formed]
        graphs = self.model.replace_rvs_by_values([*others, *formed])
        others, formed = graphs[: len(others)], graphs[len(others) :]
        if formed:
            constants = {
                value: value.type.make_constant(array) for value, array in self.point.items()
            }
            fixed = clone_replace(formed, constants)
            others = clone_replace(others, dict(zip(formed, fixed, strict=True)))
        return [other for other in others if _values_in([other], self.values)]

    def variables_that_change(self, array: _Linear, moves: Array) -> tuple[str, ...]:
        """Return the names of the variables that change an array along some directions."""
        names, end = [], 0
        for rv, value in zip(self.rvs, self.values, strict=True):
            start, end = end, end + self.point[value].size
            change = array.jacobian[:, start:end] @ moves[start:end]
            if np.linalg.norm(change) > self.visible * np.linalg.norm(array.value):
                names.append(rv.name)
        return tuple(names)


def _derivative(
    function: Callable[[Point], Array],
    point: Point,
    value: Variable,
    index: tuple[int, ...],
    eps: float,
) -> Array:
    """Return the derivative in one entry of a value, by differences of fourth order.

    Fornberg, B. (1988), "Generation of finite difference formulas on arbitrarily spaced grids",
    Mathematics of Computation 51, 699-706, table 1. The relative error is about ``eps**0.8``.
    """
    step = eps**0.2 * max(1.0, abs(float(point[value][index])))

    def at(n_steps: int) -> Array:
        moved = point[value].copy()
        moved[index] += n_steps * step
        return function({**point, value: moved})

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def _start(model: Model, values: Sequence[Variable]) -> dict[Variable, np.ndarray]:
    """Return where a sampler starts."""
    expressions = make_initial_point_expression(
        free_rvs=model.free_RVs,
        rvs_to_transforms=model.rvs_to_transforms,
        initval_strategies=model.rvs_to_initial_values,
        return_transformed=True,
    )
    known = dict(zip(model.value_vars, expressions, strict=True))
    arrays = _compiled([], [known[value] for value in values])()
    return dict(zip(values, map(np.asarray, arrays), strict=True))


def _values_in(graphs: Sequence[Variable], values: Sequence[Variable]) -> list[Variable]:
    """Return those of the values that graphs are computed from."""
    needed = set(ancestors(graphs))
    return [value for value in values if value in needed]


def _compiled(inputs: Sequence[Variable], outputs: Sequence[Variable]) -> Function:
    mode = Mode(linker="py", optimizer="fast_compile")
    return pytensor.function(inputs, outputs, mode=mode, on_unused_input="ignore")


def _numbers(function: Function, point: Point) -> list[np.ndarray]:
    """Return the outputs of a function, which all are finite."""
    try:
        arrays = function(*point.values())
    except (ArithmeticError, AssertionError, ValueError) as error:
        # A matrix that isn't positive definite, for example
        raise Undecided("an error") from error
    if not all(np.isfinite(array).all() for array in arrays):
        raise Undecided("numbers that aren't finite")
    return arrays
