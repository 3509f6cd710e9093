"""Where the rewrites are collected and how they are registered.

PyTensor tries the rewrites of a phase in the order of their registration, so that its own
``det_of_kronecker`` would reach a determinant before any node rewrite of ours. A rewrite that
walks the whole graph runs before all of them, in every iteration of a phase. The bundle is one
such walk: outputs first, so that a whole expression is seen before its parts, and in the order
in which the rewrites were added, so that a quadratic form is seen before the solve in it. It is
repeated until nothing changes, so that an expression whose parts had to be rewritten first is
seen again before PyTensor's own rewrites give it another form.

A rewrite that compares a graph with what PyTensor would write itself comes before all phases, in a
walk of its own. So does, right after it, one of a gradient that a Kronecker product is only behind:
PyTensor's first rewrites may leave nothing that shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import wraps
from math import inf

from pytensor.compile.mode import Mode, optdb
from pytensor.configdefaults import config
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.basic import (
    GraphRewriter,
    MergeOptimizer,
    NodeProcessingGraphRewriter,
    NodeRewriter,
    SequentialNodeRewriter,
    WalkingGraphRewriter,
    copy_stack_trace,
    node_rewriter,
)
from pytensor.graph.rewriting.db import LocalGroupDB, RewriteDatabase, RewriteDatabaseQuery
from pytensor.tensor.basic import atleast_Nd
from pytensor.tensor.variable import TensorVariable

from pymc_kron.rewriting.journal import Refusal, record
from pymc_kron.rewriting.sources import has_source

type Replacement = Sequence[Variable] | dict[Variable, Variable] | None
type Transform = Callable[[FunctionGraph, Apply], Replacement]

PHASES = ("canonicalize", "stabilize")

# Before PyTensor replaces operations by what they are made of
POSITION_AS_WRITTEN = -0.02
POSITION_WHILE_BEHIND = -0.015


class Bundle(SequentialNodeRewriter):
    """The first rewrite that does something with a node.

    PyTensor asks for the name with each node that it adds to a graph. Made of the names of all
    rewrites, it took 6% of the time that a gradient takes to rewrite.
    """

    def __str__(self):
        return type(self).__name__


kron_rewrites_db = LocalGroupDB(node_rewriter=Bundle)
as_written_rewrites_db = LocalGroupDB(node_rewriter=Bundle)
while_behind_rewrites_db = LocalGroupDB(node_rewriter=Bundle)


def tags_of(name: str, *tags: str) -> tuple[str, ...]:
    """Return the tags to register a rewrite with: the given ones, and ``kron``.

    A rewrite that ``pytensor.config.optimizer_excluding`` names, itself or by that tag, gets no
    other tag. PyMC's own databases and the rewrites that it applies before it takes a gradient
    don't ask the configuration.
    """
    excluded = set(config.optimizer_excluding.split(":"))
    return ("kron",) if excluded & {name, "kron"} else ("kron", *tags)


def recorded(tracks: Sequence) -> Callable[[Transform], NodeRewriter]:
    """Make a rewrite of a function that may raise `Refusal`, and keep the journal.

    Parameters
    ----------
    tracks
        The operations whose nodes the function is called with.
    """

    def decorate(transform: Transform) -> NodeRewriter:
        @wraps(transform)
        def transform_and_record(fgraph, node):
            try:
                replacement = transform(fgraph, node)
            except Refusal as refusal:
                record(fgraph, transform.__name__, node, refusal)
                return None
            if replacement:
                record(fgraph, transform.__name__, node)
            return replacement

        return node_rewriter(tracks)(transform_and_record)

    return decorate


def register_kron(
    *tracks, dbs: Sequence[LocalGroupDB] = (kron_rewrites_db,), needs: Sequence[str] = ()
) -> Callable[[Transform], NodeRewriter]:
    """Add a rewrite of the given operations to the bundle, under its own name and ``kron``.

    Parameters
    ----------
    *tracks
        The operations.
    dbs
        `kron_rewrites_db`, with `while_behind_rewrites_db` for a rewrite of what a product is only
        behind, or `as_written_rewrites_db` for one of what is still as PyTensor's gradients wrote
        it.
    needs
        The names of rewrites without which this one would be wrong. It is turned off with them.
    """

    def decorate(transform: Transform) -> NodeRewriter:
        name = transform.__name__
        rewriter = recorded(tracks)(transform)
        for db in dbs:
            db.register(name, rewriter, *tags_of(name, "fast_run", "fast_compile", *PHASES), *needs)
        return rewriter

    return decorate


def selected_by(mode: Mode) -> frozenset[str]:
    """Return the names of the rewrites of the bundle that a mode selects."""
    query = mode.provided_optimizer
    if not isinstance(query, RewriteDatabaseQuery):
        return frozenset()
    bundle = BundleDB(kron_rewrites_db).query(query).walk.node_rewriter
    return frozenset(rewriter.fn.__name__ for rewriter in bundle.rewrites)


def outcomes(fgraph: FunctionGraph, node: Apply) -> Iterator[tuple[str, Refusal | None]]:
    """Ask each rewrite of the bundle about a node, and change nothing.

    Yields
    ------
    tuple[str, Refusal or None]
        The name of each rewrite that refuses the node, and why, or that would replace it, and
        None. Those that have nothing to do with the node are left out.
    """
    bundle = kron_rewrites_db.query("+kron")
    for rewriter in bundle.tracker.get_trackers(node.op):
        transform = rewriter.fn.__wrapped__
        try:
            replacement = transform(fgraph, node)
        except Refusal as refusal:
            yield transform.__name__, refusal
        except Exception as error:
            # PyTensor goes on without a rewrite that fails
            if config.on_opt_error == "raise":
                raise
            reason = f"`{transform.__name__}` failed, {error!r}"
            yield transform.__name__, Refusal(reason, "report it as a bug")
        else:
            if replacement:
                yield transform.__name__, None


def as_replacement(old_out: TensorVariable, new_out: TensorVariable) -> TensorVariable:
    """Give a new output the rank, the dtype and the stack trace of the one it replaces."""
    new_out = atleast_Nd(new_out, n=old_out.type.ndim).astype(old_out.type.dtype)
    copy_stack_trace(old_out, new_out)
    return new_out


class BundleWalk(GraphRewriter):
    """Walk over a graph, outputs first, until the rewrites find nothing more to do."""

    max_walks = 20

    def __init__(self, rewriter: NodeRewriter):
        self.walk = WalkingGraphRewriter(
            rewriter, "out_to_in", failure_callback=NodeProcessingGraphRewriter.warn_inplace
        )

    def add_requirements(self, fgraph):
        """Attach what the walk needs."""
        MergeOptimizer().add_requirements(fgraph)
        self.walk.add_requirements(fgraph)

    def apply(self, fgraph):
        """Walk until nothing changes, over a graph with a Kronecker product in it.

        PyMC rewrites log-densities without merging equal variables first. What one call promises
        of a matrix holds for an equal one.
        """
        if not has_source(fgraph.apply_nodes):
            return
        MergeOptimizer().apply(fgraph)
        for _ in range(self.max_walks):
            [_, replaced, *_] = self.walk.apply(fgraph)
            if not replaced:
                break


class BundleDB(RewriteDatabase):
    """Make a `BundleWalk` of the rewrites of a database that a query selects."""

    def __init__(self, db: LocalGroupDB):
        super().__init__()
        self.db = db

    def query(self, *tags, **kwtags):
        """Return the walk with the selected rewrites.

        Up to which position a sequence of phases is wanted says nothing about the places of the
        rewrites in the bundle.
        """
        match tags:
            case (RewriteDatabaseQuery() as query,):
                query = copy(query)
                query.position_cutoff = inf
                tags = (query,)
        return BundleWalk(self.db.query(*tags, **kwtags))


def register_bundle() -> None:
    """Register the bundle in PyTensor's database of rewrites, in each of its phases."""
    for phase in PHASES:
        name = f"kron_{phase}"
        tags = tags_of(name, "fast_run", "fast_compile")
        optdb[phase].register(name, BundleDB(kron_rewrites_db), *tags)
    for name, db, position in (
        ("kron_as_written", as_written_rewrites_db, POSITION_AS_WRITTEN),
        ("kron_while_behind", while_behind_rewrites_db, POSITION_WHILE_BEHIND),
    ):
        tags = tags_of(name, "fast_run", "fast_compile")
        optdb.register(name, BundleDB(db), *tags, position=position)


def bundle_rewriter() -> GraphRewriter:
    """Return a rewriter that applies the bundle alone."""
    return BundleDB(kron_rewrites_db).query("+kron")
