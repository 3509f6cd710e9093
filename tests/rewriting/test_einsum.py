import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    WITHOUT_KRON,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    random_spd,
)

N = 12
RNG = np.random.default_rng(13)
ARRAYS = [
    random_spd(RNG, 3),
    random_spd(RNG, 4),
    RNG.normal(size=N),
    RNG.normal(size=(N, 5)),
]
A, B = pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(4, 4))
x, X = pt.tensor("x", shape=(N,)), pt.tensor("X", shape=(N, 5))
INPUTS = [A, B, x, X]
K = pt.linalg.kron(A, B)
A_ANY, B_ANY, x_ANY = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
K_ANY = pt.linalg.kron(A_ANY, B_ANY)

# The einsum and its operands; the inputs are those of the operands
PRODUCTS = {
    "K @ x": ("ij,j->i", K, x),
    "x @ K": ("i,ij->j", x, K),
    "K.T @ x": ("ji,j->i", K, x),
    "K @ X": ("ij,jk->ik", K, X),
    "x @ K @ x": ("i,ij,j->", x, K, x),
    "X.T @ K @ X": ("ik,ij,jl->kl", X, K, X),
    "multiple": ("ij,j->i", -2 * K.T, x),
    "inverse": ("ij,j->i", pt.linalg.inv(K), x),
    "sum": ("i,ij,j->", x, K + 0.5 * pt.eye(N), x),
    "unknown shapes": ("ij,j->i", K_ANY, x_ANY),
    "three operands of unknown shapes": ("i,ij,j->", x_ANY, K_ANY, x_ANY),
}


def inputs_of(name):
    return [A_ANY, B_ANY, x_ANY, X] if "unknown" in name else INPUTS


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients(name):
    inputs = inputs_of(name)
    out = pt.einsum(*PRODUCTS[name])
    gradients = pt.grad(pt.sin(out).sum(), inputs, disconnected_inputs="ignore")
    function = compile_py(inputs, [out, *gradients])
    expected = compile_py(inputs, [out, *gradients], mode=WITHOUT_KRON)(*ARRAYS)
    assert has_kron(compile_py(inputs, out, mode=WITHOUT_KRON).maker.fgraph)
    assert not has_kron(function.maker.fgraph)
    for result, value in zip(function(*ARRAYS), expected, strict=True):
        assert_allclose(result, value, rtol=1e-9, atol=1e-9)
    assert largest_size_in(function, *ARRAYS) < N * N


def test_values_of_numpy():
    a, b, x_value, X_value = ARRAYS
    dense = np.kron(a, b)
    outputs = [pt.einsum(*PRODUCTS[name]) for name in ("K @ x", "x @ K @ x", "K @ X")]
    function = compile_py(INPUTS, outputs)
    expected = [dense @ x_value, x_value @ dense @ x_value, dense @ X_value]
    for result, value in zip(function(*ARRAYS), expected, strict=True):
        assert_allclose(result, value, rtol=1e-10)


kron_of_batch = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
NOT_PRODUCTS = {
    "trace": (("ii->", K), lambda K, x: K.trace()),
    "diagonal": (("ii->i", K), lambda K, x: K.diagonal()),
    "inner product": (
        ("ij,ij->", K, pt.exp(pt.outer(x, x))),
        lambda K, x: (K * np.exp(np.outer(x, x))).sum(),
    ),
    "batch": (
        ("bij,j->bi", kron_of_batch(pt.stack([A, 2 * A]), B), x),
        lambda K, x: np.stack([K @ x, 2 * K @ x]),
    ),
}


@pytest.mark.parametrize("name", NOT_PRODUCTS)
def test_what_is_made_of_other_operations_is_refused(name):
    arguments, numeric = NOT_PRODUCTS[name]
    with listening() as entries:
        function = compile_py(INPUTS, pt.einsum(*arguments))
    assert has_kron(function.maker.fgraph)
    [refusal] = {entry.refusal for entry in entries if entry.rewrite == "einsum_of_kron"}
    assert refusal.reason == "this einsum isn't made of products of matrices"
    assert "`K @ x`" in refusal.advice
    expected = numeric(dense_kron(*ARRAYS[:2]), ARRAYS[2])
    assert_allclose(function(*ARRAYS), expected, rtol=1e-10)


def test_an_einsum_without_a_product_is_left_to_pytensor():
    C = pt.tensor("C", shape=(N, N))
    with listening() as entries:
        compile_py([C, x], pt.grad(pt.einsum("i,ij,j->", x, C, x), C))
    assert not entries
