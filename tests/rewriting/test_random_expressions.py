"""Random expressions with Kronecker products: values and gradients as of the dense matrix.

Hypothesis draws a recipe, a tree of operations on matrices with a consumer at its root. It is
built twice: with ``pt.linalg.kron``, compiled with the bundle, and with a product that no rewrite
recognises, in double precision and without any rewrites at all. The loss is a weighted sum of all
that the consumer returns; its gradients in all inputs are compared too.

Some gradients are a matter of convention. A function of a symmetric matrix, such as a Cholesky
factor, may read one triangle, and which one is used of each factor differs from which one is used
of the product. What has to agree is the gradient along changes that keep the matrix symmetric,
``G + G'``, or triangular. Of decompositions that aren't unique, what they promise is compared.
"""

import math
import secrets
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add, matmul, mul, neg, sub, truediv

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pymc.pytensorf import pregrad_inner_graphs
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph

from tests.helpers import AS_WRITTEN, PY, has_kron

# M[[-5], [0]], with an index from the end, PyTensor takes for a diagonal that doesn't exist. Of a
# batch of identity matrices, it can't say whether they select, which raises an error. Where it
# reorders a chain of products, it looks for a product that it has replaced already, and doesn't
# find it. Of the LU decomposition of a batch of diagonal matrices, it makes one without a batch.
# For Alloc(x, n, 1) * y it writes x * y, where x isn't known to have one column.
FAILING = (
    "local_elemwise_alloc",
    "lu_of_diag",
    "local_sumsqr2dot",
    "local_adv_idx_to_diagonal",
    "extract_diag_lift_pass",
    "selection_dot_to_indexing",
    "reassociate_matmul_chain",
)
REWRITES = PY.excluding("ofg_inner_graph", *FAILING).optimizer


def rewritten_before_gradients(loss):
    """Do what `pymc.pytensorf.rewrite_pregrad` does, without the rewrites that fail."""
    return rewrite_graph(
        loss,
        include=("canonicalize", "stabilize"),
        exclude=FAILING,
        custom_rewrite=pregrad_inner_graphs,
    )


TOLERANCE = {"float64": 1e-8, "float32": 2e-3}


# Recipes


