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

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

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

EPS = float(np.finfo(pytensor.config.floatX).eps)
STEP = EPS**0.2
"""Differences of fourth order with this step have a relative error of about ``EPS**0.8``."""
TOLERANCE, VISIBLE = EPS**0.4, EPS**0.2
"""Above errors: the relative distance of equal directions, and a change that isn't none."""

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


def shared_scales(model: Model) -> tuple[SharedScale, ...]:
    """Return the factors of Kronecker products whose scales the data can't tell apart."""
    readings = read_model(model)
    owners: dict[ModelProduct, list[str]] = {}
    for root, reading in readings.items():
        for product in dict.fromkeys(reading.products):
            owners.setdefault(product, []).append(root.name)

    counts = [len(product.matrices) for product in owners]
    matrices = [matrix for product in owners for matrix in product.matrices]
    graphs = model.replace_rvs_by_values(matrices) if matrices else []
    free = _values_in(graphs, model.continuous_value_vars)
    is_free = iter([bool(_values_in([graph], free)) for graph in graphs])
    if all(sum(islice(is_free, count)) < 2 for count in counts):
        return ()
    point = _regular_point(model, free, graphs)
    if point is None:
        return ()

    factors = _linearized(graphs, free, point)
    scales, moves = _unidentified(factors, counts)
    if scales.any():
        # The prior of what moves says nothing about the data
        moved = {model.values_to_rvs[value] for value in free}
        likelihoods = [reading for root, reading in readings.items() if root not in moved]
        graphs = _others(model, likelihoods, free, point)
        values = _values_in(graphs, model.value_vars)
        others = _linearized(graphs, free, {**_start(model, values), **point})
        scales, moves = _unidentified(factors, counts, others)

    names = [model.values_to_rvs[value].name for value in free]
    blocks = np.split(np.arange(len(moves)), np.cumsum([point[value].size for value in free])[:-1])
    rows = zip(factors, scales, strict=True)
    found = []
    for product, roots in owners.items():
        own = list(islice(rows, len(product.matrices)))
        changes = np.array([change for _, change in own])
        described = [
            ScaledFactor(
                position,
                Factor(name, factor.shape),
                tuple(
                    variable
                    for variable, block in zip(names, blocks, strict=True)
                    if _is_change(factor.jacobian[:, block] @ moves[block], factor.value)
                ),
            )
            for position, (name, (factor, change)) in enumerate(
                zip(product.names, own, strict=True), 1
            )
            if _is_change(change)
        ]
        if described:
            n_unidentified = int(np.linalg.matrix_rank(changes, tol=VISIBLE))
            found.append(SharedScale(", ".join(roots), tuple(described), n_unidentified))
    return tuple(found)


def _is_change(change: Array, value: Array | float = 1.0) -> bool:
    return bool(np.linalg.norm(change) > VISIBLE * np.linalg.norm(value))


def _values_in(graphs: Sequence[Variable], values: Sequence[Variable]) -> list[Variable]:
    """Return those of the values that graphs are computed from."""
    needed = set(ancestors(graphs))
    return [value for value in values if value in needed]


def _unidentified(
    factors: Sequence[_Linear], counts: Sequence[int], others: Sequence[_Linear] = ()
) -> tuple[Array, Array]:
    """Return a basis of all ``s``, a column each, and a ``v`` for each of them.

    Parameters
    ----------
    factors
        The factors of all products, one product after the other.
    counts
        The number of factors of each product.
    others
        What has to stay the same.
    """
    norms = [np.linalg.norm(factor.value) for factor in factors]
    units = [factor.value[:, None] / norm for factor, norm in zip(factors, norms, strict=True)]
    jacobian = np.vstack(
        [factor.jacobian / norm for factor, norm in zip(factors, norms, strict=True)]
        + [
            other.jacobian / np.linalg.norm(other.jacobian)
            for other in others
            if np.linalg.norm(other.jacobian) > EPS**0.7 * np.linalg.norm(other.value)
        ]
    )
    # s with the sum zero for each product, and what they do to the factors
    contrasts = block_diag(*(null_space(np.ones((1, count))) for count in counts))
    targets = np.zeros((len(jacobian), contrasts.shape[1]))
    scaled = block_diag(*units)
    targets[: len(scaled)] = scaled @ contrasts

    lengths = np.linalg.norm(jacobian, axis=0)
    lengths[lengths < TOLERANCE] = np.inf
    U, singular, Vt = np.linalg.svd(jacobian / lengths, full_matrices=False)
    rank = np.count_nonzero(singular > TOLERANCE * singular.max())
    U, singular, Vt = U[:, :rank], singular[:rank], Vt[:rank]
    # The part of the targets that no v has is orthogonal to the columns of the Jacobian
    _, distances, Wt = np.linalg.svd(targets - U @ (U.T @ targets), full_matrices=False)
    shared = Wt[distances < TOLERANCE].T
    moves = (Vt.T / singular) @ (U.T @ targets @ shared) / lengths[:, None]
    return contrasts @ shared, moves


