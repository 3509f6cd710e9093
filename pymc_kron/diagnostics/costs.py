"""Floating point operations of dense and of factorwise linear algebra, to leading order.

The counts are those of Golub and Van Loan (2013), "Matrix computations", 4th edition: sections 3.1
(triangular systems), 3.2 (LU), 4.2 (Cholesky), 5.2 (QR), 7.5 and 8.3 (eigenvalues) and 8.6
(singular values). An addition and a multiplication are two operations.

A dense operation on a product ``K`` of shape ``(N, M)`` is a decomposition of ``K``, the
application of ``K`` to some columns, or both. Factorwise, each factor is decomposed, and each is
applied along its axis of the grid: ``2 N sum_i n_i`` operations for a vector where a dense product
takes ``2 N**2``.
"""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from pymc_kron.rewriting.journal import Entry, Product, StaticShape

type Matrix = tuple[int, int]

CHOLESKY = "Cholesky"
LU = "LU"


def _cubic(coefficient: float) -> Callable[[int, int], float]:
    return lambda m, n: coefficient * m * n * min(m, n)


def _svd(m: int, n: int) -> float:
    m, n = max(m, n), min(m, n)
    return 4 * m**2 * n + 8 * m * n**2 + 9 * n**3


def _singular_values(m: int, n: int) -> float:
    m, n = max(m, n), min(m, n)
    return 4 * m * n**2 - 4 / 3 * n**3


def _qr(m: int, n: int) -> float:
    return _triangularization(m, n) + 4 / 3 * (m**3 - max(m - n, 0) ** 3)


def _triangularization(m: int, n: int) -> float:
    m, n = max(m, n), min(m, n)
    return 2 * m * n**2 - 2 / 3 * n**3


DECOMPOSITIONS: dict[str, Callable[[int, int], float]] = {
    CHOLESKY: _cubic(1 / 3),
    LU: _cubic(2 / 3),
    "MatrixInverse": _cubic(2),
    "Eigh": _cubic(9),
    "Eigvalsh": _cubic(4 / 3),
    "Eig": _cubic(25),
    "SVD": _svd,
    "singular values": _singular_values,
    "QR": _qr,
    "R of QR": _triangularization,
}
"""Operations of a decomposition of an (m, n) matrix, by its kind."""

APPLICATIONS: dict[str, float] = {
    "Solve": 2,
    "CholeskySolve": 2,
    "SolveTriangular": 1,
    "Dot": 2,
    "MvNormalRV": 2,
}
"""Operations for each entry of a matrix, and each column that it is applied to."""

READERS = {"Sum": 1, "ExtractDiag": 1, "Mul": 1, "OpFromGraph": 4}
"""Operations for each entry of a matrix that is formed or read; ``OpFromGraph`` is the gradient."""

OF_A_SUM = "kron_sum"
"""In the names of the rewrites of sums, which decompose the factors into eigenvectors."""

OF_THE_DENSITY = "mvnormal_of_kron_logp"
"""The rewrite whose savings are those of the ones that make the density factorwise after it."""


def flops_saved(entries: Sequence[Entry]) -> list[float | None]:
    """Estimate the floating point operations that the rewrites of one program save.

    A decomposition that a dense program could share is counted once: that of a product that is
    both solved with and has its determinant taken, or is solved with twice.

    Parameters
    ----------
    entries
        The rewrites that fired, in the journal of one program.

    Returns
    -------
    list of float or None
        For each of the entries, None where a static size or the count isn't known.
    """
    positive_definite = {
        product.number
        for entry in entries
        if decomposition_of(entry) == CHOLESKY
        for product in entry.products
        if product is not None
    }
    counted: set[tuple[int, str]] = set()
    saved: list[float | None] = []
    for entry in entries:
        product = first_product(entry)
        if entry.rewrite == OF_THE_DENSITY:
            saved.append(0)
            continue
        if product is None or not _are_known(product.shapes):
            saved.append(None)
            continue
        kind = decomposition_of(entry)
        if kind == LU and product.number in positive_definite:
            kind = CHOLESKY
        parts = [_saved_by_application(entry, product)]
        if kind is not None and (product.number, kind) not in counted:
            counted.add((product.number, kind))
            of_factors = "Eigh" if OF_A_SUM in entry.rewrite else kind
            parts.append(_saved_by_decomposition(product, kind, of_factors))
        known = [part for part in parts if part is not None]
        saved.append(sum(known) if len(known) == len(parts) else None)
    return saved


def first_product(entry: Entry) -> Product | None:
    """Return the first of the products that an entry is about."""
    return next((product for product in entry.products if product is not None), None)


def shape_of(product: Product) -> StaticShape:
    """Return the static shape of a product, from those of its factors."""
    rows, columns = (_product([shape[axis] for shape in product.shapes]) for axis in (-2, -1))
    batch = _batch_shape(product.shapes)
    return (*((None,) if batch is None else batch), rows, columns)


def nbytes(shape: StaticShape, dtype: str) -> int | None:
    """Return the memory of an array, None if a size isn't known."""
    size = _product(shape)
    return None if size is None else size * np.dtype(dtype).itemsize


