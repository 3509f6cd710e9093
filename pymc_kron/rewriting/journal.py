"""What the bundle did to a graph: which rewrite fired where, and which one refused, and why.

Every graph that the bundle rewrites carries a `Journal`, so that a compiled function can still
be asked; `listening` collects the entries of all graphs that are rewritten in its context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from pytensor.graph.basic import Apply
from pytensor.graph.features import AlreadyThere, Feature
from pytensor.graph.fg import FunctionGraph

from pymc_kron.structure import Refusal, kron_factors

type StaticShape = tuple[int | None, ...]


@dataclass(frozen=True)
class Entry:
    """One rewrite tried on one node that has a Kronecker product among its inputs.

    Attributes
    ----------
    rewrite
        The name of the rewrite.
    op
        The name of the operation that the product went into.
    factors
        The static shapes of the factors, for each of the products.
    inputs
        The static shapes of all inputs of the operation.
    dtype
        The dtype of the result.
    refusal
        Why the rewrite did nothing, or None if it fired.
    """

    rewrite: str
    op: str
    factors: tuple[tuple[StaticShape, ...], ...]
    inputs: tuple[StaticShape, ...]
    dtype: str
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
    products = [kron_factors(inp) for inp in node.inputs if hasattr(inp.type, "shape")]
    entry = Entry(
        rewrite,
        type(getattr(core_op, "scalar_op", core_op)).__name__,
        tuple(
            tuple(factor.type.shape for factor in factors)
            for factors in products
            if factors is not None
        ),
        tuple(inp.type.shape for inp in node.inputs if hasattr(inp.type, "shape")),
        node.outputs[0].type.dtype,
        refusal,
    )
    for entries in _listeners.get():
        entries.append(entry)
    journal = journal_of(fgraph)
    if journal is None:
        journal = Journal()
        fgraph.attach_feature(journal)
    journal.entries.append(entry)
