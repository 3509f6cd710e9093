"""Recognising what PyTensor's gradients wrote, by asking PyTensor for the same gradient again.

At a variable that stands for the gradient in an output, and before PyTensor's first rewrites.
"""

from collections.abc import Iterator, Sequence

from pytensor.graph.basic import Constant, Variable
from pytensor.scalar.basic import Add
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.variable import TensorVariable

from pymc_kron.structure import Matrices


def summands(
    var: TensorVariable, others: Matrices = ()
) -> Iterator[tuple[TensorVariable, Matrices]]:
    """Yield a sum and each of its summands, with all others of them."""
    yield var, others
    match var.owner_op_and_inputs:
        case (Elemwise(scalar_op=Add()), *parts):
            for i, part in enumerate(parts):
                yield from summands(part, (*others, *parts[:i], *parts[i + 1 :]))


def matched(
    pattern: Variable, var: Variable, stand_ins: Sequence[Variable]
) -> list[Variable] | None:
    """Return what has to be put in for some variables to turn a graph into another one."""
    found: dict[Variable, Variable] = {}

    def matches(pattern: Variable, var: Variable) -> bool:
        if pattern is var:
            return True
        if pattern in found:
            return found[pattern] is var
        if pattern in stand_ins:
            is_match = pattern.type.ndim == var.type.ndim
        elif isinstance(pattern, Constant):
            is_match = pattern.equals(var)
        else:
            is_match = (
                pattern.owner_op is not None
                and pattern.owner_op == var.owner_op
                and pattern.index == var.index
                and len(pattern.owner.inputs) == len(var.owner.inputs)
                and all(map(matches, pattern.owner.inputs, var.owner.inputs))
            )
        if is_match:
            found[pattern] = var
        return is_match

    if not matches(pattern, var) or any(stand_in not in found for stand_in in stand_ins):
        return None
    return [found[stand_in] for stand_in in stand_ins]
