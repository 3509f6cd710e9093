import numpy as np
import pytensor.tensor as pt
import pytest
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph

from pymc_kron import structure
from tests.helpers import PY, symbolic_matrices

A, B, C = symbolic_matrices([np.empty((1, 1))] * 3)
kron = pt.linalg.kron
batched_kron = pt.vectorize(kron, "(i,j),(k,l)->(m,n)")


def names(factors):
    """Return what the factors are transposes of, marked with a prime."""
    stripped = map(structure.strip_transposes, factors)
    return [core.name + "'" * transposed for core, transposed in stripped]


def test_nested_products_are_flattened():
    assert names(structure.kron_factors(kron(A, B))) == ["A0", "A1"]
    assert names(structure.kron_factors(kron(kron(A, B), C))) == ["A0", "A1", "A2"]
    assert names(structure.kron_factors(kron(A, kron(B, C)))) == ["A0", "A1", "A2"]


def test_transposes_go_to_the_factors():
    product = kron(A, kron(B, C.T).T).T
    assert names(structure.kron_factors(product)) == ["A0'", "A1", "A2'"]
    assert names(structure.kron_factors(kron(A, B).T.T)) == ["A0", "A1"]


MULTIPLES = {
    "c * K": (lambda c, K: c * K, 2.5),
    "K * c": (lambda c, K: K * c, 2.5),
    "-K": (lambda c, K: -K, -1),
    "K / c": (lambda c, K: K / c, 0.4),
    "c * K.T * 3": (lambda c, K: c * K.T * 3, 7.5),
    "-(c * K) / 2": (lambda c, K: -(c * K) / 2, -1.25),
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_scalar_multiples_go_to_the_first_factor(name):
    multiple, value = MULTIPLES[name]
    c = pt.dscalar("c")
    first, second = structure.kron_factors(multiple(c, kron(A, B)))
    a, b = np.arange(6.0).reshape(3, 2), np.arange(4.0).reshape(2, 2)
    transposed = "T" in name
    values = {A: a, B: b, c: 2.5}
    result = first.eval(values, mode=PY, on_unused_input="ignore")
    np.testing.assert_allclose(result, value * (a.T if transposed else a), rtol=1e-15)
    assert structure.strip_transposes(second) == (B, transposed)


def test_a_batch_of_scalars_makes_the_first_factor_a_batch():
    scalars = pt.tensor("scalars", shape=(5, 1, 1))
    first, second = structure.kron_factors(scalars * kron(A, B))
    assert first.type.ndim == 3
    assert second is B


def test_multiples_that_are_not_scalar():
    vector, matrix = pt.dvector("vector"), pt.dmatrix("matrix")
    for multiple in (vector * kron(A, B), matrix * kron(A, B), 2 / kron(A, B), kron(A, B) + 1):
        assert structure.kron_factors(multiple) is None
    assert structure.kron_factors(kron(A, B) * kron(A, B)) is None


def test_a_shared_factor_of_a_batch_stays_a_matrix():
    batch = pt.tensor("batch", shape=(5, 2, 2))
    factors = structure.kron_factors(batched_kron(batched_kron(batch, A), B)[None])
    assert [factor.type.ndim for factor in factors] == [3, 2, 2]


def test_what_is_not_a_product_of_matrices():
    assert structure.kron_factors(A) is None
    assert structure.kron_factors(A @ B) is None
    assert structure.kron_factors(kron(pt.vector("v"), A)) is None
    assert structure.kron_factors(kron(pt.tensor3("t"), pt.tensor3("u"))) is None


def test_sizes_are_known_where_static_shapes_are():
    factors = (pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(None, 4)))
    assert structure.column_sizes(factors) == (2, 4)
    rows = structure.row_sizes(factors)
    assert rows[0] == 3
    assert rows[1].eval({factors[1]: np.empty((6, 4))}) == 6


def test_squareness():
    assert structure.is_provably_not_square(pt.tensor("A", shape=(3, 2)))
    assert structure.is_provably_not_square(pt.tensor("A", shape=(5, 3, 2)))
    assert not structure.is_provably_not_square(pt.tensor("A", shape=(3, 3)))
    assert not structure.is_provably_not_square(pt.tensor("A", shape=(3, None)))


def test_what_a_covariance_was_computed_from():
    assert structure.inverted_matrix(pt.linalg.inv(A)) is A
    assert structure.inverted_matrix(assume(pt.linalg.inv(A), positive_definite=True)) is A
    assert structure.inverted_matrix(A) is None
    assert structure.gram_root(A @ A.T) is A
    [transposed] = names([structure.gram_root(A.T @ A)])
    assert transposed == "A0'"
    assert structure.gram_root(A @ A) is None
    assert structure.gram_root(A @ B.T) is None


def test_lower_triangular_by_fact_or_tag():
    tagged = pt.dmatrix("tagged")
    tagged.tag.lower_triangular = True
    for matrix, expected in [
        (tagged, True),
        (assume(A, lower_triangular=True), True),
        (pt.linalg.cholesky(A), True),
        (A, False),
    ]:
        fgraph = FunctionGraph(outputs=[matrix], clone=False)
        assert structure.is_lower_triangular(fgraph, matrix) is expected
