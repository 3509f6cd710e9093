"""The programs that a model, a graph or a compiled function is, rewritten for `explain` to read."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf

from pymc.model import Model
from pymc.model.core import ValueGradFunction
from pymc.pytensorf import PointFunc, resolve_shapes, rewrite_pregrad
from pytensor.compile.builders import FinalizedOpFromGraph, OpFromGraph
from pytensor.compile.executor import Function
from pytensor.compile.mode import Mode, get_default_mode, optdb
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.gradient import NullTypeGradError, grad
from pytensor.graph.basic import Apply, Constant, Variable
from pytensor.graph.features import Feature
from pytensor.graph.fg import FrozenFunctionGraph, FunctionGraph, Output
from pytensor.graph.op import HasInnerGraph, Op
from pytensor.graph.rewriting.basic import GraphRewriter, SequentialGraphRewriter
from pytensor.graph.rewriting.db import RewriteDatabaseQuery
from pytensor.graph.traversal import ancestors, graph_inputs, toposort
from pytensor.scalar.basic import Composite
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.shape import Shape, Shape_i

from pymc_kron.diagnostics.costs import (
    OF_THE_DENSITY,
    first_product,
    flops_saved,
    nbytes,
    shape_of,
)
from pymc_kron.diagnostics.report import DenseProduct, Distribution, Factor, Fired, Reason, total
from pymc_kron.distributions.grid_rv import GridMvNormalRV
from pymc_kron.rewriting.bundle import outcomes, selected_by
from pymc_kron.rewriting.journal import (
    Entry,
    Product,
    StaticShape,
    journal_of,
    listening,
    name_of,
    product_in,
)
from pymc_kron.structure import Refusal, kron_factors

type Explainable = (
    Model | Variable | Sequence[Variable] | FunctionGraph | Function | PointFunc | ValueGradFunction
)


@dataclass(frozen=True)
class _Use:
    """What a product goes into, by name, and why it isn't rewritten there."""

    client: Apply
    label: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Program:
    """A rewritten graph, and what is known about how it came about.

    Attributes
    ----------
    names
        For each of the outputs, the name of the program that it belongs to.
    entries
        The journal, for each stage by the name of the program.
    uses
        What each product went into when the bundle had its last look, before operations were
        specialized. Empty for a compiled function.
    folded
        The products of constants that became a constant themselves.
    is_compiled
        Whether the graph is the copy of one that was compiled, whose variables aren't those that
        the journal is about.
    inside
        The operation whose inner graph it is.
    selected
        The names of the rewrites that the mode it is rewritten in selects.
    """

    fgraph: FunctionGraph
    names: tuple[str, ...]
    entries: dict[str, list[Entry]]
    uses: dict[Variable, list[_Use]] = field(default_factory=dict)
    folded: dict[Constant, Apply] = field(default_factory=dict)
    is_compiled: bool = False
    inside: str | None = None
    selected: frozenset[str] = frozenset()


def programs_of(x: Explainable) -> Iterator[Program]:
    """Rewrite what a user gave, on a copy."""
    match x:
        case Model():
            yield from _programs_of_model(x)
        case PointFunc(f=function) | ValueGradFunction(_pytensor_function=function):
            yield from programs_of(function)
        case Function():
            journal = journal_of(x.maker.fgraph)
            outputs = x.maker.fgraph.outputs
            yield Program(
                _with_blockwise(FunctionGraph(outputs=outputs, clone=True, copy_inputs=False)),
                ("function",) * len(outputs),
                {"function": [] if journal is None else list(journal.entries)},
                is_compiled=True,
                selected=selected_by(x.maker.mode),
            )
        case FunctionGraph():
            yield _rewritten(x.outputs, ["graph"] * len(x.outputs))
        case Variable():
            yield _rewritten([x], ["graph"])
        case list() | tuple() if x and all(isinstance(output, Variable) for output in x):
            yield _rewritten(x, ["graph"] * len(x))
        case _:
            raise TypeError(
                f"Got {_describe(x)}. Pass a pymc.Model, a TensorVariable or a list or tuple of "
                "them, a FunctionGraph, or a compiled function."
            )


