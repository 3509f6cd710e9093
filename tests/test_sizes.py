import pytensor.tensor as pt
import pytest
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.basic import AllocDiag
from pytensor.tensor.math import Dot
from pytensor.tensor.rewriting.shape import ShapeFeature

from pymc_kron.sizes import SizeProduct, Sizes, axis_size, is_provably_square

A, B, C = pt.dmatrices("A", "B", "C")
x, c, n = pt.dvector("x"), pt.dscalar("c"), pt.lscalar("n")
T = pt.dtensor3("T")
WIDE, TALL = pt.tensor("WIDE", shape=(2, 3)), pt.tensor("TALL", shape=(3, 2))


def same(left, axis, right, other_axis):
    """Whether two sizes are known to be equal, as the graph stands and once canonicalized."""
    answers = set()
    for a, b in ((left, right), (rewritten(left), rewritten(right))):
        sizes = Sizes(a, b)
        answers.add(sizes.of(a, axis) == sizes.of(b, other_axis))
    assert len(answers) == 1
    return answers.pop()


def rewritten(var):
    return rewrite_graph(var, include=("canonicalize",), clone=False)


def test_known_and_unknown_sizes():
    known = axis_size(WIDE, -1)
    assert known == SizeProduct(3)
    assert known.is_known
    assert not axis_size(A, -1).is_known
    assert axis_size(A, 1) == axis_size(A, -1)
    assert axis_size(A, 0) != axis_size(A, 1)
    assert axis_size(A, 0) != axis_size(B, 0)


@pytest.mark.parametrize(
    ("matrix", "axis", "leaf", "leaf_axis"),
    [
        (A.T, 0, A, 1),
        (A.T, 1, A, 0),
        (T.mT, -1, T, -2),
        (A[None], -1, A, 1),
        (pt.exp(-A), 0, A, 0),
        (A + c, 1, A, 1),
        (A * x[None, :], 0, A, 0),
        (x[:, None] * pt.ones((1, n)), 0, x, 0),
        (x[:, None] + x[None, :], 1, x, 0),
        (assume(A, symmetric=True), 0, A, 0),
        (pt.specify_shape(A, (None, 3)), 0, A, 0),
        (pt.linalg.inv(A), 0, A, 1),
        (pt.linalg.inv(A), 1, A, 0),
        (pt.linalg.cholesky(A), 0, A, 1),
        (pt.linalg.solve(A, B), 0, A, 1),
        (pt.linalg.solve(A, B), 1, B, 1),
        (pt.linalg.solve(A, B, assume_a="pos"), 0, A, 0),
        (A @ B, 0, A, 0),
        (A @ B, 1, B, 1),
        (Dot()(A, B), 1, B, 1),
        (T @ T, -1, T, -1),
        (pt.eye(A.shape[0]), 1, A, 0),
        (pt.identity_like(A), 0, A, 0),
        (pt.zeros((A.shape[1], n)), 0, A, 1),
        (pt.full((n, A.shape[1]), c), 1, A, 1),
        (pt.zeros_like(A), 1, A, 1),
        (pt.arange(A.shape[1])[:, None], 0, A, 1),
        (pt.diag(x), 0, x, 0),
        (pt.diag(x), 1, x, 0),
        (pt.vectorize(pt.diag, "(n)->(n,n)")(A), -1, A, 1),
        (A.reshape((B.shape[0], B.shape[1])), 1, B, 1),
        (A.astype("float32"), 1, A, 1),
    ],
    ids=lambda value: None,
)
def test_sizes_are_followed(matrix, axis, leaf, leaf_axis):
    for var in (matrix, rewritten(matrix)):
        sizes = Sizes(var, *([leaf] if leaf.type.ndim > 1 else []))
        assert sizes.of(var, axis) == sizes.of(leaf, leaf_axis)


@pytest.mark.parametrize(
    ("left", "axis", "right", "other_axis"),
    [
        (A, 0, A, 1),
        (A.T, 0, A, 0),
        (A @ B, 1, A, 1),
        (A @ A.T, 0, A, 1),
        (pt.diag(x, k=1), 0, x, 0),
        (pt.diagonal(A)[:, None], 0, A, 0),
        (pt.diagonal(pt.linalg.inv(A), offset=1)[:, None], 0, A, 0),
        (A.reshape((B.shape[0], -1)), 1, B, 1),
        (A.reshape((B.shape[0], -1)), 1, C.reshape((B.shape[0], -1)), 1),
        (A[:, 1:], 1, A, 1),
        (A[1:], 0, B[1:], 0),
        (pt.concatenate([A, A]), 0, A, 0),
        (pt.eye(A.shape[0] + 1), 0, A, 0),
        (pt.eye(n), 0, pt.eye(2 * n), 0),
        (pt.linalg.kron(A, B), 0, pt.linalg.kron(A, B), 1),
        (pt.linalg.kron(A, B), 0, A, 0),
        (pt.linalg.kron(A, A), 0, pt.linalg.kron(A, B), 0),
        (AllocDiag(axis1=0, axis2=1, offset=0)(A), 2, A, 1),
    ],
    ids=lambda value: None,
)
def test_nothing_is_claimed_of_sizes_that_may_differ(left, axis, right, other_axis):
    assert not same(left, axis, right, other_axis)


