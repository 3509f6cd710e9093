from functools import reduce
from itertools import product as pairs_of

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume
from pytensor.graph.rewriting.utils import rewrite_graph

from pymc_kron.sizes import Sizes
from pymc_kron.structure import Refusal
from pymc_kron.terms import (
    Entries,
    LowRank,
    Product,
    apply,
    contract,
    diagonal_of,
    elementwise_product,
    inner,
    is_unread,
    multiply,
    require_conforming,
    terms_of,
    transposed_term,
)
from tests.helpers import (
    AS_WRITTEN,
    symbolic_dense_kron,
)

RNG = np.random.default_rng(21)

N = 12
A, B = pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(4, 4))
C, D = pt.tensor("C", shape=(3, 3)), pt.tensor("D", shape=(4, 4))
P, Q = pt.tensor("P", shape=(3, 2)), pt.tensor("Q", shape=(4, 5))
M, W = pt.tensor("M", shape=(N, N)), pt.tensor("W", shape=(N, N))
U, V = pt.tensor("U", shape=(N, 2)), pt.tensor("V", shape=(N, 2))
u, v, c = pt.tensor("u", shape=(N,)), pt.tensor("v", shape=(N,)), pt.dscalar("c")
VARIABLES = [A, B, C, D, P, Q, M, W, U, V, u, v, c]
VALUES = {var: RNG.normal(size=var.type.shape) for var in VARIABLES}
K, H = pt.linalg.kron(A, B), pt.linalg.kron(C, D)
EYE = pt.eye(N)
ORDER = np.random.default_rng(4).permutation(N)


def evaluate(*outputs):
    values = VALUES
    function = compile_unrewritten(list(values), outputs)
    return function(*values.values())


def compile_unrewritten(inputs, outputs):
    return pytensor.function(inputs, list(outputs), mode=AS_WRITTEN, on_unused_input="ignore")


def dense(term, shape=(N, N)):
    """Return the matrix that a term stands for."""
    match term:
        case Product(left=left, diagonal=diagonal, right=right):
            matrix = pt.eye(shape[0]) if left is None else reduce(symbolic_dense_kron, left)
            if diagonal is not None:
                matrix = matrix * diagonal
            if right is not None:
                matrix = matrix @ reduce(symbolic_dense_kron, right).T
        case LowRank(left=left, right=right, weights=weights):
            matrix = left @ right.T
            if weights is not None:
                matrix = matrix * reduce(symbolic_dense_kron, weights)
        case Entries(rows=rows, columns=columns, values=values):
            matrix = pt.zeros(shape)[rows, columns].inc(values)
    for scale in term.scales:
        matrix = scale * matrix
    return matrix


# Reading

