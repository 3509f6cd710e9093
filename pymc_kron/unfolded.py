"""Keeping constant Kronecker products and identity matrices from being computed beforehand.

PyMC canonicalizes the random variables of a model before there is a log-density, and PyTensor
folds constants then: ``pt.eye(N)`` and the product of two known factors become arrays with N x N
entries before any rewrite of ours has seen what they are for.
"""

from collections.abc import Sequence
from typing import Any

from pytensor.compile.mode import optdb
from pytensor.graph.basic import Apply, Constant, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.op import Op
from pytensor.graph.rewriting.basic import node_rewriter
from pytensor.graph.traversal import graph_inputs
from pytensor.tensor.basic import Eye
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.rewriting.blockwise import blockwise_of


class Unfolded(Op):
    """The identity, except that what is computed from a constant isn't one any more."""

    __props__ = ()
    view_map = {0: [0]}  # noqa: RUF012

    def make_node(self, x: Variable) -> Apply:
        return Apply(self, [x], [x.type()])

    def perform(self, node: Apply, inputs: Sequence[Any], output_storage: list[list[Any]]) -> None:
        output_storage[0][0] = inputs[0]

    def infer_shape(self, *args: Any) -> list[tuple[Variable, ...]]:
        # Older versions of PyTensor pass the graph, before the node and the shapes
        return args[-1]

    def pullback(
        self,
        inputs: Sequence[Variable],
        outputs: Sequence[Variable],
        cotangents: Sequence[Variable],
    ) -> Sequence[Variable]:
        return cotangents

    def do_constant_folding(self, fgraph: FunctionGraph, node: Apply) -> bool:
        return False


unfolded = Unfolded()


def without_unfolded(var: Variable) -> Variable:
    """Return the constant behind an `Unfolded`, and any other variable as it is."""
    match var.owner_op_and_inputs:
        case (Unfolded(), constant):
            return constant
    return var


@node_rewriter([KroneckerProduct, blockwise_of(KroneckerProduct), Eye])
def keep_kron_unfolded(fgraph: FunctionGraph, node: Apply) -> list[Variable] | None:
    """kron(A, B) of constants -> kron(unfolded(A), B), and pt.eye(N) likewise"""
    first, *others = node.inputs
    if not all(isinstance(inp, Constant) for inp in graph_inputs(node.inputs)):
        return None
    if isinstance(first.owner_op, Unfolded):
        return None
    [old_out] = node.outputs
    return Apply(node.op, [unfolded(first), *others], [old_out.type()]).outputs


@node_rewriter([Unfolded])
def fold_again(fgraph: FunctionGraph, node: Apply) -> list[Variable]:
    """unfolded(A) -> A, once the rewrites have had their chance"""
    return node.inputs


optdb["specialize"].register("fold_again", fold_again, "fast_run", "fast_compile")