@dataclass(frozen=True)
class Leaf:
    """An input of the graph. Equal leaves are one variable.

    Attributes
    ----------
    kind
        What the values are like: a key of `VALUES`.
    batch, core
        The sizes of the batch dimensions, and of the others.
    dtype
        The dtype in the graph with the bundle. The dense one is in double precision.
    known
        Which sizes the type of the variable shows: "all", "none", or "all but the last".
    number
        Leaves with different numbers have different values.
    """

    kind: str
    batch: tuple[int, ...]
    core: tuple[int, ...]
    dtype: str
    known: str
    number: int

    @property
    def shape(self):
        return (*self.batch, *self.core)

    def dense_variable(self):
        """Return a new variable for the leaf in the graph without rewrites."""
        return pt.tensor(dtype="float64", shape=self.shape)

    def variable(self):
        """Return a new variable for the leaf in the graph with the rewrites."""
        shape = list(self.shape)
        match self.known:
            case "all but the last":
                shape[-1:] = [None] * len(self.core[-1:])
            case "none":
                # PyTensor broadcasts only what it knows to be of size one
                batch = [1 if size == 1 else None for size in self.batch]
                shape = [*batch, *(None for _ in self.core)]
        return pt.tensor(dtype=self.dtype, shape=tuple(shape))

    def value(self):
        """Return its value, well-conditioned in double and in single precision."""
        rng = np.random.default_rng([self.number, *self.shape, *self.kind.encode()])
        return VALUES[self.kind](rng, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Node:
    """An operation: a key of `OPS`, the nodes and leaves it is applied to, and options."""

    op: str
    args: tuple["Node | Leaf", ...]
    options: tuple = ()


@dataclass(frozen=True)
class Recipe:
    """What is calculated, and whether the rewrites run before the gradient is taken too."""

    root: Node
    pregrad: bool


def _orthogonal(rng, *shape):
    return np.linalg.qr(rng.normal(size=shape))[0]


def _singular_values(rng, shape):
    return rng.uniform(0.7, 1.5, size=(*shape[:-2], 1, min(shape[-2:])))


def _positive(rng, shape):
    Q = _orthogonal(rng, *shape)
    return (Q * _singular_values(rng, shape)) @ np.swapaxes(Q, -1, -2)


def _indefinite(rng, shape):
    Q = _orthogonal(rng, *shape)
    signs = (-1.0) ** (np.arange(shape[-1]) + rng.integers(2))
    return (Q * (signs * _singular_values(rng, shape))) @ np.swapaxes(Q, -1, -2)


def _general(rng, shape):
    *batch, m, n = shape
    k = min(m, n)
    U, V = _orthogonal(rng, *batch, m, k), _orthogonal(rng, *batch, n, k)
    return (U * _singular_values(rng, shape)) @ np.swapaxes(V, -1, -2)


def _root(rng, shape):
    diagonal = rng.uniform(0.7, 1.5, size=shape[-1])
    return np.tril(0.4 * rng.normal(size=shape), -1) + diagonal * np.eye(shape[-1])


def _lower(rng, shape):
    return _root(rng, shape) * rng.choice([-1, 1], size=shape[-1])


VALUES = {
    "positive": _positive,
    "negative": lambda rng, shape: -_positive(rng, shape),
    "indefinite": _indefinite,
    "general": _general,
    "lower": _lower,
    "upper": lambda rng, shape: np.swapaxes(_lower(rng, shape), -1, -2),
    "root": _root,
    "data": lambda rng, shape: rng.normal(size=shape),
    "scalar": lambda rng, shape: rng.uniform(0.7, 1.5, size=shape),
}
SYMMETRIC = {"positive", "negative", "indefinite"}


# Operations


def kron(a, b):
    if a.type.ndim == b.type.ndim == 2:
        return pt.linalg.kron(a, b)
    return pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(a, b)


def dense_kron(a, b):
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    rows, columns = (m * n for m, n in zip(a.type.shape[-2:], b.type.shape[-2:], strict=True))
    return product.reshape((*tuple(product.shape)[:-4], rows, columns))


def _eye(like, known, dtype):
    size = like.shape[-1]
    return pt.eye(like.type.shape[-1] or size if known else size, dtype=dtype)


def _plus_noise(M, scalar, spelling, n, dtype):
    match spelling:
        case "eye":
            return M + scalar * pt.eye(n, dtype=dtype)
        case "eye of unknown size":
            return scalar * pt.eye(M.shape[-1], dtype=dtype) + M
        case "diag":
            return M + pt.diag(pt.full((n,), scalar))
        case "diag of ones":
            return M + pt.diag(scalar * pt.ones(n, dtype=dtype))
        case "stabilize":
            return pm.gp.util.stabilize(M, scalar)
        case "minus":
            # The eigenvalues of the products are below 1.5**3
            return (4 + scalar) * pt.eye(n, dtype=dtype) - M
        case "far":
            return M - (4 + scalar) * pt.eye(n, dtype=dtype)


def _quadratic_of_solve(M, x, how, assume_a):
    solution = pt.linalg.solve(M, x, assume_a=assume_a, b_ndim=1)
    match how:
        case "dot" if x.type.ndim == 1 and M.type.ndim == 2:
            return x @ solution
        case "transposed" if x.type.ndim == 1 and M.type.ndim == 2:
            return x.T @ solution
        case "vecdot":
            return pt.vecdot(x, solution)
    return (x * solution).sum(axis=-1)


def _whitened_norm(M, x):
    w = pt.linalg.solve_triangular(pt.linalg.cholesky(M), x, lower=True, b_ndim=1)
    return (w**2).sum(axis=-1)


def _chol_logdet(M):
    return pt.log(pt.diagonal(pt.linalg.cholesky(M), axis1=-2, axis2=-1)).sum(axis=-1)


def _cho_solve(M, b, lower, b_ndim):
    chol = pt.linalg.cholesky(M, lower=lower)
    return pt.linalg.cho_solve((chol, lower), b, b_ndim=b_ndim)


def _both_solves(M, b):
    chol = pt.linalg.cholesky(M)
    w = pt.linalg.solve_triangular(chol, b, lower=True, b_ndim=1)
    return pt.linalg.solve_triangular(chol.mT, w, lower=False, b_ndim=1)


def _slogdet(M):
    sign, logabsdet = pt.linalg.slogdet(M)
    return [sign, logabsdet], [logabsdet]


# A sum of sorted values has no smooth weights where two values meet; a sum of cubes has them


def _singular_value_sums(M):
    s = pt.linalg.svd(M, compute_uv=False)
    return [s], [(s**3).sum(axis=-1)]


def _svd(M):
    U, s, Vh = pt.linalg.svd(M, full_matrices=False)
    _, parts = _singular_value_sums(M)
    return [s, (U * s[..., None, :]) @ Vh, U.mT @ U, Vh @ Vh.mT], parts


def _eigvalsh(M):
    w = pt.linalg.eigvalsh(M)
    return [w], [(w**3).sum(axis=-1)]


def _eigh(M, x):
    w, Q = pt.linalg.eigh(M)
    rebuilt = (Q * w[..., None, :]) @ Q.mT
    function = Q @ (pt.exp(w)[..., None] * (Q.mT @ x))
    return [w, rebuilt, Q.mT @ Q, function], [(w**3).sum(axis=-1)]


def _qr(M, u, v):
    Q, R = pt.linalg.qr(M, mode="economic")
    logs = pt.log(pt.abs(pt.diagonal(R, axis1=-2, axis2=-1))).sum(axis=-1)
    projected = pt.vecdot(pt.vecmat(u, Q), pt.vecmat(v, Q))
    return [Q @ R, Q.mT @ Q, pt.tril(R, -1)], [logs, projected]


def _lu(M):
    P, L, U = pt.linalg.lu(M)
    logs = pt.log(pt.abs(pt.diagonal(U, axis1=-2, axis2=-1))).sum(axis=-1)
    return [P @ L @ U, pt.triu(L), pt.tril(U, -1)], [logs]


def _norm(M):
    return pt.linalg.norm(M) if M.type.ndim == 2 else pt.sqrt((M**2).sum(axis=(-2, -1)))


OPS = {
    # Matrices
    "transpose": lambda M: M.mT,
    "negative": neg,
    "times": mul,
    "times on the left": lambda M, scalar: scalar * M,
    "over": truediv,
    "constant times": lambda M, c: c * M,
    "inv": pt.linalg.inv,
    "pinv": pt.linalg.pinv,
    "expm": pt.linalg.expm,
    "matmul": matmul,
    "gram": lambda M: M @ M.mT,
    "elementwise": mul,
    "power": lambda M, p: M**p,
    "abs": pt.abs,
    "add": add,
    "subtract": sub,
    "solve": lambda M, b, assume_a, b_ndim: pt.linalg.solve(M, b, assume_a=assume_a, b_ndim=b_ndim),
    "plus noise": _plus_noise,
    "eye": _eye,
    "assume": lambda M, **facts: assume(M, **facts),
    # Consumers
    "self": lambda M: M,
    "matvec": pt.matvec,
    "vecmat": lambda M, x: pt.vecmat(x, M),
    "bilinear": lambda M, u, v: pt.vecdot(u, pt.matvec(M, v)),
    "quadratic": lambda M, x: x.T @ M @ x,
    "weighted": lambda M, u, v: (M * (u[..., :, None] * v[..., None, :])).sum(axis=(-2, -1)),
    "sum": lambda M: M.sum(),
    "sum of entries": lambda M: M.sum(axis=(-2, -1)),
    "sum along": lambda M, axis: M.sum(axis=axis),
    "norm": _norm,
    "trace": pt.trace,
    "diagonal": lambda M, offset: pt.diagonal(M, offset, axis1=-2, axis2=-1),
    "row": lambda M, i: M[..., i, :],
    "sum of row": lambda M, i: M[..., i, :].sum(axis=-1),
    "column": lambda M, j: M[..., j],
    "entry": lambda M, i, j: M[..., i, j],
    "entries": lambda M, i, j: M[..., list(i), list(j)],
    "rows": lambda M, i: M[..., list(i), :],
    "slice": lambda M, i, j: M[..., slice(*i), slice(*j)],
    "inner product": lambda M, N: (M * N).sum(axis=(-2, -1)),
    "quadratic of solve": _quadratic_of_solve,
    "bilinear of solve": lambda M, u, v, assume_a: pt.vecdot(
        u, pt.linalg.solve(M, v, assume_a=assume_a, b_ndim=1)
    ),
    "inv matvec": lambda M, x: pt.matvec(pt.linalg.inv(M), x),
    "det": pt.linalg.det,
    "logdet": lambda M: pt.log(pt.linalg.det(M)),
    "slogdet": _slogdet,
    "whitened norm": _whitened_norm,
    "chol logdet": _chol_logdet,
    "chol matvec": lambda M, x: pt.matvec(pt.linalg.cholesky(M), x),
    "cholesky": lambda M, lower: pt.linalg.cholesky(M, lower=lower),
    "cho_solve": _cho_solve,
    "both solves": _both_solves,
    "logp": lambda M, x: pm.logp(pm.MvNormal.dist(mu=pt.zeros_like(x), cov=M), x),
    "solve_triangular": lambda M, b, lower, b_ndim: pt.linalg.solve_triangular(
        M, b, lower=lower, b_ndim=b_ndim
    ),
    "cho_solve of triangular": lambda M, b, lower: pt.linalg.cho_solve((M, lower), b, b_ndim=1),
    "singular values": _singular_value_sums,
    "svd": _svd,
    "eigvalsh": _eigvalsh,
    "eigh": _eigh,
    "qr": _qr,
    "lu": _lu,
}


def build(tree, variables, kron):
    """Return what a node stands for, as variables of PyTensor."""
    if isinstance(tree, Leaf):
        return variables[tree]
    args = [build(arg, variables, kron) for arg in tree.args]
    if tree.op == "kron":
        return kron(*args)
    if tree.op == "assume":
        return OPS["assume"](*args, **dict.fromkeys(tree.options, True))
    return OPS[tree.op](*args, *tree.options)


def leaves_of(tree):
    if isinstance(tree, Leaf):
        return [tree]
    return list(dict.fromkeys(leaf for arg in tree.args for leaf in leaves_of(arg)))


def ops_of(tree):
    if isinstance(tree, Leaf):
        return set()
    return {tree.op}.union(*map(ops_of, tree.args))


# Strategies


class Menu:
    """What is drawn for one recipe: parts that fit together."""

    def __init__(self, draw, *, batched):
        self.draw = draw
        self.batched = batched
        sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3, unique=True))
        while math.prod(sizes) > 40:
            sizes.pop()
        self.sizes = sizes
        both = ("float32", "float64")
        self.dtypes = draw(st.sampled_from([("float64",), ("float32",), both]))
        self.known = draw(
            st.sampled_from([("all",), ("none",), ("all", "none", "all but the last")])
        )
        self.batches = draw(
            st.sampled_from([[(), (2,)], [(2,)], [(), (2,), (2, 1), (1, 2)]])
            if batched
            else st.just([()])
        )

    def choose(self, *options):
        return self.draw(st.sampled_from(options))

    @property
    def n(self):
        return math.prod(self.sizes)

    def leaf(self, kind, *shape, number=None):
        """Return an input."""
        batch = self.choose(*self.batches) if shape else ()
        number = self.draw(st.integers(0, 9)) if number is None else number
        return Leaf(kind, batch, shape, self.choose(*self.dtypes), self.choose(*self.known), number)

    def vector(self, n):
        return self.leaf("data", n)

    def matrix_of_data(self, m, n):
        return self.leaf("data", m, n)

    def factor(self, kind, rows, columns):
        """Return a factor, perhaps with what is known about it."""
        leaf = self.leaf(kind, rows, columns)
        facts = {
            "positive": ("positive_definite", "symmetric"),
            "negative": ("symmetric",),
            "indefinite": ("symmetric",),
            "lower": ("lower_triangular",),
            "root": ("lower_triangular",),
            "upper": ("upper_triangular",),
        }.get(kind, ())
        fact = self.choose(None, None, *facts)
        return Node("assume", (leaf,), (fact,)) if fact else leaf

    def kron(self, kind, rows=None, columns=None):
        """Return a nested Kronecker product of the kind, with these sizes of its factors."""
        rows = list(rows or self.sizes)
        columns = list(columns or rows)
        if len(rows) == 3 and self.choose(False, False, False, True):
            # Factors that match only as groups
            i = self.choose(0, 1)
            rows[i : i + 2] = [rows[i] * rows[i + 1]]
            columns[i : i + 2] = [columns[i] * columns[i + 1]]
        kinds = self.factor_kinds(kind, len(rows))
        problems = list(zip(kinds, rows, columns, strict=True))
        if len(problems) == 2:
            return Node("kron", tuple(self.factor(*problem) for problem in problems))
        position = self.choose(0, 1)
        inner = problems[position : position + 2]
        if self.choose(False, True):
            swapped = {"lower": "upper", "upper": "lower"}
            inner = [(swapped.get(k, k), columns, rows) for k, rows, columns in inner]
            pair = Node("kron", tuple(self.factor(*problem) for problem in inner))
            pair = Node("transpose", (pair,))
        else:
            pair = Node("kron", tuple(self.factor(*problem) for problem in inner))
        if self.choose(False, True):
            pair = self.scaled(pair)
        other = self.factor(*problems[2 if position == 0 else 0])
        return Node("kron", (pair, other) if position == 0 else (other, pair))

    def factor_kinds(self, kind, n):
        match kind:
            case "positive":
                kinds = [self.choose("positive", "positive", "negative") for _ in range(n)]
                if kinds.count("negative") % 2:
                    kinds[kinds.index("negative")] = "positive"
                return kinds
            case "symmetric":
                return [self.choose("positive", "negative", "indefinite") for _ in range(n)]
            case "square":
                square = ("general", "general", "positive", "indefinite", "lower")
                return [self.choose(*square) for _ in range(n)]
            case "root":
                # PyTensor takes L for the Cholesky factor of L L' whatever the signs in L
                return [self.choose("general", "root") for _ in range(n)]
            case "lower" | "upper":
                return [kind] * n
        return ["general"] * n

    def scaled(self, M):
        """Return a positive multiple of a matrix."""
        op = self.choose("times", "times on the left", "over", "constant times")
        if op == "constant times":
            return Node(op, (M,), (self.choose(2, 0.5, 1.25),))
        return Node(op, (M, self.leaf("scalar")))

    def matrix(self, kind, depth):
        """Return a matrix of a kind: positive, symmetric, square, lower or upper.

        All but "entries" are well-conditioned.
        """
        if depth == 0:
            return self.kron(kind)
        matrix = partial(self.matrix, kind, depth - 1)
        options = {
            "positive": ["inv", "gram", "elementwise", "power"],
            "symmetric": ["inv", "negative"],
            "square": ["inv", "negative", "matmul", "solve", "square"],
            "lower": ["inv", "negative", "matmul"],
            "entries": ["negative", "elementwise", "power", "abs", "add", "subtract"],
        }[kind]
        match self.choose("kron", "kron", "transpose", "scaled", *options):
            case "kron":
                return self.kron(kind)
            case "transpose" if kind != "lower":
                return Node("transpose", (matrix(),))
            case "transpose":
                return Node("transpose", (self.kron("upper"),))
            case "scaled":
                return self.scaled(matrix())
            case "inv" | "negative" | "abs" as op:
                return Node(op, (matrix(),))
            case "gram":
                return Node("gram", (self.kron("root"),))
            case "matmul" | "elementwise" | "add" | "subtract" as op:
                return Node(op, (matrix(), matrix()))
            case "power":
                return Node("power", (matrix(),), (self.choose(2, 3) if kind == "entries" else 2,))
            case "solve":
                return Node("solve", (matrix(), matrix()), ("gen", 2))
            case "square":
                M = matrix()
                return Node("matmul", (M, M))

    def rectangular(self, depth, *, rows=None, columns=None):
        """Return a matrix of full rank with any sizes, and these sizes of its factors."""
        if rows is None:
            rows = self.sizes
            columns = [self.draw(st.integers(1, 5)) for _ in rows]
        again = partial(self.rectangular, depth - 1, rows=rows, columns=columns)
        op = self.choose("kron", "transpose", "scaled", "negative", "matmul", "elementwise", "pinv")
        if depth == 0:
            op = "kron"
        match op:
            case "transpose":
                M, _, _ = self.rectangular(depth - 1, rows=columns, columns=rows)
                M = Node("transpose", (M,))
            case "scaled":
                M = self.scaled(again()[0])
            case "negative":
                M = Node("negative", (again()[0],))
            case "matmul":
                middle = [self.draw(st.integers(1, 4)) for _ in rows]
                M = Node(
                    "matmul", (self.kron("any", rows, middle), self.kron("any", middle, columns))
                )
            case "elementwise":
                M = Node("elementwise", (again()[0], again()[0]))
            case "pinv" if share_orientation(rows, columns):
                M = Node("pinv", (self.kron("any", columns, rows),))
            case _:
                M = self.kron("any", rows, columns)
        return M, math.prod(rows), math.prod(columns)

    def noisy(self):
        """Return a matrix with noise, and its kind."""
        n = self.n
        dtype = self.choose(*self.dtypes)
        scalar = self.leaf("scalar")
        metric = product_of(
            Node("assume", (self.leaf("positive", k, k),), ("positive_definite",))
            for k in self.sizes
        )
        match self.choose(
            "noise", "noise", "far", "minus", "metric", "far metric", "axes", "product and axis"
        ):
            case "noise":
                spelling = ["eye", "eye of unknown size"]
                if not self.batched:
                    spelling += ["stabilize", "diag", "diag of ones"]
                M = self.matrix("positive", 1)
                M, kind = (
                    Node("plus noise", (M, scalar), (self.choose(*spelling), n, dtype)),
                    "positive",
                )
            case "minus":
                M = self.kron("positive")
                M, kind = Node("plus noise", (M, scalar), ("minus", n, dtype)), "positive"
            case "far":
                M = self.kron("symmetric")
                M, kind = Node("plus noise", (M, scalar), ("far", n, dtype)), "symmetric"
            case "metric":
                terms = self.scaled(self.kron("positive")), metric
                terms = terms if self.choose(False, True) else terms[::-1]
                M, kind = Node("add", terms), "positive"
            case "far metric":
                # The eigenvalues of the metric are above 0.7**3
                far = Node("constant times", (metric,), (16,))
                M, kind = Node("subtract", (self.kron("symmetric"), far)), "symmetric"
            case "axes":
                M, kind = self.sum_over_axes(), "positive"
                if self.choose(False, True):
                    M = Node("plus noise", (M, scalar), ("eye", n, dtype))
            case "product and axis":
                M, kind = Node("add", (self.kron("positive"), self.sum_over_axes())), "positive"
                # With factors in common
                if self.choose(False, True):
                    first, *others = [self.leaf("positive", k, k) for k in self.sizes]
                    product = product_of([first, *others])
                    on_first = product_of([first, *map(self.eye, others)])
                    M = Node("add", (self.scaled(product), on_first))
        if self.choose(False, False, True):
            M = self.scaled(M)
        if self.choose(False, False, True):
            M = Node("transpose", (M,))
        return M, kind

    def eye(self, like):
        return Node("eye", (like,), (self.choose(True, False), self.choose(*self.dtypes)))

    def sum_over_axes(self, kind="positive"):
        """Return the Kronecker sum, kron(A, I) + kron(I, B)."""
        factors = [self.leaf(kind, k, k) for k in self.sizes]
        terms = [
            product_of(factor if i == j else self.eye(factor) for j, factor in enumerate(factors))
            for i in range(len(factors))
        ]
        return reduce(lambda a, b: Node("add", (a, b)), terms)


