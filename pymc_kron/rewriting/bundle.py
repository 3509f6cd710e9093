"""Where the rewrites are collected and how they are registered.

PyTensor tries the rewrites of a phase in the order of their registration, so that its own
``det_of_kronecker`` would reach a determinant before any node rewrite of ours. A rewrite that
walks the whole graph runs before all of them, in every iteration of a phase. The bundle is one
such walk: outputs first, so that a whole expression is seen before its parts, and in the order
in which the rewrites were added, so that a quadratic form is seen before the solve in it.
"""

from pytensor.compile.mode import optdb
from pytensor.graph.rewriting.basic import (
    GraphRewriter,
    NodeProcessingGraphRewriter,
    NodeRewriter,
)
from pytensor.graph.rewriting.db import LocalGroupDB, TopoDB

PHASES = ("canonicalize", "stabilize")

kron_rewrites_db = LocalGroupDB()


def register_kron(rewriter: NodeRewriter) -> NodeRewriter:
    """Add a rewrite to the bundle, under its own name and the tag ``kron``."""
    kron_rewrites_db.register(
        rewriter.__name__, rewriter, "kron", "fast_run", "fast_compile", *PHASES
    )
    return rewriter


def register_bundle() -> None:
    """Register the bundle in PyTensor's database of rewrites, in each of its phases."""
    for phase in PHASES:
        optdb[phase].register(
            f"kron_{phase}", _walk(kron_rewrites_db), "kron", "fast_run", "fast_compile"
        )


def bundle_rewriter() -> GraphRewriter:
    """Return a rewriter that applies the bundle alone."""
    return _walk(kron_rewrites_db).query("+kron")


def _walk(db: LocalGroupDB) -> TopoDB:
    return TopoDB(db, order="out_to_in", failure_callback=NodeProcessingGraphRewriter.warn_inplace)