READABLE = {
    "kron": K,
    "kron.T": K.T,
    "c kron": c * K,
    "-kron / c": -K / c,
    "rectangular": pt.linalg.kron(P, Q),
    "sum": K + H + EYE,
    "difference": K - 2 * H - c * EYE,
    "negated sum": -(K + H),
    "multiple of a sum": (c * (K + H) / 3).T,
    "assumed": assume(K + EYE, symmetric=True),
    "eye": 3 * EYE,
    "identity_like": pt.identity_like(M),
    "diag": pt.diag(u) + K,
    "constant diagonal": pt.constant(np.diag(np.arange(12.0))),
    "constant identity": K + pt.constant(np.eye(N)),
    "diag of a full vector": pt.diag(pt.full((N,), c)),
    "batched diag of a vector": pt.vectorize(pt.diag, "(n)->(n,n)")(u),
    "outer product": u[:, None] * v[None, :],
    "outer": pt.outer(u, v),
    "outer product by matmul": u[:, None] @ v[None, :],
    "negative outer product": -2 * pt.outer(u, v) / c,
    "outer product, weighted": K * pt.outer(u, v),
    "outer product, weighted twice": K * H * pt.outer(u, v),
    "diagonal times an outer product": pt.diag(u) * v[:, None] * u,
    "sum times an outer product": (pt.diag(u) - EYE) * u[:, None] * v,
    "low rank": U @ V.T,
    "low rank times an outer product": (U @ V.T) * u[:, None] * v,
    "low rank, other way round": (V @ U.T).T + K,
    "columns broadcast": pt.zeros((N, N)) + u[:, None],
    "rows broadcast": K + v,
    "scalar broadcast": K + c,
    "filled": pt.full((N, N), c),
    "zeros": K + pt.zeros((N, N)),
    "product": K @ H,
    "product with a diagonal": K @ pt.diag(u) @ H.T,
    "product with an outer product": K @ pt.outer(u, v) @ H,
    "outer product and any matrix": pt.outer(u, v) @ M,
    "any matrix and an outer product": M @ pt.outer(u, v),
    "rows scaled": u[:, None] * K,
    "columns scaled": K * u,
    "columns divided": K / u,
    "elementwise": K * H,
    "reciprocal": 1 / K,
    "outer product, divided": pt.outer(u, v) / K,
    "a row set": pt.zeros((N, N))[3].set(u),
    "a row from the end": pt.zeros((N, N))[-2].inc(u),
    "a column set": pt.zeros((N, N))[:, 4].set(u),
    "part of a row set": pt.zeros((N, N))[3, 2:].set(u[2:]),
    "block set": pt.zeros((N, N))[2:5, 1:4].set(M[:3, :3]),
    "columns of a block set": pt.zeros((N, N))[1:, ::-3].set(M[1:, :4]),
    "block set to a number": pt.zeros((N, N))[::4, 1:].set(c),
    "a row added to": K[3].inc(u),
    "rows added to": K[[1, 4, 1]].inc(pt.outer(u[:3], v)),
    "an entry set": pt.zeros((N, N))[4, -3].set(c),
    "entries, repeated": pt.zeros((N, N))[[1, 2, 1], [-1, 3, -1]].inc(u[:3]),
    "entries of a grid": pt.zeros((N, N))[np.array([[1], [2]]), np.array([[0, 5, -1]])].inc(c),
    "pullback of an offset diagonal": pt.grad((pt.diagonal(M, offset=2) * u[2:]).sum(), M),
    "pullback of a diagonal": pt.grad((pt.diagonal(M, offset=0) * u).sum(), M),
    "pullback of a lower diagonal": pt.grad((pt.diagonal(M, offset=-1) * u[1:]).sum(), M),
    "raveled and back": (2 * K.ravel()).reshape((N, N)),
    "difference raveled and back": (-K.ravel() / c - H.ravel()).reshape((N, N)),
    "sum raveled and back": (c * K.ravel() + H.ravel()).reshape((N, N)),
    "specified": pt.specify_shape(K + H, (N, N)),
    "constant identity, with an axis": (pt.constant(np.eye(N)[None]) + K).squeeze(0),
    "pullback of diagonals of a batch of one": pt.grad(
        (pt.diagonal(M[None], axis1=1, axis2=2) * u).sum(), M
    ),
    "a sum in a batch of one": ((K + H + pt.diag(u))[None] * c).squeeze(0),
    "pullback of rows in an order": pt.grad((M[ORDER] @ U * V).sum(), M),
    "pullback of columns in an order": pt.grad((M[:, ORDER] @ U * V).sum(), M),
}


@pytest.mark.parametrize("is_canonical", [False, True])
@pytest.mark.parametrize("name", READABLE)
def test_terms_add_up_to_the_matrix(name, is_canonical):
    var = READABLE[name]
    if is_canonical:
        var = rewrite_graph(var, include=("canonicalize",), exclude=("kron",), clone=False)
    terms = terms_of(var)
    assert terms is not None
    shape = var.type.shape
    total = sum((dense(term, shape) for term in terms), start=pt.zeros(shape))
    result, expected = evaluate(total, var)
    assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


def test_zeros_have_no_terms():
    assert terms_of(pt.zeros((N, N)) + K) == terms_of(K)