def product_of(factors):
    return reduce(lambda a, b: Node("kron", (a, b)), factors)


def share_orientation(rows, columns):
    pairs = list(zip(rows, columns, strict=True))
    return all(m >= n for m, n in pairs) or all(m <= n for m, n in pairs)


def consumer_of_entries(menu, M, m, n, other):
    """Return a use of a matrix, square or not, that takes it for no more than its entries."""
    choice = menu.draw(
        st.sampled_from(
            ["self", "matvec", "vecmat", "matmul", "matmul on the left", "bilinear", "weighted"]
            + ["sum", "sum of entries", "sum along", "norm", "diagonal", "row", "column", "entry"]
            + ["entries", "rows", "slice", "inner product", "singular values"]
            + (["trace", "quadratic"] if m == n and not menu.batched else [])
        )
    )
    row, column = menu.draw(st.integers(-m, m - 1)), menu.draw(st.integers(-n, n - 1))
    match choice:
        case "matvec":
            return Node(choice, (M, menu.vector(n)))
        case "vecmat":
            return Node(choice, (M, menu.vector(m)))
        case "matmul":
            return Node(choice, (M, menu.matrix_of_data(n, menu.choose(1, 2, 3))))
        case "matmul on the left":
            return Node("matmul", (menu.matrix_of_data(menu.choose(1, 2, 3), m), M))
        case "bilinear" | "weighted":
            return Node(choice, (M, menu.vector(m), menu.vector(n)))
        case "quadratic":
            return Node(choice, (M, menu.vector(n)))
        case "sum along":
            return Node(choice, (M,), (menu.choose(-1, -2),))
        case "diagonal":
            return Node(choice, (M,), (menu.draw(st.integers(1 - m, n - 1)),))
        case "row":
            return Node(choice, (M,), (row,))
        case "column":
            return Node(choice, (M,), (column,))
        case "entry":
            return Node(choice, (M,), (row, column))
        case "entries":
            rows = menu.draw(st.lists(st.integers(-m, m - 1), min_size=1, max_size=4))
            columns = [(column + i) % n for i in range(len(rows))]
            return Node(choice, (M,), (tuple(rows), tuple(columns)))
        case "rows":
            rows = menu.draw(st.lists(st.integers(-m, m - 1), min_size=1, max_size=4))
            return Node(choice, (M,), (tuple(rows),))
        case "slice":
            steps = st.sampled_from([(None,), (0, 1), (1, None), (None, None, -1), (None, None, 2)])
            return Node(choice, (M,), (menu.draw(steps), menu.draw(steps)))
        case "inner product":
            return Node(choice, (M, other()))
    return Node(choice, (M,))