def _describe(x: object) -> str:
    if isinstance(x, list | tuple):
        types = sorted({type(item).__name__ for item in x})
        return f"a {type(x).__name__} of {', '.join(types) if types else 'nothing'}"
    return f"an object of type {type(x).__name__}"


def _programs_of_model(model: Model) -> Iterator[Program]:
    """Follow what PyMC does before it samples and before it draws."""
    if model.basic_RVs or model.potentials:
        with listening() as entries:
            logp = rewrite_pregrad(model.logp())
        outputs, names = [logp], ["logp"]
        # A model without a gradient is sampled without one
        with suppress(NotImplementedError, NullTypeGradError):
            gradients = grad(logp, model.continuous_value_vars, disconnected_inputs="ignore")
            outputs.extend(gradients)
            names.extend("gradient" for _ in gradients)
        program = _rewritten(outputs, names, stage="gradient")
        yield replace(program, entries={"logp": entries, **program.entries})
    draws = [*model.basic_RVs, *model.deterministics]
    if draws:
        yield _rewritten(draws, ["draws"] * len(draws))


def distributions_of(model: Model) -> tuple[Distribution, ...]:
    """Return the distributions of this package in a model."""
    rvs = model.basic_RVs
    found = []
    for rv in rvs:
        for node in toposort([rv], blockers=[other for other in rvs if other is not rv]):
            if isinstance(node.op, GridMvNormalRV):
                _rng, _size, _mu, *parts = node.inputs
                covariance = node.op.covariance(*parts)
                matrices = [factor.parts[-1] for factor in covariance.signal]
                factors = tuple(Factor(name_of(matrix), _shape_of(matrix)) for matrix in matrices)
                name, _ = node.op._print_name
                has_noise = covariance.noise is not None
                found.append(Distribution(rv.name, name, factors, has_noise))
    return tuple(found)


def _rewritten(
    outputs: Sequence[Variable], names: Sequence[str], *, stage: str | None = None
) -> Program:
    fgraph = FunctionGraph(outputs=list(outputs), clone=True, copy_inputs=False)
    program = Program(fgraph, tuple(names), {stage or names[0]: []})
    return _rewrite(program)


def _rewrite(program: Program) -> Program:
    """Rewrite a graph as the default mode does, but keep it readable.

    Without what comes last: inner graphs aren't rewritten, elementwise operations aren't fused
    and nothing is done in place.
    """
    [entries] = program.entries.values()
    feature = _FoldedProducts()
    program.fgraph.attach_feature(feature)
    mode = get_default_mode()
    before, after = _rewriters(mode)
    with listening() as heard:
        before.rewrite(program.fgraph)
        entries.extend(heard)
        program = replace(program, selected=selected_by(mode))
        uses = {
            node.outputs[0]: [
                _use(program, node.outputs[0], *use)
                for use in _uses_of(program.fgraph, node.outputs[0])
            ]
            for node in program.fgraph.apply_nodes
            if isinstance(_core_op(node), KroneckerProduct)
        }
        n_heard = len(heard)
        after.rewrite(program.fgraph)
        entries.extend(heard[n_heard:])
    return replace(program, uses=uses, folded=feature.folded)


STABILIZED, SPECIALIZED = 1.6, 49.4
"""Positions in PyTensor's sequence of rewrites: after the bundle's last phase, and before what
only matters for a backend."""


