"""How JAX differentiates an operation whose gradient has a closed form.

Importing this module registers the operations with PyTensor's JAX backend.
"""

import jax
from pytensor.compile.mode import get_mode
from pytensor.gradient import disconnected_type
from pytensor.graph.fg import FunctionGraph
from pytensor.link.jax.dispatch import jax_funcify

from pymc_kron.kept_for_jax import KeptForJax


@jax_funcify.register(KeptForJax)
def jax_funcify_kept(op, node, **kwargs):
    """Return a function with a pullback of its own.

    The pullback is built when it is asked for: that of a solution is a solution too.
    """

    @jax.custom_vjp
    def apply(*inputs):
        stand_ins = [inp.type() for inp in node.inputs]
        results = jax_function(
            stand_ins, op.op.fgraph.bind(dict(zip(op.op.fgraph.inputs, stand_ins, strict=True)))
        )(*inputs)
        return results if len(results) > 1 else results[0]

    def forward(*inputs):
        return apply(*inputs), inputs

    def backward(inputs, cotangents):
        if len(node.outputs) == 1:
            cotangents = (cotangents,)
        differentiable = [
            cotangent
            for cotangent, out in zip(cotangents, node.outputs, strict=True)
            if _is_differentiable(out)
        ]
        return _pullback(op.op, node)(*inputs, *differentiable)

    apply.defvjp(forward, backward)
    return apply


def _pullback(op, node):
    inputs = [inp.type() for inp in node.inputs]
    outputs = op(*inputs, return_list=True)
    cotangents = [out.type() if _is_differentiable(out) else disconnected_type() for out in outputs]
    gradients = [
        gradient.astype(inp.type.dtype)
        for inp, gradient in zip(inputs, op.pullback(inputs, outputs, cotangents), strict=True)
    ]
    return jax_function([*inputs, *filter(_is_differentiable, cotangents)], gradients)


def _is_differentiable(var):
    return getattr(var.type, "dtype", "").startswith("float")


def jax_function(inputs, outputs):
    """Return a graph as a function for JAX, after PyTensor's rewrites."""
    fgraph = FunctionGraph(inputs, outputs, clone=True)
    get_mode("JAX").optimizer.rewrite(fgraph)
    return jax_funcify(fgraph)