def consumer_of_inverse(menu, M, kind):
    """Return a use of an invertible matrix: a solution, a determinant, a quadratic form."""
    n = menu.n
    structures = {"positive": ["pos", "pos", "sym", "gen"], "symmetric": ["sym", "her", "gen"]}
    assume_a = menu.choose(*structures.get(kind, ["gen"]))
    if kind == "lower":
        b_ndim = menu.choose(1, 2)
        b = menu.vector(n) if b_ndim == 1 else menu.matrix_of_data(n, 2)
        uses = [
            Node("solve_triangular", (M, b), (True, b_ndim)),
            Node("slogdet", (M,)),
            Node("inv matvec", (M, menu.vector(n))),
        ]
        if "inv" not in ops_of(M):
            # PyTensor takes cho_solve((inv(L), True), b) for L @ b
            uses.append(Node("cho_solve of triangular", (M, menu.vector(n)), (True,)))
        return menu.choose(*uses)
    options = ["solve vector", "solve matrix", "solve product", "quadratic of solve"]
    options += ["bilinear of solve", "inv matvec", "slogdet"]
    # The largest eigenvalues, (16 + 1) * 1.5**4, are below 87, and float32 holds 87**19
    if n < 20 or not {"plus noise", "add", "subtract"} & ops_of(M):
        options += ["det"]
    if kind == "positive":
        options += ["logdet", "whitened norm", "chol logdet", "chol matvec", "cholesky"]
        options += ["cho_solve", "both solves", "logp"]
    match menu.choose(*options):
        case "solve vector":
            return Node("solve", (M, menu.vector(n)), (assume_a, 1))
        case "solve matrix":
            return Node("solve", (M, menu.matrix_of_data(n, menu.choose(1, 3))), (assume_a, 2))
        case "solve product":
            return Node("solve", (M, menu.kron("square")), (assume_a, 2))
        case "quadratic of solve" as op:
            how = menu.choose("dot", "transposed", "vecdot", "sum")
            return Node(op, (M, menu.vector(n)), (how, assume_a))
        case "bilinear of solve" as op:
            return Node(op, (M, menu.vector(n), menu.vector(n)), (assume_a,))
        case "inv matvec" | "whitened norm" | "chol matvec" | "both solves" as op:
            return Node(op, (M, menu.vector(n)))
        case "logp":
            x = Leaf("data", (), (n,), menu.dtypes[0], menu.known[0], 0)
            return Node("logp" if not menu.batched else "whitened norm", (M, x))
        case "cholesky":
            return Node("cholesky", (M,), (menu.choose(True, False),))
        case "cho_solve":
            return Node("cho_solve", (M, menu.vector(n)), (menu.choose(True, False), 1))
        case op:
            return Node(op, (M,))


