"""The operations on a sum of products, without the rewrites that write them."""

from functools import reduce

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.tensor.linalg.decomposition.eigen import Eigh

from pymc_kron.kron_sum import KronSum, KronSumQuadratic, KronSumSLogDet, KronSumSolve, Layout
from tests.helpers import (
    WITHOUT_KRON,
    compile_py,
    count_ops,
    dense_kron,
    finite_differences,
    random_spd,
    symbolic_dense_kron,
)

SIZES = (2, 3, 4)
I2, I3, I4 = map(np.eye, SIZES)


def random_symmetric(rng, n, batch=()):
    matrix = rng.normal(size=(*batch, n, n))
    return matrix + np.swapaxes(matrix, -1, -2)


def layouts():
    """Return, by name, a layout, the scales, the signals and the metrics or identities."""
    rng = np.random.default_rng(0)
    a, b = random_symmetric(rng, 2), random_symmetric(rng, 3)
    C, D = random_spd(rng, 2), random_spd(rng, 3)
    p, q, r = (random_spd(rng, n) for n in SIZES)
    noise = ((True, True), (False, False))
    return {
        "A x B + c I": (Layout(noise, (False, False)), [1.2, 0.7], [a, b], [I2, I3]),
        "A x B + C x D": (Layout(noise, (True, True)), [1.2, 0.7], [a, b], [C, D]),
        "A x B + C x I": (Layout(noise, (True, False)), [1.2, -0.7], [a, b], [C, I3]),
        "A x I + I x B": (
            Layout(((True, False), (False, True)), (False, False)),
            [1.2, 0.7],
            [p, q],
            [I2, I3],
        ),
        "A x B + C x B + C x I": (
            Layout(((True, True), (False, True), (False, False)), (True, False)),
            [1.2, 0.7, 0.3],
            [a, b],
            [C, I3],
        ),
        "no signal on an axis": (
            Layout(((True, False), (False, False)), (False, False)),
            [1.2, 0.7],
            [a, I3],
            [I2, I3],
        ),
        "no signal beside a metric": (
            Layout(((True, False), (False, False)), (True, False)),
            [1.2, 0.7],
            [a, I3],
            [C, I3],
        ),
        "repeated eigenvalues": (Layout(noise, (False, False)), [1.2, 0.7], [I2, b], [I2, I3]),
        "repeated generalised eigenvalues": (
            Layout(noise, (True, True)),
            [1.2, 0.7],
            [3 * C, b],
            [C, D],
        ),
        "a metric that isn't used": (Layout(((True, True),), (True, True)), [2.0], [p, q], [C, D]),
        "three axes": (
            Layout(((True, True, True), (False, False, True), (False, False, False)), (False,) * 3),
            [1.2, 0.7, 0.4],
            [p, q, r],
            [I2, I3, I4],
        ),
    }


LAYOUTS = layouts()


def dense_sum(layout, scales, signals, metrics, kron):
    factors = [
        [
            signal if uses else metric
            for uses, signal, metric in zip(term, signals, metrics, strict=True)
        ]
        for term in layout.uses_signal
    ]
    return sum(c * reduce(kron, term) for c, term in zip(scales, factors, strict=True))


def parts(name):
    """Return the variables and values of all parts, a sum of them, and the dense one."""
    layout, scales, signals, metrics = LAYOUTS[name]
    scale_vars = [pt.dscalar(f"c{i}") for i, _ in enumerate(scales)]
    signal_vars = [pt.dmatrix(f"S{i}") for i, _ in enumerate(signals)]
    metric_vars = [pt.dmatrix(f"D{i}") for i, _ in enumerate(metrics)]
    own = [metric for metric, has in zip(metric_vars, layout.has_metric, strict=True) if has]
    kron_sum = KronSum(layout, scale_vars, signal_vars, own)
    constant = [
        var if has else value
        for var, value, has in zip(metric_vars, metrics, layout.has_metric, strict=True)
    ]
    M = dense_sum(layout, scale_vars, signal_vars, constant, symbolic_dense_kron)
    values = [np.array(scale) for scale in scales] + signals
    values += [metric for metric, has in zip(metrics, layout.has_metric, strict=True) if has]
    return kron_sum, values, M


def outputs_of(kron_sum, x, y):
    """Return the values of the operations, as numbers."""
    layout, inputs = kron_sum.layout, kron_sum.inputs
    return [
        (KronSumSolve(layout=layout)(*inputs, x) * y).sum(),
        KronSumQuadratic(layout=layout)(*inputs, x),
        KronSumSLogDet(layout=layout)(*inputs)[1],
    ]


def dense_outputs(M, x, y):
    solution = pt.linalg.solve(M, x)
    return [(solution * y).sum(), x @ solution, pt.linalg.slogdet(M)[1]]


