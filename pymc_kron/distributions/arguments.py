"""The arguments of the distributions: reading them, and telling what is wrong with them."""

import math
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import pytensor
from pymc.pytensorf import convert_observed_data
from pytensor import tensor as pt
from pytensor.tensor import TensorLike
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance, KroneckerCovariance, KronSumCovariance
from pymc_kron.factors import Factor, Form
from pymc_kron.kron_sum import KronSum, Layout
from pymc_kron.structure import Size, current_length, is_provably_not_square

type Dims = str | Sequence[str | EllipsisType | None] | None
"""What PyMC takes for ``dims``."""

FORMS: tuple[Form, ...] = ("cov", "chol", "tau", "evd")


def read_factors(covs: Any, chols: Any, taus: Any, evds: Any, *, lower: bool) -> list[Factor]:
    """Return the factors, after checking that what describes each of them is clear."""
    lists: dict[Form, Sequence] = {}
    for form, matrices in zip(FORMS, (covs, chols, taus, evds), strict=True):
        if matrices is not None:
            entry = "pair of eigenvalues and eigenvectors" if form == "evd" else "matrix"
            example = "(w, Q)" if form == "evd" else "K"
            lists[form] = read_list(f"{form}s", matrices, entry, example)

    if not any(map(len, lists.values())):
        raise ValueError(
            "There are no factors: pass their covariances (covs), Cholesky factors "
            "(chols), precisions (taus) or eigenvalues and eigenvectors (evds), for example "
            "covs=[K_space, K_time]."
        )
    if len({len(matrices) for matrices in lists.values()}) > 1:
        lengths = [f"len({form}s) = {len(matrices)}" for form, matrices in lists.items()]
        raise ValueError(
            "covs, chols, taus and evds must have one entry a factor each, with None where "
            f"another list describes the factor, got {', '.join(lengths)}."
        )

    factors = []
    for i, entries in enumerate(zip(*lists.values(), strict=True)):
        described = {
            form: entry for form, entry in zip(lists, entries, strict=True) if entry is not None
        }
        if len(described) != 1:
            given = " and ".join(f"{form}s[{i}]" for form in described)
            raise ValueError(
                f"Factor {i} needs exactly one of covs, chols, taus and evds, got "
                f"{given or 'none'}. Put None in the lists that don't describe it."
            )
        [(form, entry)] = described.items()
        factors.append(_read_factor(form, f"{form}s[{i}]", entry, lower=lower))
    return factors


def read_covariance(
    covs: Any,
    chols: Any,
    taus: Any,
    evds: Any,
    sigma: TensorLike | None,
    noise_covs: Any,
    *,
    lower: bool,
) -> Covariance:
    """Return the covariance of factors, without noise or with it."""
    factors = read_factors(covs, chols, taus, evds, lower=lower)
    noisy = read_noise(factors, sigma, noise_covs)
    return KroneckerCovariance(factors) if noisy is None else KronSumCovariance(noisy)


def read_list(name: str, entries: Any, entry: str, example: str) -> Sequence:
    """Return a list with one entry a factor, after checking that it is one."""
    if isinstance(entries, list | tuple):
        return entries
    shape = getattr(getattr(entries, "type", entries), "shape", None)
    raise TypeError(
        f"{name} must be a list or tuple with one {entry} a factor, got a single "
        f"{type(entries).__name__}{'' if shape is None else f' of shape {shape}'}. "
        f"Wrap it in a list if there is only one factor: {name}=[{example}]."
    )


def _read_factor(form: Form, name: str, entry: Any, *, lower: bool) -> Factor:
    if form != "evd":
        factor = _read_square_matrix(name, entry)
        return Factor(form, (factor.mT if form == "chol" and not lower else factor,))
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        got = f"{len(entry)} entries" if isinstance(entry, list | tuple) else type(entry).__name__
        raise TypeError(
            f"{name} must be a pair (w, Q) of eigenvalues (n,) and eigenvectors (n, n), as "
            f"numpy.linalg.eigh returns it, got {got}."
        )
    values, vectors = entry
    values = _read_real(f"{name}[0]", values)
    vectors = _read_square_matrix(f"{name}[1]", vectors)
    sizes = {values.type.shape[-1] if values.type.ndim else 0, vectors.type.shape[-1]}
    if len(sizes - {None}) > 1:
        raise ValueError(
            f"The eigenvalues {name}[0] must be as many as the eigenvectors {name}[1] are, got "
            f"shapes {_show(values.type.shape)} and {_show(vectors.type.shape)}."
        )
    return Factor(form, (values, vectors))