def depth_of(menu):
    return menu.choose(0, 1, 1, 2)


def products(menu):
    if menu.choose(False, True):
        rows = menu.sizes
        columns = [menu.draw(st.integers(1, 5)) for _ in rows]
        while math.prod(columns) > 40:
            columns[columns.index(max(columns))] = 1
        M, m, n = menu.rectangular(depth_of(menu), rows=rows, columns=columns)
        return consumer_of_entries(menu, M, m, n, lambda: menu.kron("any", rows, columns))
    kind = menu.choose("entries", "square", "symmetric", "positive")
    other = partial(menu.matrix, kind, 1)
    M = menu.matrix(kind, depth_of(menu))
    return consumer_of_entries(menu, M, menu.n, menu.n, other)


def solves(menu):
    kind = menu.choose("positive", "positive", "symmetric", "square", "lower")
    return consumer_of_inverse(menu, menu.matrix(kind, depth_of(menu)), kind)


def noise(menu):
    M, kind = menu.noisy()
    if menu.choose(False, False, False, True):
        return consumer_of_entries(menu, M, menu.n, menu.n, partial(menu.kron, "positive"))
    return consumer_of_inverse(menu, M, kind)


def decompositions(menu):
    match menu.choose("qr", "lu", "svd", "singular values", "eigh", "eigvalsh", "cholesky", "expm"):
        case "qr":
            # PyTensor's gradient fails for unknown sizes
            menu.known = ("all",)
            columns = [menu.draw(st.integers(1, size)) for size in menu.sizes]
            M, m, _ = menu.rectangular(1, rows=menu.sizes, columns=columns)
            if "elementwise" in ops_of(M) or "matmul" in ops_of(M):
                # These may not have the full rank
                M = menu.kron("any", menu.sizes, columns)
            return Node("qr", (M, menu.vector(m), menu.vector(m)))
        case "lu":
            return Node("lu", (menu.matrix("square", 1),))
        case "svd" | "singular values" as op:
            M, _, _ = menu.rectangular(1)
            return Node(op, (M,))
        case "eigh":
            kind = menu.choose("positive", "symmetric")
            return Node("eigh", (menu.matrix(kind, 1), menu.matrix_of_data(menu.n, 2)))
        case "eigvalsh":
            return Node("eigvalsh", (menu.matrix(menu.choose("positive", "symmetric"), 1),))
        case "cholesky":
            return Node("cholesky", (menu.matrix("positive", 1),), (menu.choose(True, False),))
        case "expm":
            M = menu.sum_over_axes("general")
            if menu.choose(False, True):
                noise = "eye", menu.n, menu.choose(*menu.dtypes)
                M = Node("plus noise", (M, menu.leaf("scalar")), noise)
            if menu.choose(False, True):
                M = menu.scaled(M)
            if menu.choose(False, True):
                M = Node("transpose", (M,))
            # The singular values are below 9, and rounding is relative to the exponential of these
            M = Node("expm", (Node("constant times", (M,), (0.25,)),))
            other = partial(menu.kron, "square")
            return consumer_of_entries(menu, M, menu.n, menu.n, other)


