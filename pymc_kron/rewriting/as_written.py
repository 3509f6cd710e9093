"""Recognising what PyTensor's gradients wrote, by asking PyTensor for the same gradient again.

At a variable that stands for the gradient in an output, and before PyTensor's first rewrites.
"""

from collections.abc import Iterator, Sequence
from itertools import count

from pytensor.graph.basic import Constant, Variable
from pytensor.scalar.basic import Add, Mul, Neg, TrueDiv
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.shape import SpecifyShape
from pytensor.tensor.variable import TensorVariable

from pymc_kron.structure import Matrices, Refusal

# Multiplied out, sums of sums grow exponentially
MAX_PARTS = 200


def summands(var: TensorVariable) -> Iterator[tuple[TensorVariable, Matrices]]:
    """Yield a sum and each of its summands, with all others of them.

    A sum may be negated, multiplied or divided by the same for all summands, and have axes added or
    dropped.

    Raises
    ------
    Refusal
        If it has too many of them, once the first ones have been yielded.
    """
    yield from _summands(var, (), count(1))


def _summands(
    var: TensorVariable, others: Matrices, numbers: Iterator[int]
) -> Iterator[tuple[TensorVariable, Matrices]]:
    if next(numbers) > MAX_PARTS:
        raise Refusal(
            f"the gradient is a sum of more than {MAX_PARTS} parts",
            "take it after the rewrites: pt.grad(pymc.pytensorf.rewrite_pregrad(loss), ...)",
        )
    yield var, others
    match var.owner_op_and_inputs:
        case (Elemwise(scalar_op=Add()), *parts):
            for i, part in enumerate(parts):
                yield from _summands(part, (*others, *parts[:i], *parts[i + 1 :]), numbers)
        case (
            Elemwise(scalar_op=Mul() | TrueDiv() | Neg()) | DimShuffle() | SpecifyShape() as op,
            *inputs,
        ):
            is_multiple = isinstance(getattr(op, "scalar_op", None), Mul)
            for i, inner in enumerate(inputs if is_multiple else inputs[:1]):

                def linear(part: TensorVariable, i: int = i) -> TensorVariable:
                    return op.make_node(*inputs[:i], part, *inputs[i + 1 :]).out

                for part, rest in _summands(inner, (), numbers):
                    if part is not inner:
                        yield linear(part), (*others, *map(linear, rest))


def matched(
    pattern: Variable, var: Variable, stand_ins: Sequence[Variable]
) -> list[Variable] | None:
    """Return what has to be put in for some variables to turn a graph into another one.

    Where a shape is checked, by the gradient of a variable of known shape, is of no matter.
    """
    found: dict[Variable, Variable] = {}

    def matches(pattern: Variable, var: Variable) -> bool:
        pattern, var = _unchecked(pattern), _unchecked(var)
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


def _unchecked(var: Variable) -> Variable:
    return var.owner.inputs[0] if isinstance(var.owner_op, SpecifyShape) else var