def _read_square_matrix(name: str, matrix: TensorLike) -> TensorVariable:
    factor = _read_real(name, matrix)
    if factor.type.ndim < 2 or is_provably_not_square(factor):
        raise ValueError(
            f"{name} must be a square matrix of shape (n, n), or a batch of them of shape "
            f"(..., n, n), got shape {_show(factor.type.shape)}."
        )
    return factor


def _read_real(name: str, value: TensorLike) -> TensorVariable:
    tensor = pt.as_tensor_variable(value)
    if tensor.type.numpy_dtype.kind in "biu":
        tensor = tensor.astype(pytensor.config.floatX)
    if tensor.type.numpy_dtype.kind != "f":
        raise ValueError(f"{name} must be real, got dtype {tensor.type.dtype}.")
    return tensor


def read_noise(
    factors: Sequence[Factor], sigma: TensorLike | None, noise_covs: Any
) -> KronSum | None:
    """Return the covariance of factors with noise, or None if there is no noise.

    Parameters
    ----------
    factors
        What the noise is added to.
    sigma
        The standard deviation of independent noise, ``(...)``.
    noise_covs
        For each factor, the covariance of the noise along its axis: a matrix, the diagonal of
        one, a multiple of the identity, or None for the identity.
    """
    if sigma is None and noise_covs is None:
        return None
    if sigma is not None and noise_covs is not None:
        raise ValueError(
            "sigma and noise_covs can't be given together: no one basis fits the three terms "
            "K + D_1 (x) ... (x) D_d + sigma^2 I. Leave one of them out."
        )
    sizes = [factor.size for factor in factors]
    if sigma is not None:
        scale, metrics = _read_sigma(sigma, sizes) ** 2, [None for _ in sizes]
    else:
        scale, metrics = _read_noise_covs(noise_covs, sizes)

    signals, eigenvalues = [], []
    for factor in factors:
        match factor.form:
            case "evd":
                values, vectors = factor.parts
                signals.append(vectors)
                eigenvalues.append(values)
            case _:
                signals.append(factor.covariance())
    layout = Layout(
        uses_signal=((True,) * len(sizes), (False,) * len(sizes)),
        has_metric=tuple(metric is not None for metric in metrics),
        is_decomposed=tuple(factor.form == "evd" for factor in factors),
    )
    one = pt.ones((), dtype=scale.type.dtype)
    own_metrics = [metric for metric in metrics if metric is not None]
    return KronSum(layout, [one, scale], signals, own_metrics, eigenvalues)


def _read_sigma(sigma: TensorLike, sizes: Sequence[Size]) -> TensorVariable:
    sigma = _read_real("sigma", sigma)
    N = math.prod(sizes)
    length = current_length(sigma.shape[-1]) if sigma.type.ndim else None
    if isinstance(N, int) and N > 1 and length == N:
        raise ValueError(
            f"sigma must be one standard deviation for all cells, or one for each entry of a "
            f"batch, got shape {_show(sigma.type.shape)}, one for each of the N = "
            f"{_show_product(sizes)} cells. What exists instead is noise with a covariance of its "
            "own along each axis, noise_covs=[d_1, ...] with the variances d_i of the levels of "
            "axis i; or independent noise in the likelihood, pm.Normal(mu=field, sigma=sigma) of "
            "a latent KroneckerMvNormal field."
        )
    return sigma


def _read_noise_covs(
    noise_covs: Any, sizes: Sequence[Size]
) -> tuple[TensorVariable, list[TensorVariable | None]]:
    """Return the scalar and the matrices that the noise covariance is the product of."""
    noise_covs = read_list("noise_covs", noise_covs, "covariance", "D")
    if len(noise_covs) != len(sizes):
        raise ValueError(
            f"noise_covs must have one entry for each of the {len(sizes)} factors, got "
            f"{len(noise_covs)}: a matrix (n, n), the diagonal (n,) of one, a number for a "
            "multiple of the identity, or None for the identity."
        )
    scale = pt.ones((), dtype=pytensor.config.floatX)
    metrics: list[TensorVariable | None] = []
    for i, (entry, size) in enumerate(zip(noise_covs, sizes, strict=True)):
        if entry is None:
            metrics.append(None)
            continue
        name = f"noise_covs[{i}]"
        cov = _read_real(name, entry)
        if cov.type.ndim == 0:
            scale = scale * cov
            metrics.append(None)
            continue
        lengths = {size, *cov.type.shape[-2:]}
        if len({length for length in lengths if isinstance(length, int)}) > 1:
            raise ValueError(
                f"{name} must be a matrix ({size}, {size}), the diagonal ({size},) of one, a "
                f"number or None, to fit factor {i}, got shape {_show(cov.type.shape)}."
            )
        metrics.append(pt.diag(cov) if cov.type.ndim == 1 else cov)
    return scale, metrics