def batches(menu):
    return menu.choose(products, solves, solves, decompositions, noise)(menu)


FAMILIES = {
    "products": products,
    "solves": solves,
    "noise": noise,
    "decompositions": decompositions,
    "batches": batches,
}


@st.composite
def recipes(draw, family):
    """Draw a recipe of a family."""
    menu = Menu(draw, batched=family == "batches")
    return Recipe(FAMILIES[family](menu), pregrad=menu.choose(False, False, True))


# Evaluation


def outputs_of(root, variables, kron):
    """Return what is compared, and what the loss is made of."""
    outputs = build(root, variables, kron)
    return outputs if isinstance(outputs, tuple) else ([outputs], [outputs])


def gradients_of(loss, inputs):
    return pt.grad(loss, inputs, disconnected_inputs="ignore", return_disconnected="zero")


def loss_of(parts, weights):
    return sum((weight * part).sum() for weight, part in zip(weights, parts, strict=True))


def calculate(inputs, outputs, values):
    """Return the values of a graph as it is."""
    return pytensor.function(inputs, outputs, mode=AS_WRITTEN, on_unused_input="ignore")(*values)


@dataclass(frozen=True)
class Comparison:
    """What came out of a recipe.

    Attributes
    ----------
    errors
        The largest error of each value of the consumer, of the loss and of its gradient in each
        input, relative to the largest entry of what is compared. For the last two, relative to
        the sum of the absolute values of the terms of the loss, if that is larger.
    fgraph
        The graph with the rewrites.
    """

    errors: dict
    fgraph: FunctionGraph

    @classmethod
    def of(cls, recipe):
        """Calculate both ways."""
        leaves = leaves_of(recipe.root)
        values = [leaf.value() for leaf in leaves]

        # The dense matrix, in double precision
        variables = {leaf: leaf.dense_variable() for leaf in leaves}
        inputs = list(variables.values())
        doubles = [value.astype("float64") for value in values]
        checked, parts = outputs_of(recipe.root, variables, dense_kron)
        part_values = calculate(inputs, parts, doubles)
        rng = np.random.default_rng(0)
        weight_values = [rng.normal(size=value.shape) for value in part_values]
        weights = [pt.tensor(dtype="float64", shape=value.shape) for value in weight_values]
        loss = loss_of(parts, weights)
        expected = calculate(
            [*inputs, *weights],
            [*checked, loss, *gradients_of(loss, inputs)],
            [*doubles, *weight_values],
        )

        # The factors
        variables = {leaf: leaf.variable() for leaf in leaves}
        inputs = list(variables.values())
        checked, parts = outputs_of(recipe.root, variables, kron)
        weights = [pt.tensor(dtype=part.type.dtype, shape=part.type.shape) for part in parts]
        loss = loss_of(parts, weights)
        differentiated = rewritten_before_gradients(loss) if recipe.pregrad else loss
        outputs = [*checked, loss, *gradients_of(differentiated, inputs)]
        fgraph = FunctionGraph([*inputs, *weights], outputs, clone=True)
        REWRITES.rewrite(fgraph)
        weight_values_in_use = [
            value.astype(weight.type.dtype)
            for value, weight in zip(weight_values, weights, strict=True)
        ]
        results = calculate(fgraph.inputs, fgraph.outputs, [*values, *weight_values_in_use])

        loss_size = sum(
            np.abs(weight * value).sum()
            for weight, value in zip(weight_values, part_values, strict=True)
        )
        names = [*(f"value {i}" for i in range(len(checked))), "loss", *leaves]
        errors = {}
        for name, result, exact in zip(names, results, expected, strict=True):
            assert result.shape == exact.shape, name
            assert np.isfinite(exact).all(), name
            size = max(1.0, np.abs(exact).max(initial=0.0))
            if not str(name).startswith("value"):
                size = max(size, loss_size)
            difference = along_structure(name, result.astype("float64") - exact)
            errors[name] = np.abs(difference).max(initial=0.0) / size
        return cls(errors, fgraph)