def _rewriters(mode: Mode) -> tuple[GraphRewriter, GraphRewriter]:
    """Return a mode's rewrites up to the bundle's last phase, and those after it.

    One after the other, they do what the mode does: each phase runs once.
    """
    query = mode.provided_optimizer
    if not isinstance(query, RewriteDatabaseQuery):
        return mode.optimizer, SequentialGraphRewriter()
    mode = Mode(mode.linker, query.excluding("fusion", "inplace"))

    def between(low: float, high: float) -> GraphRewriter:
        # A new list each time, in a rewriter that lets inner graphs know the mode
        rewriter = mode.optimizer
        rewriter.data[:] = [r for r in rewriter.data if low <= optdb.__position__[r.name] < high]
        return rewriter

    return between(-inf, STABILIZED), between(STABILIZED, SPECIALIZED)


def _with_blockwise(fgraph: FunctionGraph) -> FunctionGraph:
    """Write products, and linear algebra of products, in the way that the rewrites know them.

    Compiled graphs have a Blockwise that allocates its result, or none where there is no batch.
    """
    for node in fgraph.toposort():
        op, inputs = node.op, node.inputs
        if isinstance(op, FinalizedOpFromGraph) and len(op.fgraph.apply_nodes) == 1:
            [inner_node] = op.fgraph.apply_nodes
            op, inputs = inner_node.op, inputs[: len(inner_node.inputs)]
        if not isinstance(op, Blockwise) and hasattr(op, "gufunc_signature"):
            op = Blockwise(op, destroy_map=op.destroy_map)
        is_about_product = isinstance(_core_op(node), KroneckerProduct) or any(
            map(product_in, inputs)
        )
        if op is not node.op and is_about_product:
            new_node = op.make_node(*inputs)
            fgraph.replace_all(list(zip(node.outputs, new_node.outputs, strict=True)))
    return fgraph


class _FoldedProducts(Feature):
    """Notes the Kronecker products of constants that PyTensor computes while it rewrites."""

    def __init__(self) -> None:
        self.folded: dict[Constant, Apply] = {}

    def on_change_input(
        self,
        fgraph: FunctionGraph,
        node: Apply,
        i: int,
        var: Variable,
        new_var: Variable,
        reason: str | None = None,
    ) -> None:
        if (
            isinstance(new_var, Constant)
            and var.owner is not None
            and isinstance(_core_op(var.owner), KroneckerProduct)
        ):
            self.folded[new_var] = var.owner


def fired_in(program: Program, dense: Sequence[DenseProduct]) -> tuple[list[Fired], int | None]:
    """Return a row for each rewrite, operation and factors, and the memory saved by all."""
    rows: dict[tuple, list[tuple[Entry, float | None]]] = {}
    entries = [
        (name, entry)
        for name, stage in program.entries.items()
        for entry in stage
        if entry.refusal is None
    ]
    flops = flops_saved([entry for _, entry in entries])
    for (name, entry), saved in zip(entries, flops, strict=True):
        product = first_product(entry)
        key = (name, entry.rewrite, entry.op, None if product is None else _factors_of(product))
        rows.setdefault(key, []).append((entry, saved))
    fired = [
        Fired(
            name,
            rewrite,
            op,
            factors,
            count=len(row),
            flops_saved=total(saved for _, saved in row),
            bytes_saved=_bytes_saved([entry for entry, _ in row], dense),
        )
        for (name, rewrite, op, factors), row in rows.items()
    ]
    return fired, _bytes_saved([entry for _, entry in entries], dense)


def _bytes_saved(entries: Iterable[Entry], dense: Sequence[DenseProduct]) -> int | None:
    """Return the memory of the products that aren't formed, each counted once.

    A product is taken for formed if one with factors of the same shapes is.
    """
    formed = {tuple(factor.shape for factor in product.factors) for product in dense}
    products: dict[int, Product] = {}
    for entry in entries:
        if entry.rewrite == OF_THE_DENSITY:
            continue
        if not any(entry.products):
            return None
        products |= {product.number: product for product in entry.products if product is not None}
    return total(
        nbytes(shape_of(product), product.dtype)
        for product in products.values()
        if product.shapes not in formed
    )


def _factors_of(product: Product) -> tuple[Factor, ...]:
    return tuple(map(Factor, product.names, product.shapes))