def read_new_points(
    factors: Sequence[Factor], cross_covs: Any, new_covs: Any
) -> tuple[list[TensorVariable | None], list[Factor]]:
    """Return the cross-covariances, None for a factor without new points, and the new factors.

    Parameters
    ----------
    factors
        The factors of the grid.
    cross_covs
        For each factor, the covariances of its new points with those of the grid, or None.
    new_covs
        For each factor, the covariances of its new points, or None.
    """
    lists = {"cross_covs": cross_covs, "new_covs": new_covs}
    for name, entries in lists.items():
        if len(read_list(name, entries, "covariance", "C")) != len(factors):
            raise ValueError(
                f"{name} must have one entry for each of the {len(factors)} factors, with None for "
                f"a factor without new points, got {len(entries)}."
            )
    crosses: list[TensorVariable | None] = []
    new_factors = []
    for i, (factor, *entries) in enumerate(zip(factors, cross_covs, new_covs, strict=True)):
        names = [f"{name}[{i}]" for name in lists]
        given = [name for name, entry in zip(names, entries, strict=True) if entry is not None]
        if not given:
            crosses.append(None)
            new_factors.append(factor)
            continue
        if len(given) == 1:
            raise ValueError(
                f"New points of factor {i} need both {names[0]}, their covariances with the points "
                f"of the grid, and {names[1]}, those with one another, got {given[0]} alone. Put "
                "None in both if there are none."
            )
        cross, new = _read_real(names[0], entries[0]), _read_square_matrix(names[1], entries[1])
        expected = (new.type.shape[-1], factor.size)
        shape = cross.type.shape[-2:]
        if len(shape) < 2 or any(
            isinstance(size, int) and length not in (None, size)
            for length, size in zip(shape, expected, strict=True)
        ):
            raise ValueError(
                f"{names[0]} must have a row for each new point and a column for each point of the "
                f"grid, {_show(expected)} for factor {i}, got shape {_show(cross.type.shape)} with "
                f"{names[1]} of shape {_show(new.type.shape)}."
            )
        crosses.append(cross)
        new_factors.append(Factor("cov", (new,)))
    return crosses, new_factors


def read_mu(mu: TensorLike, sizes: Sequence[Size], event_ndim: int = 1) -> TensorVariable:
    """Return the mean, after checking its shape against that of the `event_of` the grid."""
    mu = pt.as_tensor_variable(mu)
    if mu.type.numpy_dtype.kind == "c":
        raise ValueError(f"mu must be real, got dtype {mu.type.dtype}.")
    mu = pt.atleast_Nd(mu, n=event_ndim)
    check_event("mu", mu, sizes, event_ndim, broadcasts=True)
    return mu


def event_of(sizes: Sequence[Size], event_ndim: int) -> tuple[Size, ...]:
    """Return the shape of one value: that of the grid, or as a vector the number of its cells."""
    return (math.prod(sizes),) if event_ndim == 1 else tuple(sizes)


def check_event(
    name: str,
    value: TensorVariable,
    sizes: Sequence[Size],
    event_ndim: int,
    *,
    broadcasts: bool = False,
) -> None:
    """Check that an array has as many cells as the grid, or is such a grid."""
    shape = value.type.shape
    pairs = zip(shape[-event_ndim:], event_of(sizes, event_ndim), strict=False)
    if len(shape) >= event_ndim and all(
        not isinstance(expected, int) or size in (None, expected, *([1] if broadcasts else []))
        for size, expected in pairs
    ):
        return
    raise ValueError(
        f"{_expected_event(name, sizes, event_ndim, broadcasts=broadcasts)}, "
        f"got {name} of shape {_show(shape)}."
    )


def _expected_event(
    name: str, sizes: Sequence[Size], event_ndim: int, *, broadcasts: bool = False
) -> str:
    if event_ndim == 1:
        return (
            f"The last dimension of {name} must be {'1 or ' if broadcasts else ''}"
            f"N = {_show_product(sizes)}, the number of cells of the grid"
        )
    return (
        f"The last {event_ndim} dimensions of {name} must be {_show(sizes)}, the sizes of the "
        f"factors{', or broadcast to it' if broadcasts else ''}"
    )


def check_value(
    value: TensorVariable, shape: Sequence[int | None], sizes: Sequence[Size], event_ndim: int
) -> None:
    """Check the cells of a value, and its batch shape against that of the variable."""
    check_event("value", value, sizes, event_ndim)
    batches = zip(
        reversed(value.type.shape[:-event_ndim]), reversed(shape[:-event_ndim]), strict=False
    )
    if any(None not in sizes and 1 not in sizes and len(set(sizes)) > 1 for sizes in batches):
        raise ValueError(
            f"A value of shape {_show(value.type.shape)} doesn't broadcast against a variable of "
            f"shape {_show(shape)}. The size of the variable, and the batch dimensions of its "
            "parameters, must be those of the observations."
        )