def along_structure(leaf, gradient):
    """Return what of a gradient doesn't depend on conventions."""
    match leaf:
        case Leaf(kind="lower" | "root"):
            return np.tril(gradient)
        case Leaf(kind="upper"):
            return np.triu(gradient)
        case Leaf(kind=kind) if kind in SYMMETRIC:
            return gradient + np.swapaxes(gradient, -1, -2)
    return gradient


def tolerance_of(recipe):
    return TOLERANCE[min(leaf.dtype for leaf in leaves_of(recipe.root))]


# What is done to a Kronecker product without leaving any, in the values and in the gradients

WRAPPERS = {"transpose", "negative", "times", "times on the left", "over", "constant times"}
FACTORWISE_USES = {
    *("matvec", "vecmat", "bilinear", "sum", "sum of entries", "sum along", "norm"),
    *("row", "column", "entry", "solve", "inv matvec", "det", "slogdet", "logdet"),
    *("quadratic of solve", "bilinear of solve", "whitened norm", "chol logdet", "logp"),
    *("cho_solve", "both solves", "chol matvec"),
}
FACTORWISE_USES_WITH_NOISE = {"quadratic of solve", "whitened norm", "chol logdet", "logp"}


def has_to_be_factorwise(recipe):
    """Whether no Kronecker product may be left, since all sizes are known and the use is plain."""
    root, leaves = recipe.root, leaves_of(recipe.root)
    if any(leaf.known != "all" for leaf in leaves) or len({leaf.dtype for leaf in leaves}) > 1:
        return False
    if any(1 in leaf.core for leaf in leaves):
        # Rows, columns and numbers are left as they are
        return False
    matrix, *others = root.args
    if any(isinstance(other, Node) or len(other.core) != 1 for other in others):
        return False
    if "plus noise" in ops_of(matrix):
        is_positive = "pos" in root.options or root.op not in ("solve", "quadratic of solve")
        is_plain = matrix.op == "plus noise" and matrix.options[0] == "eye"
        ops = ops_of(matrix.args[0])
        uses = FACTORWISE_USES_WITH_NOISE
        if not (is_positive and is_plain):
            return False
    else:
        ops, uses = ops_of(matrix), FACTORWISE_USES
    return ops <= {"kron", "assume", *WRAPPERS} and root.op in uses


def check(recipe):
    """Compare values, loss and gradients, and look for what is left of Kronecker products."""
    comparison = Comparison.of(recipe)
    tolerance = tolerance_of(recipe)
    # Not ">", which NaN isn't either
    wrong = {name: e for name, e in comparison.errors.items() if not e <= tolerance}
    assert not wrong, wrong
    if has_to_be_factorwise(recipe):
        assert not has_kron(comparison.fgraph)


def checked(family, number=None, **options):
    """Return a test of random recipes of a family."""
    test = given(recipes(family))(check)
    if number is not None:
        test = seed(number)(test)
    return settings(deadline=None, suppress_health_check=list(HealthCheck), **options)(test)


# 500, more of those that take less time
EXAMPLES = {"products": 300, "solves": 85, "decompositions": 45, "noise": 35, "batches": 35}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_expressions(family):
    # The nightly test looks for a smaller expression that fails too, which may take hours
    number = EXAMPLES[family]
    checked(family, max_examples=number, derandomize=True, phases=[Phase.generate])()


def _unknown(*core):
    return Leaf("general", (), core, "float64", "none", 0)


def _known(*core):
    return Leaf("general", (), core, "float64", "all", 0)


