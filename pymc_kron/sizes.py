"""Proving that two axes have the same size, also where no static shape says so.

An axis is followed back through the operations that keep it, to numbers and to axes of variables
that nothing is known about. Two axes whose sizes come out equal have the same size; of two that
don't, nothing is known.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from pytensor.assumptions.specify import SpecifyAssumptions
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.op import Op
from pytensor.scalar.basic import EQ, Cast, Mul, Switch
from pytensor.tensor.basic import (
    Alloc,
    AllocDiag,
    ARange,
    ExtractDiag,
    Eye,
    MakeVector,
    ScalarFromTensor,
    TensorFromScalar,
)
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.exceptions import NotScalarConstantError
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.math import Dot
from pytensor.tensor.shape import Reshape, Shape, Shape_i, SpecifyShape
from pytensor.tensor.subtensor import Subtensor, as_index_literal
from pytensor.tensor.type import integer_dtypes
from pytensor.tensor.utils import _parse_gufunc_signature
from pytensor.tensor.variable import TensorVariable

from pymc_kron.unfolded import without_unfolded

type Token = tuple[Variable, int | None]


@dataclass(frozen=True)
class SizeProduct:
    """A size, as a number times sizes that are only known by where they come from.

    Attributes
    ----------
    number
        The known part.
    unknowns
        The unknown parts, each with its exponent: an axis of a variable, or a scalar.
    """

    number: int
    unknowns: frozenset[tuple[Token, int]] = frozenset()

    def __mul__(self, other: "SizeProduct") -> "SizeProduct":
        unknowns = Counter(dict(self.unknowns)) + Counter(dict(other.unknowns))
        return SizeProduct(self.number * other.number, frozenset(unknowns.items()))

    @property
    def is_known(self) -> bool:
        """Whether the size is a number."""
        return not self.unknowns


class Sizes:
    """What is known about the sizes of the last two axes of some matrices.

    Two sizes that `of` returns as equal are equal wherever the matrices can be computed: an
    operation that takes square matrices, like an inverse, shows that its input is square.

    Parameters
    ----------
    matrices
        All matrices whose sizes are to be compared.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_kron.sizes import Sizes
    >>> A, X = pt.matrix("A"), pt.matrix("X")
    >>> sizes = Sizes(A @ X, pt.linalg.inv(A).T)
    >>> sizes.of(A @ X, -2) == sizes.of(pt.linalg.inv(A).T, -2)
    True
    """

    def __init__(self, *matrices: TensorVariable):
        self._equal: dict[Token, Token] = {}
        self._equal_products: dict[SizeProduct, SizeProduct] = {}
        self._known: dict[Token, SizeProduct] = {}
        self._answers: dict[tuple[Callable, *tuple[Variable, ...]], Any] = {}
        for matrix in matrices:
            for axis in (-2, -1):
                self._of(matrix, axis)

    def of(self, var: TensorVariable, axis: int) -> SizeProduct:
        """Return what is known about the size of an axis."""
        return self._canonical(self._of(var, axis))

    def is_square(self, var: TensorVariable) -> bool:
        """Whether the last two axes of an array are known to have the same size."""
        return self.of(var, -2) == self.of(var, -1)

    def note_square(self, matrix: TensorVariable) -> None:
        """Take for granted that a matrix is square, since an operation requires it."""
        rows, columns = self.of(matrix, -2), self.of(matrix, -1)
        if rows == columns:
            return
        if all(side.number == 1 and len(side.unknowns) == 1 for side in (rows, columns)):
            [(row, row_power)], [(column, column_power)] = rows.unknowns, columns.unknowns
            if row_power == column_power:
                self._equal[column] = row
                return
        self._equal_products[columns] = rows

    def once[T](self, read: Callable[..., T], *variables: Variable) -> T:
        """Return ``read(*variables, self)``, which is called once for the same variables.

        There are exponentially many ways through a graph in which variables are used twice.
        """
        key = (read, *variables)
        if key not in self._answers:
            self._answers[key] = read(*variables, self)
        return self._answers[key]

    def _canonical(self, size: SizeProduct) -> SizeProduct:
        unknowns = Counter[Token]()
        for token, exponent in size.unknowns:
            unknowns[self._representative(token)] += exponent
        size = SizeProduct(size.number, frozenset(unknowns.items()))
        return self._equal_products.get(size, size)

    def _representative(self, token: Token) -> Token:
        while token in self._equal:
            token = self._equal[token]
        return token

    def _of(self, var: TensorVariable, axis: int) -> SizeProduct:
        token = (var, axis % var.type.ndim)
        if token not in self._known:
            self._known[token] = self._follow(*token)
        return self._known[token]

    def _follow(self, var: TensorVariable, axis: int) -> SizeProduct:
        known = var.type.shape[axis]
        if known is not None:
            return SizeProduct(int(known))

        from_end = axis - var.type.ndim
        match var.owner_op_and_inputs:
            case (DimShuffle(new_order=new_order), inp):
                return self._of(inp, new_order[axis])
            case (Elemwise(), *inputs):
                # All inputs that aren't broadcast along the axis agree
                others = (inp for inp in inputs if inp.type.shape[axis] != 1)
                like = next(others, None)
                return SizeProduct(1) if like is None else self._of(like, axis)
            case (SpecifyAssumptions() | SpecifyShape(), inp, *_):
                return self._of(inp, axis)
            case (Alloc(), _, *shape):
                return self._scalar(shape[axis])
            case (ARange(), Constant(data=start), stop, Constant(data=step)) if (
                start == 0 and step == 1 and stop.type.dtype in integer_dtypes
            ):
                return self._scalar(stop)
            case (Eye() | Blockwise(core_op=Eye()), rows, columns, _) if var.type.ndim == 2:
                return self._scalar((rows, columns)[axis])
            case (AllocDiag(offset=0, axis1=first, axis2=second), diagonal) if axis in (
                first,
                second,
            ):
                return self._of(diagonal, -1)
            case (Blockwise(core_op=AllocDiag(offset=0)), diagonal) if from_end >= -2:
                return self._of(diagonal, -1)
            case (ExtractDiag(offset=0, axis1=first, axis2=second), inp) if from_end == -1:
                # The diagonal of a square matrix is as long as its rows
                rows, columns = self._of(inp, first), self._of(inp, second)
                if self._canonical(rows) == self._canonical(columns):
                    return rows
            case (KroneckerProduct() | Blockwise(core_op=KroneckerProduct()), left, right):
                if left.type.ndim == right.type.ndim and from_end >= -2:
                    return self._of(left, from_end) * self._of(right, from_end)
            case (Dot(), left, right):
                return self._of((left, right)[axis], axis)
            case (Reshape(), _, shape):
                size = self._entry(shape, axis)
                if size is not None and self._is_of_axes(size):
                    return size
            case (op, *inputs):
                return self._of_core_axis(op, inputs, var, from_end)
        return _unknown(var, axis)

    def _of_core_axis(
        self, op: Op, inputs: Sequence[TensorVariable], var: TensorVariable, from_end: int
    ) -> SizeProduct:
        """Return the size of a core dimension, which the signature of an operation names."""
        signature = getattr(op, "signature", None) or getattr(op, "gufunc_signature", None)
        if signature is not None:
            input_cores, output_cores = _parse_gufunc_signature(signature)
            if len(output_cores) != len(var.owner.outputs):
                # A random variable has the state of its generator besides
                return _unknown(var, from_end + var.type.ndim)
            core = output_cores[var.owner.outputs.index(var)]
            for inp, input_core in zip(inputs, input_cores, strict=False):
                if len(input_core) == 2 and len(set(input_core)) == 1:
                    self.note_square(inp)
            if -from_end <= len(core):
                for inp, input_core in zip(inputs, input_cores, strict=False):
                    if core[from_end] in input_core:
                        position = input_core.index(core[from_end])
                        return self._of(inp, position - len(input_core))
        return _unknown(var, from_end + var.type.ndim)

    def _scalar(self, size: Variable) -> SizeProduct:
        """Return what is known about a size that the graph computes."""
        size = without_unfolded(size)
        match size:
            case Constant(data=data):
                return SizeProduct(int(data))
        match size.owner_op_and_inputs:
            case (TensorFromScalar() | ScalarFromTensor(), inp):
                return self._scalar(inp)
            case (Elemwise(scalar_op=Cast()), inp):
                return self._scalar(inp)
            case (Elemwise(scalar_op=Mul()), *inputs):
                return prod(map(self._scalar, inputs), start=SizeProduct(1))
            case (Shape_i(i=axis), inp):
                return self._of(inp, axis)
            case (Subtensor(idx_list=(int(),)), shape, Constant(data=axis)):
                return self._entry(shape, int(axis)) or _unknown(size, None)
            case (
                Elemwise(scalar_op=Switch()),
                TensorVariable(
                    owner_op_and_inputs=(Elemwise(scalar_op=EQ()), compared, Constant(data=-1))
                ),
                _,
                requested,
            ) if compared is requested:
                # What PyTensor infers for a Reshape, and for a Kronecker product, which ends in one
                inferred = self._scalar(requested)
                if self._is_of_axes(inferred):
                    return inferred
        return _unknown(size, None)

    @staticmethod
    def _is_of_axes(size: SizeProduct) -> bool:
        # A number that the graph is given may be -1, which stands for what is left over
        return size.number >= 0 and all(axis is not None for (_, axis), _ in size.unknowns)

    def _entry(self, shape: Variable, axis: int) -> SizeProduct | None:
        """Return what is known about an entry of a vector of sizes."""
        match shape.owner_op_and_inputs:
            case (Shape(), inp):
                return self._of(inp, axis)
            case (MakeVector(), *sizes):
                return self._scalar(sizes[axis])
        return None


def _unknown(var: Variable, axis: int | None) -> SizeProduct:
    return SizeProduct(1, frozenset({((var, axis), 1)}))


def axis_size(var: TensorVariable, axis: int) -> SizeProduct:
    """Return what is known about the size of an axis, from the variable alone.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_kron.sizes import axis_size
    >>> A = pt.matrix("A")
    >>> axis_size(pt.linalg.inv(A), 0) == axis_size(pt.exp(-A), 0)
    True
    """
    return Sizes().of(var, axis)


def is_provably_square(var: TensorVariable) -> bool:
    """Whether the last two axes of an array are known to have the same size."""
    return Sizes(var).is_square(var)


def few_indices(taken: slice, size: int | None) -> np.ndarray | None:
    """Return the indices that a slice takes, if these are known to be at most half of all."""
    try:
        literal = as_index_literal(taken)
    except NotScalarConstantError:
        return None
    if not isinstance(size, int):
        return None
    indices = np.arange(size)[literal]
    return indices if 2 * len(indices) <= size else None
