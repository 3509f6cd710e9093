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
from pytensor.graph.basic import Apply, Constant
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import clone_replace
from pytensor.graph.traversal import graph_inputs
from pytensor.link.jax.dispatch import jax_funcify
from pytensor.tensor.type import TensorType
from pytensor.tensor.variable import TensorVariable

from pymc_kron.distributions.grid_rv import GridMvNormalRV
from pymc_kron.jax_closed_form import jax_function
from pymc_kron.kernels import Kernel
from pymc_kron.structure import Size, current_length

type Point = Mapping[str, Any]
type Logp = Callable[[Point, Sequence[jax.Array]], jax.Array]

CELLS = "cells"


def sharded_logp(
    model: Model, devices: Sequence[jax.Device] | None = None
) -> tuple[Logp, list[jax.Array]]:
    r"""
    Log-density of a model for JAX, with the largest grid split over several devices.

    A device holds a part of each array that has a value for each cell of the grid, the data, a
    latent field, the mean or what is computed from them, and the factors as a whole. With k
    devices that is ``N / k`` cells of each array in place of ``N``. Any other parameter, and any
    smaller grid of the model, is on every device.

    The gradient that JAX gets is the closed form that PyTensor takes, together with the value.

    Parameters
    ----------
    model
        A model with at least one grid: a variable with a Kronecker-structured covariance, observed
        or latent, also as `pymc.MvNormal` in plain code.
    devices
        The devices, by default all that JAX has. Their number divides the first dimension of
        the grid: that of its first axis, ``n_1``, or of its batch, ``(..., n_1, ..., n_d)``.

    Returns
    -------
    logp
        A function ``logp(point, data)`` of the unobserved variables, by the names that
        `pymc.Model.initial_point` has for them, and of the data below. It has a first derivative in
        the variables and none in the data.
    data
        The arrays of the model with a value for each cell, split over the devices. They are
        an argument since JAX copies whatever else a function uses to every device. They, and all
        other data, are those that the model has now.

    Raises
    ------
    ValueError
        If the model has no grid, if the size of one isn't known, or if the number of devices
        doesn't divide the first dimension of the largest.
    NotImplementedError
        If the model has missing cells, or a batch of factors.

    References
    ----------
    .. [1] Xu, Y., Lee, H., Chen, D., et al. (2021). "GSPMD: general and scalable parallelization
       for ML computation graphs". arXiv:2105.04663.

    Examples
    --------
    Two devices, if there are as many. On a CPU, ``XLA_FLAGS`` says before Python starts how many
    devices it is, ``--xla_force_host_platform_device_count=2``.

    .. code-block:: python

        import jax
        import numpy as np
        import pymc as pm
        import pymc_kron as pk
        from pymc_kron.sharding import sharded_logp

        lags = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in (4, 3, 5)]
        y = np.random.default_rng(1).normal(size=(4, 3, 5))

        with pm.Model() as model:
            length_scale = pm.LogNormal("length_scale", shape=3)
            covs = [pm.math.exp(-lag / length_scale[i]) for i, lag in enumerate(lags)]
            pk.TensorNormal("y", 0, covs, sigma=0.5, observed=y)

        logp, data = sharded_logp(model, jax.devices()[:2])
        value, gradient = jax.value_and_grad(logp)(model.initial_point(), data)
        gradient["length_scale_log__"]
    """
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), (CELLS,))
    shape = _shape_of_largest_grid(model)
    if shape[0] % mesh.size:
        raise ValueError(
            f"A grid is split along its first dimension, which must be a multiple of the number of "
            f"devices, got a grid of {' x '.join(map(str, shape))} cells and {mesh.size} devices. "
            "Pass fewer devices, or put another axis first."
        )
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(CELLS)))

    def has_cells(array: np.ndarray) -> bool:
        """Whether there is a value for each cell, or several of them."""
        dims = np.shape(array)
        return math.prod(shape) in np.cumprod(dims, dtype=int) and dims[0] % mesh.size == 0

    logp, data = _with_data_as_inputs(model.logp(), has_cells)
    [logp] = rewrite_pregrad([logp])
    outputs = [logp, *grad(logp, model.value_vars)]
    fgraph = FunctionGraph([*model.value_vars, *data], outputs, clone=True)
    # JAX gets the kernels as they are, and PyTensor has taken the gradient
    mode = get_mode("JAX").excluding("inline_kernel", "keep_for_jax")
    mode.including("local_check_parameter_to_ninf_switch").optimizer.rewrite(fgraph)
    function = jax_funcify(fgraph, mesh=mesh)
    names = [value.name for value in model.value_vars]

    def logp_and_gradient(
        point: Point, data: Sequence[jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, *gradient = function(*(point[name] for name in names), *data)
        return value, dict(zip(names, gradient, strict=True))

    def logp_alone(point: Point, data: Sequence[jax.Array]) -> jax.Array:
        return logp_and_gradient(point, data)[0]

    def pull_back(gradient: dict, logp_bar: jax.Array) -> tuple[dict, None]:
        return jax.tree.map(lambda partial_: logp_bar * partial_, gradient), None

    point_shardings = {
        name: split if has_cells(array) else whole for name, array in model.initial_point().items()
    }
    jit = partial(jax.jit, in_shardings=(point_shardings, [split] * len(data)))
    logp = jax.custom_vjp(jit(logp_alone, out_shardings=whole))
    logp.defvjp(jit(logp_and_gradient, out_shardings=(whole, point_shardings)), pull_back)
    return logp, [jax.device_put(array, split) for array in data.values()]


def _shape_of_largest_grid(model: Model) -> tuple[int, ...]:
    shapes: list[list[Size]] = []
    for node in construct_ir_fgraph(model.rvs_to_values).toposort():
        match node.op:
            case PartialObservedRV() | GridMvNormalRV(marginalize_missing=True):
                raise NotImplementedError(
                    "A grid with missing cells can't be split over devices, whose parts must be "
                    "alike. Sample the model on one device."
                )
            case GridMvNormalRV():
                _rng, size, _mu, *parts = node.inputs
                _, *core_ndims = node.op.ndims_params
                if any(part.type.ndim > n for part, n in zip(parts, core_ndims, strict=True)):
                    raise NotImplementedError(
                        "Factors or noise in a batch, one for each of several grids, can't be "
                        "split over devices. Make each grid a variable of its own."
                    )
                batch_ndim = node.outputs[1].type.ndim - node.op.ndim_supp
                sizes = node.op.covariance(*parts).sizes
                shapes.append([*(size[i] for i in range(batch_ndim)), *sizes])
    known = [tuple(filter(None, map(current_length, shape))) for shape in shapes]
    if not known or list(map(len, known)) != list(map(len, shapes)):
        raise ValueError(
            "The model must have a variable with a Kronecker-structured covariance, whose factors "
            f"have sizes that data or coords tell, got {shapes or 'none'}. "
            "pymc_kron.explain(model) says which products it sees."
        )
    return max(known, key=math.prod)


def _with_data_as_inputs(
    logp: TensorVariable, has_cells: Callable[[np.ndarray], bool]
) -> tuple[TensorVariable, dict[TensorVariable, np.ndarray]]:
    """Return a graph with inputs for the data that are split, and the arrays that these are.

    All other data become constants.
    """
    arrays = {
        inp: inp.get_value(borrow=True) if isinstance(inp, SharedVariable) else inp.data
        for inp in graph_inputs([logp])
        if isinstance(inp, SharedVariable | Constant) and isinstance(inp.type, TensorType)
    }
    inputs = {
        inp: pt.tensor(inp.name, dtype=array.dtype, shape=array.shape)
        if has_cells(array)
        else pt.constant(array)
        for inp, array in arrays.items()
    }
    data = {inputs[inp]: array for inp, array in arrays.items() if has_cells(array)}
    return clone_replace(logp, inputs), data


@jax_funcify.register(Kernel)
def jax_funcify_kernel(op: Kernel, node: Apply, *, mesh: Mesh, **kwargs: Any) -> Callable[..., Any]:
    """Return a function that works on the part of the grid that each device holds."""

    def on_a_part(*arrays: jax.Array) -> Any:
        inputs = [pt.tensor(dtype=str(array.dtype), shape=array.shape) for array in arrays]
        results = jax_function(inputs, op(*inputs, return_list=True))(*arrays)
        return results if len(results) > 1 else results[0]

    def along_other_axis(*arrays: jax.Array) -> jax.Array:
        return _summed(on_a_part(*arrays))

    def along_split_axis(*arrays: jax.Array) -> jax.Array:
        whole = [_with_whole_axis(array, mesh.size) for array in arrays]
        return _with_split_axis(_summed(on_a_part(*whole)), q=arrays[-1].shape[2])

    def on_all_parts(*arrays: jax.Array) -> Any:
        p, n, _ = arrays[-1].shape
        if (n if p == 1 else p) % mesh.size:
            # Another grid, which isn't split
            return on_a_part(*arrays)
        split = PartitionSpec(None, CELLS) if p == 1 else PartitionSpec(CELLS)
        *in_specs, out_specs = [
            split if var.type.ndim == 3 else PartitionSpec()
            for var in (*node.inputs, *node.outputs)
        ]
        function = along_split_axis if p == 1 else along_other_axis
        return jax.shard_map(function, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs)(
            *arrays
        )

    has_grid = "(p,n,q)" in op.gufunc_signature and node.inputs[-1].type.ndim == 3
    return on_all_parts if has_grid else on_a_part


def _summed(result: jax.Array) -> jax.Array:
    """Sum over the devices what is a sum over the cells."""
    return lax.psum(result, CELLS) if result.ndim == 2 else result


def _with_whole_axis(array: jax.Array, n_devices: int) -> jax.Array:
    """Exchange parts, so that q is split in place of n: ``(1,n/k,q)->(1,n,q/k)``."""
    if array.ndim != 3:
        return array
    # Kernels are linear in the cells: zeros don't count
    array = jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % n_devices)))
    return lax.all_to_all(array, CELLS, split_axis=2, concat_axis=1, tiled=True)


def _with_split_axis(array: jax.Array, q: int) -> jax.Array:
    """Exchange parts back, ``(1,n,q/k)->(1,n/k,q)``."""
    if array.ndim != 3:
        return array
    return lax.all_to_all(array, CELLS, split_axis=1, concat_axis=2, tiled=True)[:, :, :q]