def symmetrised(gradient):
    return gradient + np.swapaxes(gradient, -1, -2) if gradient.ndim > 1 else gradient


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_pullbacks(name):
    kron_sum, values, M = parts(name)
    x, y = pt.dvector("x"), pt.dvector("y")
    N = int(np.prod([len(signal) for signal in LAYOUTS[name][2]]))
    vectors = np.random.default_rng(1).normal(size=(2, N))
    inputs = [*kron_sum.inputs, x, y]
    # Different weights, so that nothing cancels
    weights = (1.0, 0.7, -1.3)
    results = []
    for outputs in (outputs_of(kron_sum, x, y), dense_outputs(M, x, y)):
        total = sum(w * out for w, out in zip(weights, outputs, strict=True))
        gradients = pt.grad(total, inputs, disconnected_inputs="ignore")
        function = compile_py(inputs, [*outputs, *gradients])
        results.append(function(*values, *vectors))
    for result, expected in zip(*results, strict=True):
        scale = np.abs(expected).max()
        assert_allclose(symmetrised(result), symmetrised(expected), atol=1e-9 * scale, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_basis(name):
    kron_sum, values, M_var = parts(name)
    basis = kron_sum.basis()
    outputs = [basis.values, *basis.vectors, *kron_sum.roots(basis), M_var]
    Lambda, *matrices, M = compile_py(kron_sum.inputs, outputs)(*values)
    n_axes = len(basis.vectors)
    P, R = dense_kron(*matrices[:n_axes]), dense_kron(*matrices[n_axes:])
    assert_allclose(P.T @ M @ P, np.diag(Lambda), atol=1e-10 * np.abs(Lambda).max())
    assert_allclose(R * Lambda @ R.T, M, atol=1e-10 * np.abs(M).max())


def test_sign_of_the_determinant():
    for name in ("A x B + c I", "A x B + C x D", "A x B + C x I", "A x I + I x B"):
        kron_sum, values, M = parts(name)
        sign, logabsdet = KronSumSLogDet(layout=kron_sum.layout)(*kron_sum.inputs)
        results = compile_py(kron_sum.inputs, [sign, logabsdet, M])(*values)
        expected = np.linalg.slogdet(results[2])
        assert_allclose(results[:2], expected, rtol=1e-10)
        # A sign is constant
        gradients = pt.grad(sign, kron_sum.inputs, disconnected_inputs="ignore")
        assert not any(map(np.any, compile_py(kron_sum.inputs, gradients)(*values)))


BATCHES = {
    # of the scales, the signals, the metric and the vectors
    "one vector": ((), (), (), ()),
    "vectors": ((), (), (), (4,)),
    "stacks of vectors": ((), (), (), (2, 4)),
    "factors": ((), (4,), (), ()),
    "factors and vectors": ((), (4,), (4,), (4,)),
    "scales": ((4,), (), (), ()),
    "scales and vectors": ((4,), (), (), (4,)),
    "metric": ((), (), (4,), (4,)),
    "more dimensions of the vectors": ((4,), (4,), (), (3, 4)),
    "broadcast": ((1,), (2, 1), (4,), (1, 4)),
    "ones of the vectors": ((), (4,), (), (1,)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    """Values and gradients of A x B + C x D against one vector and one matrix at a time."""
    rng = np.random.default_rng(2)
    scale_batch, signal_batch, metric_batch, x_batch = BATCHES[name]
    layout = Layout(((True, True), (False, False)), (True, False))
    values = [
        np.abs(rng.normal(size=scale_batch)) + 0.5,
        np.array(0.7),
        random_spd(rng, 2, batch=signal_batch),
        random_spd(rng, 3),
        random_spd(rng, 2, batch=metric_batch),
        rng.normal(size=(*x_batch, 6)),
    ]
    inputs = [pt.tensor(f"v{i}", shape=value.shape) for i, value in enumerate(values)]
    *sum_inputs, x = inputs
    solution = KronSumSolve(layout=layout)(*inputs)
    form = KronSumQuadratic(layout=layout)(*inputs)
    logdet = KronSumSLogDet(layout=layout)(*sum_inputs)[1]
    total = pt.sin(solution).sum() + pt.sqr(form).sum() + 0.3 * pt.sqr(logdet).sum()

    c, d, a, b, m, _ = inputs
    batched_kron = pt.vectorize(symbolic_dense_kron, "(i,j),(k,l)->(m,n)")
    M = c[..., None, None] * batched_kron(a, b) + d * batched_kron(m, pt.eye(3))
    dense_solution = pt.linalg.solve(M, x, b_ndim=1)
    dense_form = (x * dense_solution).sum(-1)
    dense_logdet = pt.linalg.slogdet(M)[1]
    dense_total = (
        pt.sin(dense_solution).sum() + pt.sqr(dense_form).sum() + 0.3 * pt.sqr(dense_logdet).sum()
    )
    results = compile_py(inputs, [solution, form, logdet, *pt.grad(total, inputs)])(*values)
    expected = compile_py(
        inputs,
        [dense_solution, dense_form, dense_logdet, *pt.grad(dense_total, inputs)],
        mode=WITHOUT_KRON,
    )(*values)
    for result, value in zip(results[:3], expected[:3], strict=True):
        assert result.shape == value.shape
        assert_allclose(result, value, rtol=1e-10)
    for result, value, inp in zip(results[3:], expected[3:], values, strict=True):
        assert result.shape == inp.shape
        symmetric = inp.ndim > 1 and inp.shape[-1] == inp.shape[-2] and inp is not values[-1]
        if symmetric:
            result, value = map(symmetrised, (result, value))
        assert_allclose(result, value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["A x B + C x D", "repeated eigenvalues"])
def test_second_derivatives_of_the_quadratic_form(name):
    kron_sum, values, _ = parts(name)
    x_var, x = pt.dvector("x"), np.random.default_rng(1).normal(size=6)
    inputs = [*kron_sum.inputs, x_var]
    form = KronSumQuadratic(layout=kron_sum.layout)(*inputs)
    weights = np.random.default_rng(3)
    values = [*values, x]
    # A number that all first derivatives are in; those in matrices as symmetric matrices
    directions = [weights.normal(size=value.shape) for value in values]
    directions = [symmetrised(direction) for direction in directions]
    slope = sum(
        (gradient * direction).sum()
        for gradient, direction in zip(pt.grad(form, inputs), directions, strict=True)
    )
    slope_function = compile_py(inputs, slope)
    second = compile_py(inputs, pt.grad(slope, inputs))(*values)
    for i, (result, value) in enumerate(zip(second, values, strict=True)):

        def slope_at(array, i=i):
            # The operations read one triangle: only symmetric matrices mean anything
            array = symmetrised(array) / 2 if array.ndim == 2 else array
            return slope_function(*values[:i], array, *values[i + 1 :])

        expected = finite_differences(slope_at, value)
        result = symmetrised(result) / 2 if value.ndim == 2 else result
        assert_allclose(result, expected, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("definite", [True, False])
def test_a_sum_that_is_not_positive_definite(definite):
    kron_sum, values, M_var = parts("A x B + c I")
    x_var, x = pt.dvector("x"), np.arange(6.0)
    outputs = [
        KronSumSolve(layout=kron_sum.layout, definite=definite)(*kron_sum.inputs, x_var),
        KronSumQuadratic(layout=kron_sum.layout, definite=definite)(*kron_sum.inputs, x_var),
        M_var,
    ]
    function = compile_py([*kron_sum.inputs, x_var], outputs)
    assert count_ops(function.maker.fgraph, Eigh) == 2
    solution, form, M = function(*values, x)
    assert np.linalg.eigvalsh(M).min() < 0
    expected = np.full(6, np.nan) if definite else np.linalg.solve(M, x)
    assert_allclose(solution, expected, rtol=1e-10)
    assert_allclose(form, x @ expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("which", "bad"),
    [(2, np.nan), (2, np.inf), (4, np.nan)],
    ids=["NaN signal", "infinite signal", "NaN metric"],
)
def test_what_is_not_finite_gives_nan(which, bad):
    kron_sum, values, _ = parts("A x B + C x D")
    x = pt.dvector("x")
    values = [value.copy() for value in values]
    values[which][1, 1] = bad
    total = outputs_of(kron_sum, x, x)
    function = compile_py([*kron_sum.inputs, x], [*total, *pt.grad(total[1], kron_sum.inputs)])
    assert all(np.isnan(result).any() for result in function(*values, np.ones(6)))


def test_a_metric_that_is_not_positive_definite_gives_nan():
    kron_sum, values, _ = parts("A x B + C x D")
    x = pt.dvector("x")
    values[4] = -values[4]
    function = compile_py([*kron_sum.inputs, x], outputs_of(kron_sum, x, x))
    assert np.isnan(function(*values, np.ones(6))).all()


def test_equal_operations_are_merged():
    kron_sum, values, _ = parts("A x B + C x D")
    x = pt.dvector("x")
    outputs = outputs_of(kron_sum, x, x)
    gradients = pt.grad(outputs[1] + outputs[2], [*kron_sum.inputs, x])
    function = compile_py([*kron_sum.inputs, x], [*outputs, *gradients])
    assert count_ops(function.maker.fgraph, Eigh) == 2
    assert all(np.isfinite(result).all() for result in function(*values, np.ones(6)))
