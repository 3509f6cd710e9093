"""Which graphs the rewrites have something to do with: those that a Kronecker product is in."""

from collections.abc import Iterable
from functools import cache

from pytensor.compile.builders import OpFromGraph
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.op import Op
from pytensor.graph.traversal import apply_ancestors
from pytensor.tensor.linalg.products import KroneckerProduct

from pymc_kron.kron_sum import KronSumOp
from pymc_kron.rewriting.journal import journal_of


def has_source(nodes: Iterable[Apply]) -> bool:
    """Whether any of some nodes makes a Kronecker product, differentiates one, or solves with one.

    Without one, nothing is read as a sum of terms, and graphs are PyTensor's own.
    """
    return any(_is_source(node.op) for node in nodes)


def is_behind(fgraph: FunctionGraph, *matrices: Variable) -> bool:
    """Whether any of some matrices is computed from a Kronecker product, or may have been.

    Other rewrites may have taken the product away, and the journal knows that there was one.
    """
    return journal_of(fgraph) is not None or has_source(apply_ancestors(matrices))


def _is_source(op: Op) -> bool:
    core_op = getattr(op, "core_op", op)
    return isinstance(core_op, KroneckerProduct | KronSumOp) or is_kron_pullback(core_op)


def is_kron_pullback(op: Op) -> bool:
    """Whether an operation is PyTensor's pullback of kron, or a batch of it."""
    op = getattr(op, "core_op", op)
    if not isinstance(op, OpFromGraph) or len(op.inner_inputs) != 4 or len(op.inner_outputs) != 2:
        return False
    types = tuple(op.input_types)
    if any(getattr(input_type, "ndim", None) != 2 for input_type in types):
        return False
    return op == _kron_pullback(types)


@cache
def _kron_pullback(types) -> OpFromGraph:
    """Return the operation that PyTensor makes of the pullback of kron, for these types."""
    A, B, K, G = (input_type() for input_type in types)
    kron = KroneckerProduct()(A, B).owner.op
    [gradient, *_] = kron.pullback([A, B], [K], [G])
    return gradient.owner.op
