"""What `pymc_kron.explain` has to say, and how it prints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

import numpy as np

from pymc_kron.diagnostics.tables import WIDTH, Table
from pymc_kron.rewriting.journal import StaticShape

NOTHING_FOUND = "no Kronecker product found"


@dataclass(frozen=True)
class Factor:
    """A factor of a Kronecker product.

    Attributes
    ----------
    name
        The name of its variable, "?" if it has none.
    shape
        Its shape, with None for a size that isn't known before the program runs.
    """

    name: str
    shape: StaticShape

    def __str__(self) -> str:
        return f"{self.name}[{_show_shape(self.shape)}]"


@dataclass(frozen=True)
class Reason:
    """Why a Kronecker product stayed dense.

    Attributes
    ----------
    reason
        The guard that refused, in words.
    advice
        What can be done about it.
    """

    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.advice}" if self.advice else self.reason


@dataclass(frozen=True)
class Fired:
    """A rewrite that fired.

    Attributes
    ----------
    program
        The program that it fired in: "logp", "gradient", "draws", "graph" or "function".
    rewrite
        The name of the rewrite.
    op
        The operation that the Kronecker product went into.
    factors
        The factors of the product, None if it isn't among the inputs of the operation.
    count
        How many times it fired for this operation on such factors.
    flops_saved
        An estimate of the floating point operations saved, None if a size isn't known. That of
        a density is with the rewrites of its formula.
    bytes_saved
        The memory of the products that aren't formed, None if a size isn't known.
    """

    program: str
    rewrite: str
    op: str
    factors: tuple[Factor, ...] | None
    count: int
    flops_saved: float | None
    bytes_saved: int | None


@dataclass(frozen=True)
class DenseProduct:
    """A Kronecker product, or the gradient in one, that a program forms.

    Attributes
    ----------
    programs
        The programs that form it: "logp", "gradient", "draws", "graph" or "function".
    factors
        The factors of the product.
    shape
        The shape of the array, with None for a size that isn't known before the program runs.
    dtype
        Its dtype.
    nbytes
        Its memory, None if a size isn't known.
    consumers
        The operations that it goes into.
    reasons
        Why it isn't factorwise, and what can be done about it.
    is_gradient
        Whether the array is the gradient in the product.
    inside
        The operation in whose inner graph it is formed, such as "Scan", or None.
    """

    programs: tuple[str, ...]
    factors: tuple[Factor, ...]
    shape: StaticShape
    dtype: str
    nbytes: int | None
    consumers: tuple[str, ...]
    reasons: tuple[Reason, ...]
    is_gradient: bool = False
    inside: str | None = None


@dataclass(frozen=True)
class Distribution:
    """A distribution of this package in a model, whose log-density and draws are factorwise.

    Attributes
    ----------
    variable
        The name of the variable that it is the distribution of.
    name
        Its own name.
    factors
        The factors of its covariance.
    has_noise
        Whether noise is added to their product.
    """

    variable: str
    name: str
    factors: tuple[Factor, ...]
    has_noise: bool


@dataclass(frozen=True)
class ScaledFactor:
    """A factor whose scale the data can't tell from those of other factors.

    Attributes
    ----------
    position
        Which factor of the product it is, the first one is 1.
    factor
        The factor.
    variables
        The names of the free variables that change its scale.
    """

    position: int
    factor: Factor
    variables: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.position}: {self.factor} by {', '.join(self.variables)}"


@dataclass(frozen=True)
class SharedScale:
    """Factors of one Kronecker product that share a scale, ``A (x) B = cA (x) (B / c)``.

    Attributes
    ----------
    variable
        The name of the random variable or the potential that has the product.
    factors
        The factors that share a scale.
    n_unidentified
        How many of their scales can be changed while the product stays the same: one less than
        there are factors, unless something else in the model ties some of them.
    """

    variable: str
    factors: tuple[ScaledFactor, ...]
    n_unidentified: int


@dataclass(frozen=True)
class Explanation:
    """What `pymc_kron.explain` found: prints as a table, in a notebook as HTML.

    Attributes
    ----------
    fired : tuple of Fired
        The rewrites that fired, each once for an operation and the shapes of the factors.
    dense : tuple of DenseProduct
        The Kronecker products that stayed dense.
    distributions : tuple of Distribution
        The distributions of this package in a model, which no rewrite has to make factorwise.
    shared_scales : tuple of SharedScale
        The factors in a model whose scales the data can't tell apart.
    flops_saved : float or None
        The sum of the operations saved, None if one of them isn't known.
    bytes_saved : int or None
        The memory of the products that aren't formed, each counted once a program; None if a
        size isn't known.
    is_factorwise : bool
        Whether no Kronecker product stayed dense.
    """

    fired: tuple[Fired, ...]
    dense: tuple[DenseProduct, ...]
    bytes_saved: int | None = 0
    distributions: tuple[Distribution, ...] = ()
    shared_scales: tuple[SharedScale, ...] = ()

    @property
    def flops_saved(self) -> float | None:
        return total(row.flops_saved for row in self.fired)

    @property
    def is_factorwise(self) -> bool:
        return not self.dense

    def __str__(self) -> str:
        tables = self._tables()
        if not tables:
            return NOTHING_FOUND
        parts = [table.text() for table in tables]
        return "\n\n".join([*parts, "\n".join(wrap(self._summary(), WIDTH))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tables = self._tables()
        if not tables:
            return f"<p>{NOTHING_FOUND}</p>"
        return "\n".join([*map(Table.html, tables), f"<p>{escape(self._summary())}</p>"])

    def _tables(self) -> list[Table]:
        tables = (
            dense_table(self.dense),
            _scales_table(self.shared_scales),
            _fired_table(self.fired),
            _distributions_table(self.distributions),
        )
        return [table for table in tables if table.rows]

    def _summary(self) -> str:
        match len(self.dense):
            case 0:
                dense = "No Kronecker product stays dense."
            case 1:
                dense = "1 array of the size of a product is formed."
            case n:
                dense = f"{n} arrays of the size of a product are formed."
        flops = sum(row.flops_saved or 0 for row in self.fired)
        saved = [f"{_show_flops(flops)} floating point operations"] if flops > 0 else []
        if self.bytes_saved:
            saved.append(f"{_show_bytes(self.bytes_saved)} of memory")
        if not saved:
            return dense
        at_least = "at least " if self.flops_saved is None or self.bytes_saved is None else ""
        return f"{dense} The rewrites save {at_least}about {' and '.join(saved)}."


def total[Number: (int, float)](values: Iterable[Number | None]) -> Number | None:
    """Return the sum, None if one of the values isn't known."""
    values = list(values)
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def dense_table(dense: Sequence[DenseProduct]) -> Table:
    """Return the table of what stays dense, with the reasons."""
    rows = []
    for product in dense:
        gradient = "gradient in " if product.is_gradient else ""
        inside = "" if product.inside is None else f"{product.inside} in "
        rows.append(
            [
                gradient + _show_product(product.factors),
                f"{_show_shape(product.shape)} {product.dtype}",
                _show_bytes(product.nbytes),
                inside + ", ".join(product.programs),
                ", ".join(product.consumers),
            ]
        )
    reasons = [[str(reason) for reason in product.reasons] for product in dense]
    header = ["product", "shape", "memory", "in", "used by"]
    return Table("Stays dense", header, rows, reasons)


