"""``pm.MvNormal`` with a Kronecker product for a covariance is a `KroneckerMvNormal`.

One identity in two places. In PyMC's intermediate representation of a model it gives the random
variable the factorwise log-density; it runs before the representation is canonicalized, on the
covariance as it was written. In a program that draws, it gives the factorwise draw.
"""

from pymc.logprob.rewriting import logprob_rewrites_db
from pytensor.compile.mode import optdb
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.basic import dfs_rewriter
from pytensor.tensor.random.basic import MvNormalRV
from pytensor.tensor.variable import TensorVariable

from pymc_kron.distributions.kronecker_mvnormal import Form, KroneckerMvNormalRV
from pymc_kron.rewriting.bundle import recorded, tags_of
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.structure import (
    Matrices,
    gram_root,
    inverted_matrix,
    is_lower_triangular,
    square_kron_factors,
    strip_transposes,
)


@recorded([MvNormalRV])
def mvnormal_of_kron_logp(fgraph, node):
    """MvNormal(mu, cov=A (x) B) -> KroneckerMvNormal(mu, covs=[A, B]), likewise chol and tau"""
    return _as_kronecker_mvnormal(fgraph, node)


@recorded([MvNormalRV])
def mvnormal_of_kron_draws(fgraph, node):
    """MvNormal(mu, cov=A (x) B) -> mu + (chol(A) (x) chol(B)) z, likewise chol and tau

    The other methods of drawing are for semidefinite covariances, and left as they are.
    """
    if node.op.method != "cholesky":
        return None
    return _as_kronecker_mvnormal(fgraph, node)


def _as_kronecker_mvnormal(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    rng, size, mu, cov = node.inputs
    parametrization = _kronecker_parametrization(fgraph, cov)
    if parametrization is None:
        return None
    factors, forms = parametrization
    rv = KroneckerMvNormalRV.rv_op(
        mu, *factors, forms=forms, size=size, rng=rng, dtype=node.outputs[1].type.dtype
    )
    return rv.owner.outputs


def _kronecker_parametrization(
    fgraph: FunctionGraph, cov: TensorVariable
) -> tuple[Matrices, list[Form]] | None:
    """Return factors and what they are, if the covariance of a ``pm.MvNormal`` is a product.

    PyMC writes ``chol=L`` as ``cov=L @ L.T`` and ``tau=Q`` as ``cov=inv(Q)``; the factors of a
    covariance may be written in these ways too.
    """
    cov, _ = strip_transposes(cov)
    matrix, form = _matrix_and_form(fgraph, cov)
    factors = square_kron_factors(matrix, real=True)
    if factors is None:
        return None
    if form == "chol":
        return factors, [form] * len(factors)
    aligned = positive_definite_factors(fgraph, factors)
    described = [_matrix_and_form(fgraph, factor, form) for factor in aligned]
    return [matrix for matrix, _ in described], [form for _, form in described]


def _matrix_and_form(
    fgraph: FunctionGraph, matrix: TensorVariable, form: Form = "cov"
) -> tuple[TensorVariable, Form]:
    """Return what a covariance (or a precision) was computed from, and what that is."""
    inverse = inverted_matrix(matrix)
    if inverse is not None:
        return inverse, "tau" if form == "cov" else "cov"
    chol = gram_root(matrix)
    if form == "cov" and chol is not None and is_lower_triangular(fgraph, chol):
        return chol, "chol"
    return matrix, form


# Between the lowering of named dims and the canonicalization of the representation
logprob_rewrites_db.register(
    "mvnormal_of_kron_logp",
    dfs_rewriter(mvnormal_of_kron_logp),
    *tags_of("mvnormal_of_kron_logp", "basic"),
    position=0.5,
)
# Before the inner graphs of symbolic random variables are inlined
optdb.register(
    "mvnormal_of_kron_draws",
    dfs_rewriter(mvnormal_of_kron_draws),
    *tags_of("mvnormal_of_kron_draws", "fast_run", "fast_compile"),
    position=-0.02,
)
