import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions import assume

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    AS_WRITTEN,
    compile_py,
    has_kron,
    largest_size_in,
    random_spd,
    symbolic_dense_kron,
)

N = 15
DIAGONAL = np.arange(N)
RNG = np.random.default_rng(13)
ARRAYS = [random_spd(RNG, 3), random_spd(RNG, 5), np.array(0.7), RNG.normal(size=N)]
A, B = pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(5, 5))
s, v = pt.dscalar("s"), pt.tensor("v", shape=(N,))
INPUTS = [A, B, s, v]


def loss(M):
    """Hold a solution, a log-determinant, a product with a vector, a diagonal and a norm of M."""
    solution = pt.linalg.solve(M, v, assume_a="pos")
    return v @ solution + pt.linalg.slogdet(M)[1] + (M @ pt.cos(v)).sum() + pt.diag(M) @ pt.sin(v)


def assert_factorwise(increment):
    """Compare the loss and its gradients, taken before the rewrites, with the dense graph."""
    value, dense = (loss(increment(kron(A, B))) for kron in (pt.linalg.kron, symbolic_dense_kron))
    function = compile_py(INPUTS, [value, *pt.grad(value, INPUTS)])
    reference = compile_py(INPUTS, [dense, *pt.grad(dense, INPUTS)], mode=AS_WRITTEN)
    for result, expected in zip(function(*ARRAYS), reference(*ARRAYS), strict=True):
        if result.ndim == 2:
            result, expected = result + result.T, expected + expected.T
        assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
    assert not has_kron(function.maker.fgraph)
    assert largest_size_in(function, *ARRAYS) < N * N


@pytest.mark.parametrize(
    "index", [DIAGONAL, pt.arange(N), DIAGONAL.astype("uint8")], ids=["np", "pt", "uint8"]
)
def test_noise(index):
    assert_factorwise(lambda K: pt.inc_subtensor(K[index, index], s))


@pytest.mark.parametrize(
    "increment",
    [
        lambda K: (2 * K).T[np.diag_indices(N)].inc(s)[DIAGONAL, DIAGONAL].inc(1e-3),
        lambda K: s * (K + s * pt.eye(N))[DIAGONAL, pt.arange(N)].inc(s * np.ones(N)),
        lambda K: K + pt.zeros((N, N))[DIAGONAL, DIAGONAL].inc(s),
        lambda K: K + pt.zeros((N, N))[DIAGONAL, DIAGONAL].set(s),
    ],
    ids=["twice", "of a sum", "of zeros", "of zeros, set"],
)
def test_noise_written_in_other_ways(increment):
    assert_factorwise(increment)


def test_different_noise_is_a_sum_too():
    K = pt.linalg.kron(A, B)
    function = compile_py(INPUTS, K[DIAGONAL, DIAGONAL].inc(v) @ pt.cos(v), mode="FAST_RUN")
    assert not has_kron(function.maker.fgraph)
    a, b, _, x = ARRAYS
    assert_allclose(function(*ARRAYS), (np.kron(a, b) + np.diag(x)) @ np.cos(x), rtol=1e-10)


def test_what_stays_dense_is_an_increment_again():
    K = pt.linalg.kron(A, B)
    function = compile_py(INPUTS, pt.exp(K[DIAGONAL, DIAGONAL].inc(v)))
    names = {type(node.op).__name__ for node in function.maker.fgraph.apply_nodes}
    assert "AdvancedIncSubtensor" in names
    assert "Alloc" not in names
    a, b, _, x = ARRAYS
    assert_allclose(function(*ARRAYS), np.exp(np.kron(a, b) + np.diag(x)), rtol=1e-10)


def test_factors_of_unknown_shape_that_are_known_to_be_symmetric():
    C, D = (assume(pt.dmatrix(name), symmetric=True) for name in "CD")
    K = pt.linalg.kron(C, D)
    i = pt.arange(K.shape[0])
    inputs = [C.owner.inputs[0], D.owner.inputs[0], s, v]
    function = compile_py(inputs, pt.linalg.solve(K[i, i].inc(s), v))
    assert not has_kron(function.maker.fgraph)
    a, b, noise, x = ARRAYS
    assert_allclose(
        function(*ARRAYS), np.linalg.solve(np.kron(a, b) + noise * np.eye(N), x), rtol=1e-10
    )


NOT_THE_DIAGONAL = {
    "a part": (DIAGONAL[:5], DIAGONAL[:5]),
    "another order": (DIAGONAL, DIAGONAL[::-1]),
    "twice": (DIAGONAL // 2, DIAGONAL // 2),
    "two rows": (DIAGONAL[:, None], DIAGONAL),
    "a mask": (np.eye(N, dtype=bool),),
    "not from zero": (pt.arange(1, N), pt.arange(1, N)),
    "every other": (pt.arange(0, N, 2), pt.arange(0, N, 2)),
    "rows": (DIAGONAL,),
}


@pytest.mark.parametrize("name", NOT_THE_DIAGONAL)
def test_other_entries_are_refused(name):
    indices = NOT_THE_DIAGONAL[name]
    with listening() as entries:
        function = compile_py(INPUTS, pt.linalg.kron(A, B)[indices].inc(s) @ v)
    assert has_kron(function.maker.fgraph)
    [refusal] = {
        entry.refusal for entry in entries if entry.rewrite == "increment_of_kron_diagonal"
    }
    assert refusal.reason == "what is incremented isn't known to be its whole diagonal"
    a, b, noise, x = ARRAYS
    M = np.kron(a, b)
    np.add.at(M, tuple(getattr(i, "eval", lambda i=i: i)() for i in indices), noise)
    assert_allclose(function(*ARRAYS), M @ x, rtol=1e-10)


def test_setting_the_diagonal_is_left_alone():
    with listening() as entries:
        function = compile_py(INPUTS, pt.linalg.kron(A, B)[DIAGONAL, DIAGONAL].set(s) @ v)
    assert not [entry for entry in entries if entry.rewrite == "increment_of_kron_diagonal"]
    a, b, noise, x = ARRAYS
    M = np.kron(a, b)
    np.fill_diagonal(M, noise)
    assert_allclose(function(*ARRAYS), M @ x, rtol=1e-10)


def test_a_diagonal_that_is_shorter_than_the_rows_is_refused():
    R, S = pt.tensor("R", shape=(2, 3)), pt.tensor("S", shape=(2, 2))
    w = pt.tensor("w", shape=(6,))
    i = np.arange(4)
    function = compile_py([R, S, s, w], pt.linalg.kron(R, S)[i, i].inc(s) @ w)
    assert has_kron(function.maker.fgraph)
    r, q = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 2))
    M = np.kron(r, q)
    M[i, i] += 0.7
    assert_allclose(function(r, q, 0.7, np.arange(6.0)), M @ np.arange(6.0), rtol=1e-10)


def test_the_entries_of_a_diagonal():
    K = pt.linalg.kron(A, B)
    M = K + s * pt.outer(v, v)
    function = compile_py(INPUTS, [K[DIAGONAL, DIAGONAL], M[pt.arange(N), DIAGONAL]])
    assert not has_kron(function.maker.fgraph)
    a, b, c, x = ARRAYS
    diagonal = np.kron(a, b).diagonal()
    for result, expected in zip(function(*ARRAYS), [diagonal, diagonal + c * x**2], strict=True):
        assert_allclose(result, expected, rtol=1e-10)
    assert largest_size_in(function, *ARRAYS) < N * N
