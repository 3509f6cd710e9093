"""Cases, dense references and graph checks that the tests share."""

import os
import subprocess
import sys
from functools import reduce
from itertools import product
from operator import is_not
from pathlib import Path

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import Mode, get_mode
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.graph.op import HasInnerGraph
from pytensor.graph.rewriting.basic import dfs_rewriter, node_rewriter
from pytensor.link.basic import PerformLinker, WrapLinker
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.products import KroneckerProduct

# Registers the rewrites
import pymc_kron  # noqa: F401

# In fused loops the Python linker takes reciprocals in single precision. They and operations in
# place take time to compile, and change nothing in what the rewrites are tested for.
PY = Mode(linker="py", optimizer="fast_run").excluding("fusion", "inplace")
WITHOUT_KRON = PY.excluding("kron")


@node_rewriter([OpFromGraph])
def inline(fgraph, node):
    """Replace an operation that is made of others with these, which is faster to compile."""
    return inline_ofg_node(node)


# Without any rewrites: for references, and for graphs that are rewritten already
AS_WRITTEN = Mode(linker="py", optimizer=dfs_rewriter(inline))

# Products of float64 arrays that both sides round in a different order
RTOL = {"float64": 1e-10, "float32": 2e-4}


def crossed(*options):
    """Return parameters: each option with the last one of the others, and the rest nightly."""
    last = [values[-1] for values in options]
    return [
        pytest.param(
            *values, marks=() if sum(map(is_not, values, last)) <= 1 else pytest.mark.nightly
        )
        for values in product(*options)
    ]


def random_matrix(rng, *shape, dtype="float64"):
    """Return a well-conditioned matrix, square or not."""
    matrix = rng.normal(size=shape)
    if shape[-1] == shape[-2]:
        matrix = matrix + 2 * shape[-1] ** 0.5 * np.eye(shape[-1])
    return matrix.astype(dtype)


def random_spd(rng, n, *, batch=(), dtype="float64"):
    """Return a well-conditioned symmetric positive definite matrix, or a batch of them."""
    root = rng.normal(size=(*batch, n, n)) / n**0.5
    return (root @ np.swapaxes(root, -1, -2) + np.eye(n)).astype(dtype)


def dense_kron(*factors):
    """Return the Kronecker product, batched over leading dimensions, unlike ``np.kron``."""

    def kron(a, b):
        product = a[..., :, None, :, None] * b[..., None, :, None, :]
        rows, columns = a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1]
        return product.reshape((*product.shape[:-4], rows, columns))

    return reduce(kron, factors)


def symbolic_dense_kron(a, b):
    """Return the product of two matrices in a way that no rewrite recognises."""
    a, b = pt.as_tensor(a), pt.as_tensor(b)
    rows, columns = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]
    return (a[:, None, :, None] * b[None, :, None, :]).reshape((rows, columns))


def symbolic_matrices(arrays):
    """Return variables of the dtypes and ranks of arrays, without static shapes."""
    return [
        pt.tensor(f"A{i}", dtype=array.dtype, shape=(None,) * array.ndim)
        for i, array in enumerate(arrays)
    ]


def all_nodes(fgraph):
    for node in fgraph.apply_nodes:
        yield node
        if isinstance(node.op, HasInnerGraph):
            yield from all_nodes(node.op.fgraph)


def count_ops(fgraph, op_type):
    """Count the nodes of an Op, bare or in a Blockwise, inner graphs included."""
    return sum(
        isinstance(node.op.core_op if isinstance(node.op, Blockwise) else node.op, op_type)
        for node in all_nodes(fgraph)
    )


def has_kron(fgraph):
    return count_ops(fgraph, KroneckerProduct) > 0


def largest_static_size(fgraph):
    """Return the number of entries of the largest array whose static shape is known."""
    return max(
        np.prod(out.type.shape, dtype=int)
        for node in all_nodes(fgraph)
        for out in node.outputs
        if None not in getattr(out.type, "shape", (None,))
    )


def largest_computed_size(inputs, outputs, values, *, mode="NUMBA"):
    """Return the number of entries of the largest array that a program computes.

    The graph is the one that `mode` compiles; it runs node by node in Python, so that arrays of
    unknown static shape are measured too.
    """
    # Inner graphs are compiled for the linkers that PyTensor knows
    excluded = ("fusion", "inplace", "ofg_inner_graph")
    optimizer = get_mode(mode).excluding(*excluded).provided_optimizer
    sizes = []
    mode = Mode(linker=measuring_linker(sizes), optimizer=optimizer)
    pm.compile(inputs, outputs, mode=mode, on_unused_input="ignore", random_seed=1)(*values)
    return max(sizes)


def largest_size_in(function, *values):
    """Return the number of entries of the largest array in a program for the Python linker."""
    fgraph = function.maker.fgraph
    sizes = []
    mode = Mode(linker=measuring_linker(sizes), optimizer=AS_WRITTEN.provided_optimizer)
    compile_py(fgraph.inputs, fgraph.outputs, mode)(*values)
    return max(sizes)


def measuring_linker(sizes):
    """Return a linker for programs that run node by node and note the sizes of their arrays."""

    def measure(fgraph, i, node, thunk):
        assert not has_kron_inside(node)
        thunk()
        sizes.extend(np.size(value) for (value,) in thunk.outputs)

    return WrapLinker([PerformLinker()], measure)


def has_kron_inside(node):
    op = node.op.core_op if isinstance(node.op, Blockwise) else node.op
    if isinstance(op, KroneckerProduct):
        return True
    return isinstance(op, HasInnerGraph) and has_kron(op.fgraph)


def largest_jax_size(function, *arguments):
    """Return the number of entries of the largest array in a traced JAX program."""
    import jax
    from jax.extend.core import jaxprs_in_params

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield int(np.prod(variable.aval.shape))
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*arguments).jaxpr))


def run_python(*arguments, **environment):
    """Run a program in a process of its own, in which warnings are errors as in the tests."""
    warnings = ["-W", "error", "-W", "ignore:PyTensor could not link to a BLAS installation"]
    finished = subprocess.run(
        [sys.executable, *warnings, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]


def compile_py(inputs, outputs, mode=PY):
    return pytensor.function(inputs, outputs, mode=mode, on_unused_input="ignore")


def finite_differences(function, x, eps=1e-6):
    """Return the gradient of a scalar function of an array, by central differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = eps * max(1.0, abs(x[index]))
        gradient[index] = (function(x + step) - function(x - step)) / (2 * step[index])
    return gradient


def assert_gradient_after_rewrites(cost, factors, arrays):
    """Compare the gradient that PyMC would take with finite differences of the dense program."""
    [rewritten] = rewrite_pregrad([cost])
    gradients = compile_py(factors, pt.grad(rewritten, factors))(*arrays)
    dense = compile_py(factors, cost, mode=AS_WRITTEN)
    for i, gradient in enumerate(gradients):
        numerical = finite_differences(
            lambda array, i=i: dense(*arrays[:i], array, *arrays[i + 1 :]), arrays[i]
        )
        assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-7)
