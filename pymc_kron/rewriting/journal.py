"""What the bundle did to a graph: which rewrite fired where, and which one refused, and why.

Every graph that the bundle rewrites carries a `Journal`, so that a compiled function can still
be asked; `listening` collects the entries of all graphs that are rewritten in its context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from weakref import WeakKeyDictionary

from pytensor.graph.basic import Apply, Variable
from pytensor.graph.features import AlreadyThere, Feature
from pytensor.graph.fg import FunctionGraph
from pytensor.scalar.basic import Add
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky

from pymc_kron.structure import (
    Refusal,
    gram_root,
    inverted_matrix,
    kron_factors,
    strip_transposes,
    without_assumptions,
)

type StaticShape = tuple[int | None, ...]


@dataclass(frozen=True)
class Product:
    """What an entry keeps of a Kronecker product, so that it keeps no graph alive.

    Attributes
    ----------
    number
        The same for entries that are about the very same variable.
    shapes
        The static shapes of the factors.
    names
        The names of the factors, "?" for those without one.
    dtype
        The dtype of the product.
    """

    number: int
    shapes: tuple[StaticShape, ...]
    names: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Entry:
    """One rewrite tried on one node that has a Kronecker product among its inputs.

    Attributes
    ----------
    rewrite
        The name of the rewrite.
    op
        The name of the operation that the product went into.
    props
        The properties of the operation that are numbers or words: ``assume_a``, ``b_ndim``.
    products
        The products that its inputs are, or are made of as `product_in` says, each where it
        stands, None for any other input.
    inputs
        The static shapes of its inputs, None for an input that isn't an array.
    output
        The static shape of its first result that is an array, None if there is none.
    refusal
        Why the rewrite did nothing, or None if it fired.
    """

    rewrite: str
    op: str
    props: tuple[tuple[str, str | int | bool | None], ...]
    products: tuple[Product | None, ...]
    inputs: tuple[StaticShape | None, ...]
    output: StaticShape | None
    refusal: Refusal | None = None


class Journal(Feature):
    """The entries of one graph, in the order in which they were made."""

    def __init__(self):
        self.entries: list[Entry] = []

    def on_attach(self, fgraph: FunctionGraph) -> None:
        """Make the journal an attribute of the graph."""
        if journal_of(fgraph) is not None:
            raise AlreadyThere
        fgraph.kron_journal = self  # type: ignore[attr-defined]

    def on_detach(self, fgraph: FunctionGraph) -> None:
        """Take the attribute away."""
        del fgraph.kron_journal  # type: ignore[attr-defined]

    def clone(self) -> "Journal":
        """Return a copy for a copy of the graph."""
        copy = Journal()
        copy.entries = list(self.entries)
        return copy


_listeners: ContextVar[tuple[list[Entry], ...]] = ContextVar("_listeners", default=())


@contextmanager
def listening() -> Iterator[list[Entry]]:
    """Collect the entries of every graph that is rewritten in the context."""
    entries: list[Entry] = []
    token = _listeners.set((*_listeners.get(), entries))
    try:
        yield entries
    finally:
        _listeners.reset(token)


def journal_of(fgraph: FunctionGraph) -> Journal | None:
    """Return the journal that a graph carries, if the bundle found a product in it."""
    return getattr(fgraph, "kron_journal", None)


def record(
    fgraph: FunctionGraph, rewrite: str, node: Apply, refusal: Refusal | None = None
) -> None:
    """Note in the graph's journal, and for all who listen, what a rewrite did to a node."""
    core_op = getattr(node.op, "core_op", node.op)
    entry = Entry(
        rewrite,
        type(getattr(core_op, "scalar_op", core_op)).__name__,
        tuple(
            (prop, value)
            for prop in getattr(core_op, "__props__", ())
            if isinstance(value := getattr(core_op, prop, None), str | int | None)
        ),
        tuple(map(product_in, node.inputs)),
        tuple(getattr(inp.type, "shape", None) for inp in node.inputs),
        next((out.type.shape for out in node.outputs if hasattr(out.type, "shape")), None),
        # Without the traceback, which would keep the graph alive
        None if refusal is None else Refusal(refusal.reason, refusal.advice),
    )
    journal = journal_of(fgraph)
    if journal is None:
        journal = Journal()
        fgraph.attach_feature(journal)
    for entries in (journal.entries, *_listeners.get()):
        # A graph is walked many times, and each time the same rewrites refuse
        if refusal is None or entry not in entries:
            entries.append(entry)


def product_in(var: Variable) -> Product | None:
    """Describe the Kronecker product that a variable is, or that it is made of.

    Its inverse, its Gram matrix, a sum with other terms such as noise, or the Cholesky factor of
    one of these.
    """
    seen: set[Variable] = set()
    to_visit = [var]
    while to_visit:
        part = to_visit.pop()
        if part in seen or getattr(part.type, "ndim", 0) < 2:
            continue
        seen.add(part)
        factors = kron_factors(part)
        if factors is not None:
            return Product(
                number_of(core_product(part)),
                tuple(factor.type.shape for factor in factors),
                tuple(map(name_of, factors)),
                part.type.dtype,
            )
        to_visit += reversed(_parts(part))
    return None


def _parts(var: Variable) -> list[Variable]:
    for matrix in (inverted_matrix(var), gram_root(var)):
        if matrix is not None:
            return [matrix]
    match strip_transposes(without_assumptions(var))[0].owner_op_and_inputs:
        case (Elemwise(scalar_op=Add()), *terms):
            return terms
        case (Blockwise(core_op=Cholesky()), matrix):
            return [matrix]
    return []


def core_product(var: Variable) -> Variable:
    """Peel transposes and scalar multiples off a Kronecker product."""
    core, _ = strip_transposes(var)
    match core.owner_op_and_inputs:
        case (Elemwise(), *inputs):
            return core_product(next(inp for inp in inputs if kron_factors(inp) is not None))
    return core


_numbers: WeakKeyDictionary[Variable, int] = WeakKeyDictionary()
_next_number = count()


def number_of(var: Variable) -> int:
    """Return a number that no other variable has."""
    if var not in _numbers:
        _numbers[var] = next(_next_number)
    return _numbers[var]


def name_of(factor: Variable) -> str:
    """Return the name of a factor, "?" if it has none."""
    matrix, transposed = strip_transposes(without_assumptions(factor))
    if matrix.name is None:
        return "?"
    return f"{matrix.name}.T" if transposed else matrix.name
