"""The log-density of a model on several devices, each of which holds a part of the grid.

JAX splits a program by the arrays that it is given, where it can tell how. It can't for a solve
along an axis, before which it gathers the whole grid on every device, nor for a product along the
axis that is split, whose partial sums are as large as the grid. So each
`pymc_kron.kernels.Kernel` is told. With the grid split along its first axis, and the factors on
every device:

- along any other axis, ``(p,n,q)`` is split along p, and each device works on its part alone;
- along the first one, where p is 1, the devices exchange parts first, so that q is split in place
  of n, and exchange them back afterwards. A device sends all of its part but the share that it
  keeps, and never holds more;
- a sum over the cells, ``(n,n)``, is that of the sums of the devices.

The rest is elementwise or sums over all cells, and JAX splits it as the data are split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pymc.distributions.distribution import PartialObservedRV
from pymc.logprob.rewriting import construct_ir_fgraph
from pymc.model.core import Model
from pymc.pytensorf import rewrite_pregrad
from pytensor import tensor as pt
from pytensor.compile.mode import get_mode
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.gradient import grad
from pytensor.graph.basic import Constant
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import graph_inputs
from pytensor.link.jax.dispatch import jax_funcify
from pytensor.tensor.type import TensorType

from pymc_kron.distributions.grid_rv import GridMvNormalRV
from pymc_kron.jax_closed_form import jax_function
from pymc_kron.kernels import Kernel
from pymc_kron.structure import current_length

type Logp = Callable[[Mapping[str, Any], Sequence[jax.Array]], jax.Array]

CELLS = "cells"


def sharded_logp(
    model: Model, devices: Sequence[jax.Device] | None = None
) -> tuple[Logp, list[jax.Array]]:
    """Return the log-density of a model for JAX, with its largest grid split over devices."""
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), (CELLS,))
    shape = _shape_of_largest_grid(model)
    if shape[0] % mesh.size:
        raise ValueError(
            f"The grid is split along its first axis, whose size must be a multiple of the number "
            f"of devices, got a grid of {' x '.join(map(str, shape))} cells and {mesh.size} "
            "devices. Pass fewer devices, or put another axis first."
        )

    def placement(array) -> NamedSharding:
        """Split what has a value for each cell, along its first axis."""
        dims = np.shape(array)
        has_cells = math.prod(shape) in np.cumprod(dims, dtype=int) and dims[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(CELLS) if has_cells else PartitionSpec())

    logp, data = _with_data_as_inputs(model.logp(), placement)
    [logp] = rewrite_pregrad([logp])
    outputs = [logp, *grad(logp, model.value_vars)]
    fgraph = FunctionGraph([*model.value_vars, *data], outputs, clone=True)
    # PyTensor has taken the gradient, and JAX sees the kernels as they are
    mode = get_mode("JAX").excluding("inline_kernel", "keep_for_jax")
    mode.including("local_check_parameter_to_ninf_switch").optimizer.rewrite(fgraph)
    compute = jax_funcify(fgraph, mesh=mesh)

    names = [value.name for value in model.value_vars]
    points = {name: placement(array) for name, array in model.initial_point().items()}
    arrays = [jax.device_put(array, placement(array)) for array in data.values()]
    whole = NamedSharding(mesh, PartitionSpec())

    @partial(
        jax.jit,
        in_shardings=(points, [array.sharding for array in arrays]),
        out_shardings=(whole, points),
    )
    def logp_and_gradient(point, data):
        value, *gradient = compute(*(point[name] for name in names), *data)
        return value, dict(zip(names, gradient, strict=True))

    @jax.custom_vjp
    def logp(point, data):
        return logp_and_gradient(point, data)[0]

    def backward(gradient, cotangent):
        return jax.tree.map(lambda leaf: cotangent * leaf, gradient), None

    logp.defvjp(logp_and_gradient, backward)
    return logp, arrays


def _shape_of_largest_grid(model: Model) -> tuple[int, ...]:
    shapes = []
    for node in construct_ir_fgraph(model.rvs_to_values).toposort():
        match node.op:
            case PartialObservedRV() | GridMvNormalRV(marginalize_missing=True):
                raise NotImplementedError(
                    "Models with missing cells can't be split over devices: which cells are missing "
                    "differs from part to part of the grid. Use one device for them."
                )
            case GridMvNormalRV():
                _rng, size, _mu, *parts = node.inputs
                n_batch = node.outputs[1].type.ndim - node.op.ndim_supp
                sizes = [*(size[i] for i in range(n_batch)), *node.op.covariance(*parts).sizes]
                shapes.append(tuple(map(current_length, sizes)))
    return max(shapes, key=math.prod)


def _with_data_as_inputs(logp, placement):
    """Return the graph with inputs for the data that are split, and constants for all others."""
    arrays = {
        inp: inp.get_value(borrow=True) if isinstance(inp, SharedVariable) else inp.data
        for inp in graph_inputs([logp])
        if isinstance(inp, SharedVariable | Constant) and isinstance(inp.type, TensorType)
    }
    is_split = {inp: CELLS in placement(array).spec for inp, array in arrays.items()}
    replace = {
        inp: pt.tensor(inp.name, dtype=array.dtype, shape=array.shape)
        if is_split[inp]
        else pt.constant(array)
        for inp, array in arrays.items()
    }
    logp = clone_replace(logp, replace)
    return logp, {replace[inp]: array for inp, array in arrays.items() if is_split[inp]}


@jax_funcify.register(Kernel)
def jax_funcify_kernel(op, node, *, mesh, **kwargs):
    """Return a function that works on the part of the grid that each device holds."""
    ndims = [var.type.ndim for var in (*node.inputs, node.outputs[0])]

    def on_a_part(*arrays):
        inputs = [pt.tensor(dtype=str(array.dtype), shape=array.shape) for array in arrays]
        results = jax_function(inputs, op(*inputs, return_list=True))(*arrays)
        return results if len(results) > 1 else results[0]

    def along_other_axis(*arrays):
        return _summed(on_a_part(*arrays))

    def along_split_axis(*arrays):
        [q] = {array.shape[2] for array in arrays if array.ndim == 3}
        arrays = [_with_whole_axis(array, mesh.size) for array in arrays]
        return _with_split_axis(_summed(on_a_part(*arrays)), q)

    def on_all_parts(*arrays):
        [(p, n)] = {array.shape[:2] for array in arrays if array.ndim == 3}
        if (n if p == 1 else p) % mesh.size:
            # A grid that isn't split
            return on_a_part(*arrays)
        split = PartitionSpec(None, CELLS) if p == 1 else PartitionSpec(CELLS)
        *in_specs, out_specs = [split if ndim == 3 else PartitionSpec() for ndim in ndims]
        function = along_split_axis if p == 1 else along_other_axis
        return jax.shard_map(function, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs)(
            *arrays
        )

    return on_all_parts if 3 in ndims else on_a_part


def _summed(result):
    """Sum over the devices what is a sum over the cells."""
    return lax.psum(result, CELLS) if result.ndim == 2 else result


def _with_whole_axis(array, n_devices):
    """Exchange parts, so that q is split in place of n: ``(1,n/k,q)->(1,n,q/k)``."""
    if array.ndim != 3:
        return array
    # Kernels are linear in the cells: zeros don't count
    array = jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % n_devices)))
    return lax.all_to_all(array, CELLS, split_axis=2, concat_axis=1, tiled=True)


def _with_split_axis(array, q):
    """Exchange parts back, ``(1,n,q/k)->(1,n/k,q)``."""
    if array.ndim != 3:
        return array
    return lax.all_to_all(array, CELLS, split_axis=1, concat_axis=2, tiled=True)[:, :, :q]