def _others(
    model: Model, likelihoods: Sequence[Reading], free: Sequence[Variable], point: Point
) -> list[Variable]:
    """Return what depends on the free coordinates other than through the products."""
    others = [other for reading in likelihoods for other in reading.others]
    formed = [product for reading in likelihoods for product in reading.formed]
    graphs = model.replace_rvs_by_values([*others, *formed])
    others, formed = graphs[: len(others)], graphs[len(others) :]
    if formed:
        constants = {value: value.type.make_constant(array) for value, array in point.items()}
        fixed = clone_replace(formed, constants)
        others = clone_replace(others, dict(zip(formed, fixed, strict=True)))
    return [other for other in others if _values_in([other], free)]


def _regular_point(
    model: Model, free: Sequence[Variable], graphs: Sequence[Variable]
) -> Point | None:
    """Return a point near where a sampler starts at which all factors are numbers."""
    start = _start(model, _values_in(graphs, model.value_vars))
    if sum(start[value].size for value in free) > MAX_COORDINATES:
        return None
    function = _compiled(list(start), graphs)
    rng = np.random.default_rng(1)
    for width in (0.3, 0.1, 0.03):
        point = {**start}
        for value in free:
            array = start[value]
            moved = array + width * np.maximum(1, abs(array)) * rng.normal(size=array.shape)
            point[value] = np.asarray(moved, dtype=array.dtype)
        # A factor that isn't positive definite may be an error
        with suppress(ArithmeticError, AssertionError, ValueError):
            if all(np.isfinite(array).all() for array in function(*point.values())):
                return point
    return None


def _start(model: Model, values: Sequence[Variable]) -> dict[Variable, np.ndarray]:
    expressions = make_initial_point_expression(
        free_rvs=model.free_RVs,
        rvs_to_transforms=model.rvs_to_transforms,
        initval_strategies=model.rvs_to_initial_values,
        return_transformed=True,
    )
    known = dict(zip(model.value_vars, expressions, strict=True))
    arrays = _compiled([], [known[value] for value in values])()
    return dict(zip(values, map(np.asarray, arrays), strict=True))


def _linearized(
    outputs: Sequence[Variable], free: Sequence[Variable], point: Point
) -> list[_Linear]:
    n_coordinates = sum(point[value].size for value in free)
    function = _compiled(list(point), outputs)
    rng = np.random.default_rng(2)
    arrays = function(*point.values())
    # Random combinations of columns, with at least as many entries as there are unknowns
    mixes = [
        rng.normal(size=(array.shape[-1], count))
        if array.ndim > 1 and (count := n_coordinates // array.shape[-2] + 4) < array.shape[-1]
        else None
        for array in arrays
    ]

    def entries(arrays: Sequence[np.ndarray]) -> list[Array]:
        mixed = (
            array if mix is None else array @ mix for array, mix in zip(arrays, mixes, strict=True)
        )
        return [np.ravel(array).astype(float) for array in mixed]

    columns: list[list[Array]] = []
    for value in free:
        for index in np.ndindex(point[value].shape):
            step = STEP * max(1.0, abs(point[value][index]))

            def at(n_steps: int, value=value, index=index, step=step) -> list[Array]:
                moved = point[value].copy()
                moved[index] += n_steps * step
                return entries(function(*{**point, value: moved}.values()))

            # Abramowitz and Stegun (1964), equation 25.3.6 ...
            columns.append(
                [
                    (8 * (one - minus_one) - (two - minus_two)) / (12 * step)
                    for one, minus_one, two, minus_two in zip(
                        at(1), at(-1), at(2), at(-2), strict=True
                    )
                ]
            )
    return [
        _Linear(array.shape, value, np.column_stack(derivatives))
        for array, value, *derivatives in zip(arrays, entries(arrays), *columns, strict=True)
    ]


def _compiled(inputs: Sequence[Variable], outputs: Sequence[Variable]) -> Function:
    mode = Mode(linker="py", optimizer="fast_compile")
    return pytensor.function(inputs, outputs, mode=mode, on_unused_input="ignore")
