"""``pm.MvNormal`` with a Kronecker product for a covariance is a `KroneckerMvNormal`.

One identity in two places. In PyMC's intermediate representation of a model it gives the random
variable the factorwise log-density; it runs before the representation is canonicalized, on the
covariance as it was written. In a program that draws, it gives the factorwise draw.
"""

from pymc.distributions.multivariate import MatrixNormalRV
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.rewriting import logprob_rewrites_db
from pytensor import tensor as pt
from pytensor.compile.mode import optdb
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.basic import dfs_rewriter
from pytensor.tensor.random.basic import MvNormalRV
from pytensor.tensor.variable import TensorVariable

from pymc_kron.distributions.grid_rv import KroneckerMvNormalRV
from pymc_kron.factors import Form
from pymc_kron.rewriting.bundle import as_replacement, recorded, tags_of
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.rewriting.gram import is_root_of_kron
from pymc_kron.rewriting.sums import kron_sum_of
from pymc_kron.structure import (
    Matrices,
    gram_root,
    inverted_matrix,
    is_lower_triangular,
    square_kron_factors,
    strip_transposes,
)
from pymc_kron.unfolded import keep_kron_unfolded


@recorded([MvNormalRV])
def mvnormal_of_kron_logp(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """MvNormal(mu, cov=A (x) B) -> KroneckerMvNormal(mu, covs=[A, B]), likewise chol and tau"""
    return _as_kronecker_mvnormal(fgraph, node)


@recorded([MvNormalRV])
def mvnormal_of_kron_sum_logp(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """MvNormal(mu, cov=A (x) B + s I) -> the normal whose covariance is Q diag(Lambda) Q'"""
    return _as_kron_sum_mvnormal(fgraph, node)


@recorded([MvNormalRV])
def mvnormal_of_kron_draws(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """MvNormal(mu, cov=A (x) B) -> mu + (chol(A) (x) chol(B)) z, likewise chol and tau

    The other methods of drawing are for semidefinite covariances, and left as they are.
    """
    if node.op.method != "cholesky":
        return None
    return _inlined(_as_kronecker_mvnormal(fgraph, node))


@recorded([MvNormalRV])
def mvnormal_of_kron_sum_draws(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """MvNormal(mu, cov=A (x) B + s I) -> mu + (Q_A (x) Q_B) (sqrt(Lambda) z)"""
    if node.op.method != "cholesky":
        return None
    return _inlined(_as_kron_sum_mvnormal(fgraph, node))


@recorded([MatrixNormalRV])
def matrixnormal_of_kron_draws(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """MatrixNormal(mu, rowchol=A (x) B, colchol=C (x) D) -> mu + ((A (x) B) Z) (C (x) D)'"""
    rng, size, mu, rowchol, colchol = node.inputs
    if not any(map(is_root_of_kron, (rowchol, colchol))):
        return None
    if rv_size_is_none(size):
        size = implicit_size_from_params(mu, rowchol, colchol, ndims_params=[2, 2, 2])
    shape = (*size, rowchol.shape[-1], colchol.shape[-1])
    next_rng, z = pt.random.normal(size=shape, rng=rng, return_next_rng=True)
    return [next_rng, as_replacement(node.outputs[1], mu + rowchol @ z @ colchol.mT)]


def _inlined(outputs: list[Variable] | None) -> list[Variable] | None:
    return None if outputs is None else inline_ofg_node(outputs[0].owner)


def _as_kron_sum_mvnormal(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    rng, size, mu, cov = node.inputs
    kron_sum = kron_sum_of(fgraph, cov)
    if kron_sum is None:
        return None
    dtype = node.outputs[1].type.dtype
    rv = KroneckerMvNormalRV.rv_op(
        mu, *kron_sum.inputs, structure=kron_sum.layout, size=size, rng=rng, dtype=dtype
    )
    return rv.owner.outputs


def _as_kronecker_mvnormal(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    rng, size, mu, cov = node.inputs
    parametrization = _kronecker_parametrization(fgraph, cov)
    if parametrization is None:
        return None
    factors, forms = parametrization
    rv = KroneckerMvNormalRV.rv_op(
        mu, *factors, structure=tuple(forms), size=size, rng=rng, dtype=node.outputs[1].type.dtype
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
for position, rewrite in (
    (0.5, mvnormal_of_kron_logp),
    (0.5, mvnormal_of_kron_sum_logp),
    (0.6, keep_kron_unfolded),
):
    logprob_rewrites_db.register(
        rewrite.__name__,
        dfs_rewriter(rewrite),
        *tags_of(rewrite.__name__, "basic"),
        position=position,
    )
# After the inner graphs of symbolic random variables are inlined: pm.MvStudentT draws a MvNormal
for rewrite in (mvnormal_of_kron_draws, mvnormal_of_kron_sum_draws, matrixnormal_of_kron_draws):
    optdb.register(
        rewrite.__name__,
        dfs_rewriter(rewrite),
        *tags_of(rewrite.__name__, "fast_run", "fast_compile"),
        position=-0.005,
    )