def test_sizes_of_products_multiply():
    K = pt.linalg.kron(A, B)
    assert axis_size(K, 0) == axis_size(A, 0) * axis_size(B, 0)
    assert axis_size(pt.linalg.kron(A, WIDE), 1) == axis_size(A, 1) * SizeProduct(3)
    assert same(K, 0, pt.linalg.kron(B, A), 0)
    assert same(pt.linalg.kron(K, C), 1, pt.linalg.kron(A, pt.linalg.kron(B, C)), 1)
    assert same(pt.linalg.kron(A, A), 0, pt.zeros((A.shape[0] * A.shape[0], 1)), 0)
    assert same(K, 1, pt.zeros((n, A.shape[1] * B.shape[1])), 1)
    assert same(K, 0, pt.eye(K.shape[0]), 1)
    assert same(K, 0, pt.identity_like(K), 0)


def inferred(var, axis):
    """Return an array with the size that PyTensor infers for an axis, and nothing else of it."""
    features = ShapeFeature()
    FunctionGraph(outputs=[var], clone=False, features=[features])
    return pt.zeros((features.get_shape(var, axis), 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_size_that_is_inferred_for_a_reshape(axis):
    # The one that was asked for, unless that is -1; a Kronecker product ends in a Reshape
    for matrix in (pt.linalg.kron(A, B), A.reshape((B.shape[1], B.shape[0]))):
        assert not is_provably_square(matrix)
        assert same(inferred(matrix, axis), 0, matrix, axis)
    assert not same(inferred(A.reshape((n, 3)), 0), 0, pt.zeros((n, 1)), 0)


def test_batched_products():
    S = pt.dtensor3("S")
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(S, T)
    assert axis_size(K, -1) == axis_size(S, -1) * axis_size(T, -1)


def test_an_operation_shows_that_its_input_is_square():
    assert not is_provably_square(A)
    for square in (pt.linalg.inv(A), pt.linalg.cholesky(A), pt.linalg.expm(A)):
        assert is_provably_square(square)
        # Whoever asks about the input in the same graph is told too
        assert Sizes(square, A).is_square(A)
    assert Sizes(pt.linalg.solve(A, B), A).is_square(A)
    assert is_provably_square(pt.eye(n))
    assert is_provably_square(pt.diag(x))
    assert is_provably_square(A @ A.T)
    assert not is_provably_square(A @ B)
    assert not is_provably_square(pt.eye(n, 3))


def test_noting_that_a_matrix_is_square():
    sizes = Sizes(A, B)
    sizes.note_square(A)
    assert sizes.is_square(A)
    assert not sizes.is_square(B)
    sizes.note_square(A @ B)
    # A is n x n, and A B is square: so is B
    assert sizes.of(B, 1) == sizes.of(A, 0)


def test_a_square_product_says_nothing_about_its_factors():
    K = pt.linalg.kron(A, B)
    sizes = Sizes(pt.linalg.inv(K), A, B)
    assert sizes.is_square(K)
    assert not sizes.is_square(A)
    assert not sizes.is_square(B)
    assert sizes.of(pt.diagonal(K)[:, None], 0) == sizes.of(K, 0)
    # As far as static shapes go, this one is square
    trap = pt.linalg.kron(TALL, WIDE)
    assert is_provably_square(trap)
    assert not is_provably_square(TALL)
    assert axis_size(TALL, 0) != axis_size(WIDE, 0)
    assert axis_size(TALL, 0) == axis_size(WIDE, 1)


def test_noted_sizes_of_products_do_not_contradict_known_ones():
    K = pt.linalg.kron(A, TALL)
    sizes = Sizes(pt.linalg.inv(K))
    assert sizes.of(K, 0) == sizes.of(K, 1)
    assert sizes.of(TALL, 0) != sizes.of(TALL, 1)


def test_the_diagonal_of_a_square_matrix():
    square = pt.linalg.inv(A)
    assert same(pt.diag(pt.diagonal(square)), 0, square, 1)


def test_alloc_diag_along_leading_axes():
    first = AllocDiag(axis1=0, axis2=1, offset=0)(A)
    assert first.type.ndim == 3
    assert axis_size(first, 0) == axis_size(A, 1)
    assert axis_size(first, 2) != axis_size(A, 1)


def test_a_reshape_with_a_rest_is_unknown():
    rest = A.reshape((-1, A.shape[1]))
    assert axis_size(rest, 0) != axis_size(A, 0)
    assert axis_size(rest, 0) == axis_size(rest, 0)
    assert axis_size(rest, 1) == axis_size(A, 1)


def test_a_number_in_a_reshape_may_be_minus_one():
    assert not same(A.reshape((n, 2)), 0, B.reshape((n, 2)), 0)
    assert not same(A.reshape((n, 2)), 0, pt.eye(n), 0)


def test_specified_shapes():
    fixed = pt.specify_shape(A, (3, 3))
    assert is_provably_square(fixed)
    assert axis_size(fixed, 0) == SizeProduct(3)