def _scales_table(shared_scales: Sequence[SharedScale]) -> Table:
    rows = [
        [shared.variable, "; ".join(map(str, shared.factors)), str(shared.n_unidentified)]
        for shared in shared_scales
    ]
    reasons = [
        [
            "A (x) B = cA (x) (B / c), so that only the prior tells these scales apart: fix "
            f"{shared.n_unidentified} of them, with a correlation matrix (pm.LKJCorr), a kernel "
            "without an amplitude, or one amplitude for the product"
        ]
        for shared in shared_scales
    ]
    header = ["variable", "factors, and what scales them", "scales too many"]
    return Table("Share a scale", header, rows, reasons)


def _fired_table(fired: Sequence[Fired]) -> Table:
    header = ["rewrite", "operation", "product", "in", "times", "flops saved", "memory saved"]
    rows = [
        [
            row.rewrite,
            row.op,
            "?" if row.factors is None else _show_product(row.factors),
            row.program,
            str(row.count),
            _show_flops(row.flops_saved),
            _show_bytes(row.bytes_saved),
        ]
        for row in fired
    ]
    return Table("Rewritten factorwise", header, rows)


def _distributions_table(distributions: Sequence[Distribution]) -> Table:
    rows = [
        [
            distribution.variable,
            distribution.name,
            _show_product(distribution.factors) + (" + noise" if distribution.has_noise else ""),
        ]
        for distribution in distributions
    ]
    return Table("Factorwise as written", ["variable", "distribution", "covariance"], rows)


def _show_shape(shape: StaticShape) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _show_product(factors: Sequence[Factor]) -> str:
    return " (x) ".join(map(str, factors))


def _show_flops(flops: float | None) -> str:
    if flops is None:
        return "?"
    if flops == 0:
        return "-"
    return f"{flops:.0f}" if abs(flops) < 1e4 else f"{flops:.1e}"


def _show_bytes(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "?"
    if n_bytes == 0:
        return "-"
    exponent = min(int(np.log2(n_bytes)) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[exponent]
    return f"{n_bytes / 1024**exponent:.{0 if exponent == 0 else 1}f} {unit}"