def decomposition_of(entry: Entry) -> str | None:
    """Return how the dense program would decompose the product that an entry is about."""
    props = dict(entry.props)
    if OF_A_SUM in entry.rewrite:
        # One Cholesky factor serves the solution and the determinant
        return CHOLESKY
    match entry.op:
        case "Solve":
            is_symmetric = props.get("assume_a") in ("pos", "sym", "her")
            return CHOLESKY if is_symmetric else LU if props.get("assume_a") == "gen" else None
        case "MvNormalRV":
            return {"cholesky": CHOLESKY, "eigh": "Eigh", "svd": "SVD"}[
                str(props.get("method", "cholesky"))
            ]
        case "Det" | "SLogDet" | "LUFactor":
            return LU
        case "QR":
            return "R of QR" if props.get("mode") == "r" else "QR"
        case "MatrixPinv":
            return "SVD"
        case "SVD":
            return "SVD" if props.get("compute_uv", True) else "singular values"
        case op:
            return op if op in DECOMPOSITIONS else None


def _saved_by_decomposition(product: Product, kind: str, of_factors: str) -> float:
    dense, *factors = (
        prod(batch) * DECOMPOSITIONS[kind if i == 0 else of_factors](m, n)
        for i, (*batch, m, n) in enumerate(_known_shapes((shape_of(product), *product.shapes)))
    )
    return dense - sum(factors)


def _saved_by_application(entry: Entry, product: Product) -> float | None:
    """Return the operations saved besides those of a decomposition."""
    [(*batch, rows, columns)] = _known_shapes([shape_of(product)])
    matrices = [(m, n) for *_, m, n in _known_shapes(product.shapes)]
    if entry.op in APPLICATIONS:
        position = entry.products.index(product)
        if entry.op == "Dot" and position == 1:
            # X K = (K' X')'
            matrices = [(n, m) for m, n in matrices]
        other = entry.products[1 - position] if entry.op == "Dot" else None
        if other is not None:
            return _saved_by_mixed_product(product, other)
        n_columns = _columns(entry, product)
        if n_columns is None:
            return None
        # Into the basis and out of it
        n_sweeps = 2 if OF_A_SUM in entry.rewrite else 1
        return APPLICATIONS[entry.op] * n_columns * (rows * columns - n_sweeps * _sweep(matrices))
    if entry.op in READERS:
        factorwise = sum(m * n for m, n in matrices)
        if entry.op == "OpFromGraph":
            factorwise = _sweep(matrices)
        return READERS[entry.op] * prod(batch) * (rows * columns - factorwise)
    return 0 if decomposition_of(entry) is not None else None


def _saved_by_mixed_product(left: Product, right: Product) -> float | None:
    """Return the operations saved by ``(A (x) B) (C (x) D) = (A C) (x) (B D)``."""
    shapes = [*left.shapes, *right.shapes]
    if not _are_known(shapes) or len(left.shapes) != len(right.shapes):
        return None
    pairs = [(shape_of(left), shape_of(right)), *zip(left.shapes, right.shapes, strict=True)]
    dense, *factors = (
        2 * prod(np.broadcast_shapes(a[:-2], b[:-2])) * a[-2] * a[-1] * b[-1]
        for a, b in map(_known_shapes, pairs)
    )
    return dense - sum(factors)


def _sweep(matrices: Sequence[Matrix]) -> int:
    """Return the multiplications of ``(n1*...*nd)->(k1*...*kd)``, the last axis first."""
    sizes = [n for _, n in matrices]
    total = 0
    for i in reversed(range(len(matrices))):
        rows, columns = matrices[i]
        total += rows * columns * prod(sizes[:i]) * prod(sizes[i + 1 :])
        sizes[i] = rows
    return total


def _columns(entry: Entry, product: Product) -> int | None:
    """Return how many columns the product is applied to, those of all batches together."""
    batch = _batch_shape(product.shapes)
    if entry.op == "MvNormalRV":
        return None if entry.output is None else _product(entry.output[:-1])
    position = entry.products.index(product)
    other = entry.inputs[1 - position]
    if other is None or batch is None:
        return None
    if entry.op == "Dot":
        columns, other_batch = other[-1 if position == 0 else -2], other[:-2]
    elif dict(entry.props)["b_ndim"] == 1:
        columns, other_batch = 1, other[:-1]
    else:
        columns, other_batch = other[-1], other[:-2]
    together = _broadcast([batch, other_batch])
    return None if together is None else _product((*together, columns))


def _known_shapes(shapes: Sequence[StaticShape]) -> list[tuple[int, ...]]:
    return [tuple(size for size in shape if size is not None) for shape in shapes]


def _are_known(shapes: Sequence[StaticShape]) -> bool:
    return all(None not in shape for shape in shapes) and _batch_shape(shapes) is not None


def _batch_shape(shapes: Sequence[StaticShape]) -> StaticShape | None:
    return _broadcast([shape[:-2] for shape in shapes])


def _broadcast(shapes: Sequence[StaticShape]) -> StaticShape | None:
    """Broadcast static shapes, None if a size isn't known."""
    if any(None in shape for shape in shapes):
        return None
    return np.broadcast_shapes(*_known_shapes(shapes))


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None