def _spd(*core, batch=(), known="all"):
    return Leaf("positive", batch, core, "float64", known, 0)


def _assumed(leaf):
    return Node("assume", (leaf,), ("positive_definite",))


def _kron(*factors):
    return reduce(lambda a, b: Node("kron", (a, b)), factors)


def _chol_logdet_of_kron(batch, other_batch):
    A, B = _spd(4, 4, batch=batch), _spd(3, 3, batch=other_batch)
    return Node("chol logdet", (_kron(A, B),))


_SCALAR = Leaf("scalar", (), (), "float64", "all", 0)


def _over_axes(*sizes):
    A, B = (Leaf("general", (), (n, n), "float64", "all but the last", 0) for n in sizes)
    I_A, I_B = (Node("eye", (factor,), (False, "float64")) for factor in (A, B))
    return Node("add", (_kron(A, I_B), _kron(I_A, B)))


FOUND = {
    "rewritten without an end": Node(
        "sum along", (Node("pinv", (Node("kron", (_unknown(4, 4), _unknown(4, 2))),)),), (-1,)
    ),
    "one number for all entries of a row": Node(
        "sum of row", (Node("inv", (Node("kron", (_unknown(3, 3), _unknown(2, 2))),)),), (1,)
    ),
    "zeros that are made of what they replace": Node(
        "eigh",
        (
            Node(
                "transpose",
                (
                    Node(
                        "kron",
                        (
                            Leaf("indefinite", (2,), (1, 1), "float64", "none", 4),
                            Node(
                                "assume",
                                (Leaf("positive", (), (3, 3), "float64", "none", 1),),
                                ("symmetric",),
                            ),
                        ),
                    ),
                ),
            ),
            Leaf("data", (2,), (3, 2), "float64", "none", 6),
        ),
    ),
    "a scale of one row and column": Node(
        "lu",
        (
            Node(
                "times",
                (
                    Node("kron", (_known(1, 1), _known(2, 2))),
                    Leaf("scalar", (), (), "float64", "all", 0),
                ),
            ),
        ),
    ),
    "a sum over two batch dimensions": Node(
        "solve",
        (
            _kron(_spd(2, 2), _spd(3, 3)),
            Leaf("data", (2, 3), (6,), "float64", "all", 0),
        ),
        ("pos", 1),
    ),
    "a scalar for each of a batch that is summed": Node(
        "sum of entries",
        (
            Node(
                "plus noise",
                (
                    Node(
                        "kron",
                        (
                            Node(
                                "kron",
                                (
                                    Leaf("positive", (1, 2), (3, 3), "float64", "none", 3),
                                    Leaf("negative", (), (4, 4), "float64", "all", 8),
                                ),
                            ),
                            Leaf("negative", (2, 1), (1, 1), "float64", "all", 1),
                        ),
                    ),
                    Leaf("scalar", (), (), "float64", "none", 9),
                ),
                ("eye", 12, "float64"),
            ),
        ),
    ),
    "a row of each product in a batch": Node(
        "row",
        (Node("kron", tuple(Leaf("general", (2,), (n, n), "float64", "all", n) for n in (3, 2))),),
        (-1,),
    ),
    "a size of one that the type doesn't show": Node(
        "solve",
        (
            Node(
                "add",
                (
                    _kron(*map(_assumed, (_spd(2, 2), _spd(1, 1), _spd(3, 3)))),
                    Node(
                        "times",
                        (
                            _kron(
                                _assumed(_spd(2, 2, known="all but the last")),
                                _spd(1, 1, known="all but the last"),
                                _spd(3, 3),
                            ),
                            Leaf("scalar", (), (), "float64", "all", 0),
                        ),
                    ),
                ),
            ),
            Leaf("data", (), (6,), "float64", "all", 0),
        ),
        ("pos", 1),
    ),
    "the exponential of a number whose type is a row": Node(
        "sum of entries",
        (Node("expm", (Node("transpose", (Node("over", (_over_axes(5, 1), _SCALAR)),)),)),),
    ),
    "gradients in diagonals of a batch": _chol_logdet_of_kron((2,), (2,)),
    "one gradient for each entry of a batch": _chol_logdet_of_kron((), (2,)),
    "the signs of a factor that a batch shares": Node(
        "qr",
        (
            Node("negative", (_kron(_known(1, 1), replace(_known(2, 1), batch=(2,))),)),
            Leaf("data", (2,), (2,), "float64", "all", 4),
            Leaf("data", (2,), (2,), "float64", "all", 5),
        ),
    ),
    "vectors with a batch dimension more than the product": Node(
        "whitened norm",
        (
            _kron(_spd(3, 3, batch=(2,)), _spd(2, 2, batch=(2,))),
            Leaf("data", (3, 2), (6,), "float64", "all", 0),
        ),
    ),
    "vectors of two batches that broadcast": Node(
        "bilinear of solve",
        (
            _kron(_spd(4, 4), _spd(3, 3, batch=(2, 1))),
            Leaf("data", (2, 1), (12,), "float64", "all", 0),
            Leaf("data", (1, 2), (12,), "float64", "all", 0),
        ),
        ("pos",),
    ),
    "unit vectors are the product of themselves and an identity matrix": Node(
        "slice",
        (Node("pinv", (_kron(_known(2, 3), _known(3, 5)),)),),
        ((None, None, 2), (None, None, 2)),
    ),
}


@pytest.mark.parametrize("root", FOUND.values(), ids=list(FOUND))
def test_expressions_that_once_failed(root):
    check(Recipe(root, pregrad=False))


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_thousand_random_expressions(family, part):
    number = secrets.randbits(32)
    print(f"{family}, part {part}: seed {number}")
    checked(family, number, max_examples=1000, database=None)()