def dense_products_in(program: Program) -> Iterator[DenseProduct]:
    """Yield what of the size of a Kronecker product is formed, in inner graphs too."""
    needed = [set(ancestors([output])) for output in program.fgraph.outputs]

    def names_of(var: Variable) -> tuple[str, ...]:
        names = (name for name, vars in zip(program.names, needed, strict=True) if var in vars)
        return tuple(dict.fromkeys(names))

    for node in program.fgraph.toposort():
        output = node.outputs[0]
        op = _core_op(node)
        if isinstance(op, KroneckerProduct):
            # A product that only goes into a longer product isn't the one to report
            if uses := _last_uses(program, output):
                yield _dense_product(node, output, uses, names_of(output), program.inside)
        elif _is_pullback(node):
            kron_node, cotangent = node.inputs[2].owner, node.inputs[3]
            use = _use(program, cotangent, cotangent, node)
            names = names_of(output)
            yield _dense_product(
                kron_node, cotangent, [use], names, program.inside, is_gradient=True
            )
        elif isinstance(op, HasInnerGraph) and _has_kron(op.fgraph):
            for product in dense_products_in(_inner_program(program, node)):
                yield replace(product, programs=names_of(output))

    for constant in filter(_is_constant, program.fgraph.variables):
        for folded, kron_node in program.folded.items():
            if constant.equals(folded) and (clients := list(_uses_of(program.fgraph, constant))):
                uses = [_use(program, kron_node.outputs[0], *client) for client in clients]
                yield _dense_product(kron_node, constant, uses, names_of(constant), program.inside)


def _inner_program(program: Program, node: Apply) -> Program:
    """Return the program that is an inner graph, and add its journal to the outer one's."""
    inner = _core_op(node).fgraph
    fgraph = inner.unfreeze() if isinstance(inner, FrozenFunctionGraph) else inner.clone()
    # The last name is that of the program that the inner graph is in
    name = [*program.entries][-1]
    names, label = (name,) * len(fgraph.outputs), _label(node)
    if program.is_compiled:
        return replace(program, fgraph=fgraph, names=names, inside=label)
    rewritten = _rewrite(Program(fgraph, names, {name: []}, inside=label))
    program.entries[name].extend(rewritten.entries[name])
    return rewritten


def _has_kron(fgraph: FunctionGraph | FrozenFunctionGraph) -> bool:
    return any(
        isinstance(_core_op(node), KroneckerProduct)
        or (isinstance(node.op, HasInnerGraph) and _has_kron(node.op.fgraph))
        for node in fgraph.apply_nodes
    )


def _is_constant(var: Variable) -> bool:
    return isinstance(var, Constant)


def _uses_of(fgraph: FunctionGraph, var: Variable) -> Iterator[tuple[Variable, Apply]]:
    """Yield what a product goes into: itself, or its transposes and multiples."""
    for client, _ in fgraph.clients[var]:
        op = _core_op(client)
        if isinstance(op, KroneckerProduct | Shape | Shape_i):
            continue
        if (
            not isinstance(op, Output)
            and len(client.outputs) == 1
            and kron_factors(client.outputs[0]) is not None
        ):
            yield from _uses_of(fgraph, client.outputs[0])
        else:
            yield var, client


def _last_uses(program: Program, var: Variable) -> list[_Use]:
    """Return what a product goes into, as it was written before operations were specialized."""
    now = list(_uses_of(program.fgraph, var))
    before = program.uses.get(var, [])
    clients_now = [client for _, client in now]
    clients_before = [use.client for use in before]
    kept = [use for use in before if use.client in clients_now]
    gone = [use for use in before if use.client not in clients_now]
    new = [use for use in now if use[1] not in clients_before]
    if not new:
        return kept
    return [*kept, *(gone or [_use(program, var, *use) for use in new])]


