"""``einsum("ij,j->i", A (x) B, x) = (A (x) B) @ x``, and so on; the same for its gradients.

PyTensor replaces an einsum by what it is made of when it specializes operations, after the bundle
has had its turn, and its pullback not at all.
"""

from pytensor.compile.builders import OpFromGraph
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FrozenFunctionGraph
from pytensor.scalar.basic import Switch
from pytensor.tensor.einsum import Einsum
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.shape import Reshape

from pymc_kron.rewriting.bundle import register_kron
from pymc_kron.rewriting.journal import product_in
from pymc_kron.structure import Refusal


@register_kron(Einsum, OpFromGraph)
def einsum_of_kron(fgraph, node):
    """einsum("ij,j->i", A (x) B, x) -> (A (x) B) @ x, and its pullback likewise"""
    n_operands = _number_of_operands(node)
    positions = [i for i in range(n_operands) if product_in(node.inputs[i]) is not None]
    if not positions:
        return None
    inner = node.op.fgraph
    if any(_is_hidden(inner, inner.inputs[i]) for i in positions):
        raise Refusal(
            "this einsum isn't made of products of matrices",
            "write what it does, like `K @ x`, pt.trace(K), pt.diagonal(K) or (K * X).sum()",
        )
    return inline_ofg_node(node)


def _number_of_operands(node: Apply) -> int:
    """Return how many operands an einsum, or the one whose pullback a node is, has: or 0."""
    if isinstance(node.op, Einsum):
        return len(node.inputs)
    match node.inputs:
        case [*operands, out, _] if isinstance(out.owner_op, Einsum):
            return len(operands) if operands == out.owner.inputs else 0
    return 0


def _is_hidden(inner: FrozenFunctionGraph, operand: Variable) -> bool:
    """Whether an operand is unfolded to another shape, or masked, and isn't a matrix any more.

    The pullback doesn't need all operands, and a frozen graph has no clients for the others.
    """
    for client, _ in inner.clients.get(operand, ()):
        match client.op:
            case Reshape() | Elemwise(scalar_op=Switch()):
                return True
            case DimShuffle() if _is_hidden(inner, client.outputs[0]):
                return True
    return False
