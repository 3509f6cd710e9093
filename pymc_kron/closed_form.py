"""Operations that know their gradient: differentiation doesn't see what they are made of.

An operation is a graph, and a pullback that is written down beside it. It is kept whole until
PyTensor specializes the program; then its graph takes its place, and shares what it has in common
with the graphs of other operations, such as the decomposition of a matrix.
"""

from abc import abstractmethod
from collections.abc import Sequence

from pytensor.compile.mode import optdb
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.gradient import pullback
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import _vectorize_node, vectorize_graph
from pytensor.graph.rewriting.basic import (
    MergeOptimizer,
    NodeRewriter,
    WalkingGraphRewriter,
    node_rewriter,
)
from pytensor.tensor.symbolic import TensorSymbolicOp
from pytensor.tensor.variable import TensorVariable


class OpaqueOp(TensorSymbolicOp):
    """An operation that a graph defines, into which no rewrite looks before specialize."""

    def do_constant_folding(self, fgraph: FunctionGraph, node: Apply) -> bool:
        """Leave it to what takes its place."""
        return False


class ClosedFormOp(OpaqueOp):
    """An operation that a graph defines, with a pullback of its own."""


class LogDensityOp(ClosedFormOp):
    """A log-density, or a batch of them, whose gradient is an operation too.

    It has two outputs, the log-density and whether the covariance is positive definite.
    """

    @abstractmethod
    def gradients(self, inputs: Sequence, logp_bar: TensorVariable) -> list[TensorVariable]:
        """Return the gradients in the inputs, given that in the log-density."""

    def differentiable_gradients(
        self, inputs: Sequence, logp_bar: TensorVariable
    ) -> list[TensorVariable]:
        """Return the same gradients in a form to be differentiated once more."""
        return self.gradients(inputs, logp_bar)

    def pullback(
        self,
        inputs: Sequence[TensorVariable],
        outputs: Sequence[TensorVariable],
        cotangents: Sequence[TensorVariable],
    ) -> list[TensorVariable]:
        logp_bar, _ = cotangents
        return GradientOp(log_density=self)(*inputs, logp_bar, return_list=True)


class GradientOp(ClosedFormOp):
    """The gradients of a `LogDensityOp` in its inputs, given that in the log-density.

    Whole, so that no rewrite takes the formulas apart that are made to share their parts with
    the log-density.
    """

    __props__ = ("log_density",)
    log_density: LogDensityOp

    def build_inner_graph(self, *inputs_and_bar: TensorVariable) -> list[TensorVariable]:
        *inputs, logp_bar = inputs_and_bar
        gradients = self.log_density.gradients(inputs, logp_bar)
        return [
            gradient.astype(inp.type.dtype) for gradient, inp in zip(gradients, inputs, strict=True)
        ]

    def pullback(
        self,
        inputs: Sequence[TensorVariable],
        outputs: Sequence[TensorVariable],
        cotangents: Sequence[TensorVariable],
    ) -> list[TensorVariable]:
        *own_inputs, logp_bar = inputs
        gradients = self.log_density.differentiable_gradients(own_inputs, logp_bar)
        return pullback(
            gradients,
            [*own_inputs, logp_bar],
            cotangents,
            disconnected_inputs="ignore",
            return_disconnected="disconnected",
        )


@_vectorize_node.register(OpaqueOp)
def vectorize_opaque(op: OpaqueOp, node: Apply, *batched_inputs: Variable) -> list[Variable]:
    """Vectorize what an operation is made of."""
    replace = dict(zip(node.inputs, batched_inputs, strict=True))
    return vectorize_graph(inline_ofg_node(node), replace)


@node_rewriter([ClosedFormOp])
def inline_closed_form(fgraph: FunctionGraph, node: Apply) -> list[Variable]:
    """An operation with a gradient in closed form -> the graph that defines it"""
    return inline_ofg_node(node)


def register_before_specialize(rewrite: NodeRewriter, *tags: str, position: float) -> None:
    """Register a walk over the graph between stabilize, at 1.5, and specialize, at 2."""
    walk = WalkingGraphRewriter(rewrite, "in_to_out", ignore_newtrees=False)
    optdb.register(rewrite.__name__, walk, *tags, position=position)


register_before_specialize(inline_closed_form, "fast_run", "fast_compile", position=1.8)
# What two operations share is merged at once. PyTensor merges after specialize, and by then it may
# have lost sight of a node whose twin was rewritten in the meantime.
optdb.register(
    "merge_closed_forms", MergeOptimizer(), "fast_run", "fast_compile", "merge", position=1.95
)


def summed_to(gradient: TensorVariable, like: TensorVariable) -> TensorVariable:
    """Sum a gradient over the axes along which its variable was broadcast."""
    extra = gradient.type.ndim - like.type.ndim
    if extra > 0:
        gradient = gradient.sum(axis=tuple(range(extra)))
    broadcast = [
        axis
        for axis, (one, other) in enumerate(
            zip(like.type.broadcastable, gradient.type.broadcastable, strict=True)
        )
        if one and not other
    ]
    return gradient.sum(axis=broadcast, keepdims=True) if broadcast else gradient
