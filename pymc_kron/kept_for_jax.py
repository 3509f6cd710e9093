"""Operations that stay whole on JAX, which differentiates the program after PyTensor's rewrites.

Samplers that run on JAX ask it for the gradient. It would differentiate the eigenvectors in a
`pymc_kron.kron_sum.KronSum`, whose derivatives don't exist at repeated eigenvalues.
"""

from pytensor.graph.basic import Apply
from pytensor.graph.rewriting.basic import node_rewriter

from pymc_kron.backend_op import BackendOp
from pymc_kron.closed_form import register_before_specialize
from pymc_kron.kron_sum import KronSumOp


class KeptForJax(BackendOp):
    """A `KronSumOp` as an operation that is no graph, for JAX alone.

    Parameters
    ----------
    op
        The operation, for the types of its inputs.
    """

    __props__ = ("op",)
    conversion = "pymc_kron.jax_closed_form"

    def __init__(self, op: KronSumOp):
        self.op = op

    def make_node(self, *inputs):
        return Apply(self, list(inputs), [output_type() for output_type in self.op.output_types])

    def perform(self, node, inputs, output_storage):
        raise NotImplementedError("KeptForJax is for programs that run on JAX")


@node_rewriter([KronSumOp])
def keep_for_jax(fgraph, node):
    """An operation on a sum of Kronecker products -> the same, with its pullback, for JAX"""
    # Importing JAX takes a second, which only those who use it wait for
    import pymc_kron.jax_closed_form  # noqa: F401

    return KeptForJax(node.op)(*node.inputs, return_list=True)


register_before_specialize(keep_for_jax, "jax", position=1.75)