def check_shape(shape: Any, sizes: Sequence[Size], event_ndim: int) -> None:
    """Check the last entries of ``shape``, which may come from observed data or dims."""
    known = [size for size in map(current_length, sizes) if size is not None]
    if not isinstance(shape, int | list | tuple) or len(known) < len(sizes):
        return
    shape = [shape] if isinstance(shape, int) else shape
    if Ellipsis in shape:
        return
    lengths = [current_length(length) for length in shape]
    event = event_of(known, event_ndim)
    ends = zip(lengths[-event_ndim:], event, strict=False)
    if len(lengths) >= event_ndim and all(length in (None, size) for length, size in ends):
        return
    advice = (
        "A grid of observations goes in as observed=grid.ravel(), with the first factor's axis "
        "first; TensorNormal takes it as it is."
        if event_ndim == 1
        else "The factors come in the order of the axes."
    )
    expected = _expected_event("shape, dims or observed", known, event_ndim)
    raise ValueError(f"{expected}, got {_show(lengths)}. {advice}")


def read_observed(observed: Any, dims: Dims, event_ndim: int, *, marginalize_missing: bool) -> Any:
    """Return observations, with NaN for missing cells that are to be integrated out.

    PyMC takes NaN in an array for parameters, and leaves it in a constant.
    """
    data = convert_observed_data(observed)
    if not isinstance(data, np.ma.MaskedArray):
        return observed
    missing = np.ma.getmaskarray(data)
    check_missing(missing, dims, event_ndim, marginalize_missing=marginalize_missing)
    if not marginalize_missing:
        return observed
    return pt.constant(np.ma.filled(data.astype(pytensor.config.floatX), np.nan))


def check_missing(
    missing: np.ndarray, dims: Dims, event_ndim: int, *, marginalize_missing: bool
) -> None:
    """Check which cells of observations are missing, at least one of which is."""
    where = f"observed of shape {_show(missing.shape)}"
    if dims is not None:
        where += f" with dims={tuple(dims) if not isinstance(dims, str) else (dims,)}"
    if missing.all():
        raise ValueError(
            f"All cells are missing, got {where}. Leave observed out for a grid to be sampled."
        )
    first = missing[(0,) * (missing.ndim - event_ndim)]
    if marginalize_missing and (missing != first).any():
        counts = missing.sum(axis=tuple(range(-event_ndim, 0)))
        raise ValueError(
            "marginalize_missing needs the same missing cells in all observations of a batch, got "
            f"{where}, whose last {event_ndim} are the grid, and {counts.min()} to {counts.max()} "
            "missing cells in different places. Leave it out to impute them while sampling, or "
            "give each pattern a variable of its own."
        )


def check_dims(dims: Dims, lengths: Mapping[str, int | None], sizes: Sequence[Size | None]) -> None:
    """Check the names of the axes of a grid against the factors.

    Parameters
    ----------
    dims
        The names of all dimensions; the last ones are those of the grid.
    lengths
        The lengths that dimensions of the model have.
    sizes
        The sizes of the factors.
    """
    if isinstance(dims, str) or not isinstance(dims, Sequence):
        dims = (dims,)
    names = dims[-len(sizes) :]
    if len(names) < len(sizes) or Ellipsis in names:
        if Ellipsis in dims:
            return
        raise ValueError(
            f"A grid of {len(sizes)} factors of sizes {_show(sizes)} needs as many dims, one a "
            f"factor in their order, after those of batches, got dims={tuple(dims)}."
        )
    repeated = [name for name in names if name is not None and names.count(name) > 1]
    if repeated:
        axes = [i for i, name in enumerate(names) if name == repeated[0]]
        raise ValueError(
            f"Factors {' and '.join(map(str, axes))} have the same dim {repeated[0]!r}, got "
            f"dims={tuple(dims)}: each axis of the grid needs a name of its own."
        )
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        length = lengths.get(name) if isinstance(name, str) else None
        if length is not None and isinstance(size, int) and length != size:
            raise ValueError(
                f"Dim {name!r} is of length {length}, but factor {i} is {size} x {size}, got "
                f"dims={tuple(dims)} for factors of sizes {_show(sizes)}. The factors come in the "
                "order of the dims."
            )


def _show(shape: Sequence[Size | None]) -> str:
    sizes = [str(size) if isinstance(size, int) else "?" for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _show_product(sizes: Sequence[Size]) -> str:
    product = " * ".join(map(str, sizes))
    return product if len(sizes) == 1 else f"{product} = {math.prod(sizes)}"