def _dense_product(
    kron_node: Apply,
    var: Variable,
    uses: Sequence[_Use],
    names: tuple[str, ...],
    inside: str | None,
    *,
    is_gradient: bool = False,
) -> DenseProduct:
    factors = kron_factors(kron_node.outputs[0]) or kron_node.inputs[:2]
    shape = _shape_of(var)
    # The gradient is dense because of what else the product goes into
    others = [use for use in uses if not _is_pullback(use.client)]
    reasons = [reason for use in others or uses for reason in use.reasons]
    return DenseProduct(
        names,
        tuple(Factor(name_of(factor), _shape_of(factor)) for factor in factors),
        shape,
        var.type.dtype,
        nbytes(shape, var.type.dtype),
        tuple(dict.fromkeys(use.label for use in uses)),
        tuple(dict.fromkeys(reasons)),
        is_gradient,
        inside,
    )


ADVICE = {
    "Add": "of a sum, solutions, log-determinants and products with vectors need no array",
    "Dot": "multiply the factors, (A (x) B)(C (x) D) = (A C) (x) (B D)",
    "Mul": "multiply the factors, (A (x) B) * (C (x) D) = (A * C) (x) (B * D)",
    "Subtensor": "index the factors, or what the product is multiplied with",
    "MvNormalRV": "leave out `method`, unless the covariance is singular",
    "Sum": "sum the factors, sum(A (x) B) = sum(A) sum(B)",
    "Scan": "write the loop with the factors",
    "gradient of kron": "write what the product goes into with the factors",
}
"""What to do about an operation that no rewrite knows, by its name."""

OF_A_SUM_WITH_A_DIAGONAL = "AdvancedIncSubtensor"
"""What PyTensor makes of a sum with ``pt.diag(v)`` when it specializes operations."""

OF_AN_EINSUM = ("Reshape", "Switch")
"""What a product goes into in a compiled program, of an einsum that isn't made of products."""


def _use(program: Program, product: Variable, var: Variable, client: Apply) -> _Use:
    """Ask the rewrites, and then the journal, about an operation that a product goes into.

    Parameters
    ----------
    product
        The Kronecker product, or the gradient in one.
    var
        What goes in: the product, its transpose or a multiple.
    client
        The operation.
    """
    label = _label(client)
    if isinstance(client.op, Output):
        where = "graph" if program.inside is None else f"inner graph of `{program.inside}`"
        reason = Reason(
            f"it is an output of the {where}",
            "ask for the factors, or for what the product is needed for",
        )
        return _Use(client, label, (reason,))

    kron_node = product.owner
    if kron_node is not None and isinstance(_core_op(kron_node), KroneckerProduct):
        if kron_factors(product) is None:
            ndims = " and ".join(str(inp.type.ndim) for inp in kron_node.inputs[:2])
            reason = Reason(
                f"`kron` of arrays with {ndims} dimensions isn't a product of matrices",
                'for batches, pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")',
            )
            return _Use(client, label, (reason,))
        # The journal knows what became of a sum, an inverse or a Cholesky factor of the product
        # too, and of the operation that another one has replaced since in a compiled function.
        # The pullback of kron, which has the product among its inputs, is another matter
        is_part = _is_about(product_in(client.outputs[0]), program, kron_node)
        is_replaced = program.is_compiled and (
            _is_linear_algebra(client) or OF_A_SUM_WITH_A_DIAGONAL in label
        )
        journal = [
            Reason(refusal.reason, refusal.advice)
            for op, refusal in _refusals(program, kron_node)
            if op == label
            or ((is_part or is_replaced) and op != "OpFromGraph")
            or (program.is_compiled and op == "Einsum" and label in OF_AN_EINSUM)
        ]
    else:
        journal = []

    answers = [
        _why_not(program, rewrite, label)
        if refusal is None
        else Reason(refusal.reason, refusal.advice)
        for rewrite, refusal in outcomes(program.fgraph, client)
    ]
    if _is_pullback(client):
        unknown = "the gradient in the product is a dense array"
    elif label == "Scan":
        unknown = "it is computed before the loop, which only sees an array"
    else:
        unknown = f"no rewrite knows this `{label}` of a Kronecker product"
    unknown_reason = Reason(unknown, ADVICE.get(label, "write it with the factors"))
    found = journal or answers if program.is_compiled else answers or journal
    return _Use(client, label, tuple(found or [unknown_reason]))


