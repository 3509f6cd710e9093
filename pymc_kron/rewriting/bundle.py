"""Where the rewrites are collected and how they are registered.

PyTensor tries the rewrites of a phase in the order of their registration, so that its own
``det_of_kronecker`` would reach a determinant before any node rewrite of ours. A rewrite that
walks the whole graph runs before all of them, in every iteration of a phase. The bundle is one
such walk: outputs first, so that a whole expression is seen before its parts, and in the order
in which the rewrites were added, so that a quadratic form is seen before the solve in it.
"""

from pytensor.compile.mode import optdb
from pytensor.configdefaults import config
from pytensor.graph.rewriting.basic import (
    GraphRewriter,
    NodeProcessingGraphRewriter,
    NodeRewriter,
    copy_stack_trace,
)
from pytensor.graph.rewriting.db import LocalGroupDB, TopoDB
from pytensor.tensor.basic import atleast_Nd
from pytensor.tensor.variable import TensorVariable

PHASES = ("canonicalize", "stabilize")

kron_rewrites_db = LocalGroupDB()


def tags_of(name: str, *tags: str) -> tuple[str, ...]:
    """Return the tags to register a rewrite with: the given ones, and ``kron``.

    A rewrite that ``pytensor.config.optimizer_excluding`` names, itself or by that tag, gets no
    other tag. PyMC's own databases and the rewrites that it applies before it takes a gradient
    don't ask the configuration.
    """
    excluded = set(config.optimizer_excluding.split(":"))
    return ("kron",) if excluded & {name, "kron"} else ("kron", *tags)


def register_kron(rewriter: NodeRewriter) -> NodeRewriter:
    """Add a rewrite to the bundle, under its own name and the tag ``kron``."""
    name = rewriter.__name__
    tags = tags_of(name, "fast_run", "fast_compile", *PHASES)
    kron_rewrites_db.register(name, rewriter, *tags)
    return rewriter


def as_replacement(old_out: TensorVariable, new_out: TensorVariable) -> TensorVariable:
    """Give a new output the rank, the dtype and the stack trace of the one it replaces."""
    new_out = atleast_Nd(new_out, n=old_out.type.ndim).astype(old_out.type.dtype)
    copy_stack_trace(old_out, new_out)
    return new_out


def register_bundle() -> None:
    """Register the bundle in PyTensor's database of rewrites, in each of its phases."""
    for phase in PHASES:
        name = f"kron_{phase}"
        optdb[phase].register(
            name, _walk(kron_rewrites_db), *tags_of(name, "fast_run", "fast_compile")
        )


def bundle_rewriter() -> GraphRewriter:
    """Return a rewriter that applies the bundle alone."""
    return _walk(kron_rewrites_db).query("+kron")


def _walk(db: LocalGroupDB) -> TopoDB:
    return TopoDB(db, order="out_to_in", failure_callback=NodeProcessingGraphRewriter.warn_inplace)