UNREADABLE = {
    "any matrix": M,
    "vector": u,
    "sum with any matrix": K + M,
    "elementwise with any matrix": K * M,
    "exponential": pt.exp(K),
    "quotient of any matrix": M / K,
    "any constant": pt.constant(np.arange(144.0).reshape(12, 12)),
    "rectangular eye": pt.eye(N, 5),
    "large block set": pt.zeros((N, N))[2:, 1:].set(M[:-2, :-1]),
    "set on something": M[3].set(u),
    "raveled the other way": K.T.ravel().reshape((4, 36)),
    "unread inverse": pt.linalg.inv(K) @ M,
    "elementwise with eye": K * EYE,
    "upper diagonal": pt.diag(u[1:], k=1),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_read(name):
    assert terms_of(UNREADABLE[name]) is None


def test_integers_are_divided_in_double_precision():
    n = pt.bscalar("n")
    [term] = terms_of(pt.eye(N) / n)
    assert [scale.type.dtype for scale in term.scales] == ["float64"]


def test_unread_matrices():
    sizes = Sizes(K)
    assert is_unread(pt.linalg.inv(K), sizes)
    assert is_unread(M @ pt.linalg.inv(K).T, sizes)
    assert is_unread(pt.linalg.solve(M, K), sizes)
    assert not is_unread(pt.linalg.inv(M), sizes)
    assert not is_unread(M @ W, sizes)


def test_refuses_sizes_that_may_not_agree():
    X, Y = pt.dmatrices("X", "Y")
    product = pt.linalg.kron(X, Y)
    for matrix in (product @ product, product * product.T):
        with pytest.raises(Refusal, match="aren't known to agree"):
            terms_of(matrix)
    with pytest.raises(Refusal, match="3 factors and the other one 2"):
        terms_of(pt.linalg.kron(X, product) @ product)


def test_a_square_product_of_rectangular_factors_is_refused():
    tall, wide = pt.tensor("tall", shape=(3, 2)), pt.tensor("wide", shape=(2, 3))
    trap = pt.linalg.kron(tall, wide)
    with pytest.raises(Refusal, match="aren't known to agree"):
        terms_of(trap @ trap)
    with pytest.raises(Refusal, match="isn't known to be square"):
        require_conforming(Product(), [tall, wide], Sizes(trap))


# Calculating

TERMS = {
    "identity": Product(),
    "kron": Product((A, B)),
    "c kron": Product((A, B), scales=(c, c)),
    "diagonal": Product(diagonal=u),
    "kron diagonal": Product((A, B), u),
    "diagonal kron": Product(None, v, (C, D)),
    "kron diagonal kron": Product((A, B), u, (C, D), (c,)),
    "rank one": LowRank(u[:, None], v[:, None], scales=(c,)),
    "rank two": LowRank(U, V),
    "weighted": LowRank(U, V, (A, B), (c,)),
    "entries": Entries(pt.constant([1, 11, 1, 7]), pt.constant([0, 2, 0, 7]), u[:4], scales=(c,)),
}
PAIRS = list(pairs_of(TERMS, TERMS))


def check(result, expected, rtol=1e-10):
    result, expected = evaluate(result, expected)
    assert result.shape == expected.shape
    assert_allclose(result, expected, rtol=rtol, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("name", TERMS)
def test_transposed(name):
    check(dense(transposed_term(TERMS[name])), dense(TERMS[name]).T)


@pytest.mark.parametrize("name", TERMS)
def test_apply(name):
    term = TERMS[name]
    if name in ("weighted", "entries"):
        with pytest.raises(Refusal, match=f"a product with {type(term).__name__} terms isn't"):
            apply(term, U)
        return
    check(apply(term, U), dense(term) @ U)
    check(apply(term, U[:, :1]), dense(term) @ U[:, :1])


@pytest.mark.parametrize("name", TERMS)
def test_diagonal(name):
    term = TERMS[name]
    if name in ("weighted", "entries"):
        with pytest.raises(Refusal, match=f"the diagonal of {type(term).__name__} terms isn't"):
            diagonal_of(term)
        return
    check(pt.ones(N) * diagonal_of(term), pt.diagonal(dense(term)))


def outcome(function, *terms):
    try:
        return function(*terms)
    except Refusal:
        return None


def test_multiply():
    unknown = set()
    for left, right in PAIRS:
        term = outcome(multiply, TERMS[left], TERMS[right])
        if term is None:
            unknown.add((left, right))
        else:
            check(dense(term), dense(TERMS[left]) @ dense(TERMS[right]))
    # No record holds a product of a diagonal matrix, a Kronecker product and a diagonal matrix
    both = {
        ("diagonal", "kron diagonal"),
        ("diagonal", "kron diagonal kron"),
        ("kron diagonal", "kron diagonal"),
        ("kron diagonal", "kron diagonal kron"),
        ("diagonal kron", "diagonal"),
        ("diagonal kron", "diagonal kron"),
        ("diagonal kron", "kron diagonal"),
        ("diagonal kron", "kron diagonal kron"),
        ("kron diagonal kron", "diagonal"),
        ("kron diagonal kron", "diagonal kron"),
        ("kron diagonal kron", "kron diagonal"),
        ("kron diagonal kron", "kron diagonal kron"),
    }
    others = {pair for pair in PAIRS if {"weighted", "entries"} & {*pair}}
    assert unknown == both | others


def test_elementwise_product():
    known = set()
    for left, right in PAIRS:
        term = outcome(elementwise_product, TERMS[left], TERMS[right])
        if term is not None:
            known.add((left, right))
            check(dense(term), dense(TERMS[left]) * dense(TERMS[right]))
    products, outer_products = {"kron", "c kron"}, {"rank one", "rank two", "weighted"}
    assert known == {
        *pairs_of(products, products),
        *pairs_of(products, outer_products),
        *pairs_of(outer_products, products),
    }


def test_inner():
    unknown = set()
    for left, right in PAIRS:
        total = outcome(inner, TERMS[left], TERMS[right])
        if total is None:
            unknown.add((left, right))
        else:
            check(total, (dense(TERMS[left]) * dense(TERMS[right])).sum())
    for pair in unknown:
        assert pair[::-1] in unknown
    # What the gradients of sums of Kronecker products are made of is known
    for name in ("kron", "c kron", "rank one", "rank two"):
        for other in ("identity", "kron", "diagonal", "kron diagonal kron", "rank two"):
            assert (name, other) not in unknown
    assert ("kron", "entries") not in unknown
    assert ("identity", "identity") in unknown


def test_inner_with_rectangular_factors():
    product, other = Product((P, Q)), Product((2 * P, Q**2))
    shape = (12, 10)
    low_rank = LowRank(U, V[:10])
    check(inner(product, other), (dense(product) * dense(other)).sum())
    for left, right in ((product, low_rank), (low_rank, product)):
        check(inner(left, right), (dense(left, shape) * dense(right, shape)).sum())


# The pullback


def contracted(matrix, factors, start, stop):
    """Return the gradient of ``sum(matrix * kron)`` in the product of some factors."""
    before, group, after = factors[:start], factors[start:stop], factors[stop:]
    X = pt.zeros(sizes_of(group))
    product = reduce(symbolic_dense_kron, [*before, X, *after])
    return pt.grad((matrix * product).sum(), X)


def sizes_of(factors):
    return tuple(int(n) for n in np.prod([factor.type.shape for factor in factors], axis=0))


def terms_for(factors, others):
    """Return terms of the shape of a product, ``others`` being factors of the same shapes."""
    rows, columns = sizes_of(factors)
    rng = np.random.default_rng(7)

    def array(*shape):
        return pt.constant(rng.normal(size=shape))

    terms = {
        "kron": Product(others, scales=(c,)),
        "rank one": LowRank(array(rows, 1), array(columns, 1)),
        "rank three": LowRank(array(rows, 3), array(columns, 3), scales=(c,)),
        "weighted": LowRank(array(rows, 3), array(columns, 3), others),
        "entries": Entries(
            pt.constant([0, rows - 1, 1, 1]), pt.constant([1, -1, 0, 0]), array(4), (c,)
        ),
        "kron diagonal kron": Product(
            tuple(array(factor.type.shape[0], 2) for factor in factors),
            array(2 ** len(factors)),
            tuple(array(factor.type.shape[1], 2) for factor in factors),
        ),
    }
    if all(factor.type.shape[0] == factor.type.shape[1] for factor in factors):
        terms |= {
            "identity": Product(scales=(c,)),
            "diagonal": Product(diagonal=array(rows)),
            "kron diagonal": Product(others, array(rows)),
            "diagonal kron": Product(None, array(rows), others),
        }
    return terms


E_, F = pt.tensor("E", shape=(2, 2)), pt.tensor("F", shape=(2, 3))
VALUES |= {var: RNG.normal(size=var.type.shape) for var in (E_, F)}
GROUPS = {
    "two": ((A, B), (C, D)),
    "two, rectangular": ((P, Q), (P**2, Q**2)),
    "three": ((A, E_, B), (C, E_**2, D)),
    "three, rectangular": ((P, F, Q), (P + 1, F**2, Q)),
}
CONTRACTIONS = [
    (group, name, start, stop)
    for group, (factors, others) in GROUPS.items()
    for name in terms_for(factors, others)
    for start in range(len(factors))
    for stop in range(start + 1, len(factors) + (start > 0))
]


@pytest.mark.parametrize(("group", "name"), sorted({case[:2] for case in CONTRACTIONS}))
def test_contract(group, name):
    factors, others = GROUPS[group]
    term = terms_for(factors, others)[name]
    matrix = dense(term, sizes_of(factors))
    pairs = [
        (contract(term, factors, start, stop), contracted(matrix, factors, start, stop))
        for other_group, other_name, start, stop in CONTRACTIONS
        if (other_group, other_name) == (group, name)
    ]
    for result, expected in pairs:
        check(result, expected, rtol=1e-9)


def test_conforming():
    sizes = Sizes(A, B, P, Q)
    require_conforming(Product((C, D)), (A, B), sizes)
    require_conforming(Product(), (A, B), sizes)
    require_conforming(Product(None, u, (C, D)), (A, B), sizes)
    require_conforming(LowRank(U, V), (P, Q), sizes)
    require_conforming(Product((P, Q), u[:10], (P, Q)), (A, B), sizes)
    for term, factors in [
        (Product((A, B)), (B, A)),
        (Product((A, B), u, (C, D)), (P, Q)),
        (LowRank(U, V, (A, B)), (B, A)),
        (Product(), (P, Q)),
    ]:
        with pytest.raises(Refusal, match=r"aren't known to agree|isn't known to be square"):
            require_conforming(term, factors, sizes)