def _why_not(program: Program, rewrite: str, label: str) -> Reason:
    """Return why a rewrite that would replace an operation hasn't done so."""
    if rewrite in program.selected:
        return Reason(
            f"PyTensor made this `{label}` of another operation when `{rewrite}` had run already",
            "write it as such, like `K @ x` in place of an einsum",
        )
    return Reason(f"`{rewrite}` didn't run", 'compile in a mode that includes it, like "FAST_RUN"')


def _refusals(program: Program, kron_node: Apply) -> Iterator[tuple[str, Refusal]]:
    """Yield the refusals in the journal that are about a product, with the operations."""
    for entry in chain.from_iterable(program.entries.values()):
        if entry.refusal is not None and any(
            _is_about(product, program, kron_node) for product in entry.products
        ):
            yield entry.op, entry.refusal


def _is_linear_algebra(node: Apply) -> bool:
    return hasattr(_core_op(node), "gufunc_signature")


def _is_about(product: Product | None, program: Program, kron_node: Apply) -> bool:
    """Whether an entry of the journal is about a product, as far as that can be known."""
    current = product_in(kron_node.outputs[0])
    if product is None or current is None:
        return False
    if program.is_compiled:
        return (product.shapes, product.names) == (current.shapes, current.names)
    return product.number == current.number


def _core_op(node: Apply) -> Op:
    """Return the operation itself, without what batches it and what allocates its result."""
    op = getattr(node.op, "core_op", node.op)
    if isinstance(op, FinalizedOpFromGraph) and len(op.fgraph.apply_nodes) == 1:
        [inner_node] = op.fgraph.apply_nodes
        return _core_op(inner_node)
    return op


def _is_pullback(node: Apply) -> bool:
    """Whether a node is what PyTensor makes of the gradient of ``kron``."""
    if not isinstance(_core_op(node), OpFromGraph) or len(node.inputs) != 4:
        return False
    *factors, product, _ = node.inputs
    return (
        product.owner is not None
        and isinstance(_core_op(product.owner), KroneckerProduct)
        and list(product.owner.inputs[:2]) == factors
    )


def _label(node: Apply) -> str:
    """Name an operation: an elementwise one by what it does, fused ones by all of that."""
    if _is_pullback(node):
        return "gradient of kron"
    op = _core_op(node)
    scalar_op = getattr(op, "scalar_op", None)
    if isinstance(scalar_op, Composite):
        names = (type(inner.op).__name__ for inner in scalar_op.fgraph.toposort())
        return f"Composite of {', '.join(dict.fromkeys(names))}"
    if isinstance(op, HasInnerGraph) and type(op).__name__ == "FusedElemwise":
        return ", ".join(dict.fromkeys(map(_label, op.fgraph.toposort())))
    if type(op).__name__ in ("Elemwise", "ScalarizedElemwise") and scalar_op is not None:
        return type(scalar_op).__name__
    return "output" if isinstance(op, Output) else type(op).__name__


def _shape_of(var: Variable) -> StaticShape:
    """Return the static shape, completed by what follows from constants and shared variables."""
    static = var.type.shape
    if None not in static:
        return static
    shapes = [var.shape[axis] for axis, size in enumerate(static) if size is None]
    sizes = iter([_value_of(shape) for shape in resolve_shapes(shapes)])
    return tuple(next(sizes) if size is None else size for size in static)


def _value_of(size: Variable) -> int | None:
    if all(isinstance(inp, Constant | SharedVariable) for inp in graph_inputs([size])):
        # The sizes in a compiled graph are computed in place
        return int(size.eval(mode=Mode(linker="py", optimizer=None), accept_inplace=True))
    return None
