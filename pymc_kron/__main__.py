"""``python -m pymc_kron``: a separable space x time model of Irish wind, from data to figure.

The covariance of daily wind at 11 stations is a Kronecker product, one factor for space and one
for time, in the forms of Gneiting (2002), section 4. The job prepares the data, draws from the
prior, samples the posterior, checks its predictions, writes a figure, and times one gradient of
the log-density against the dense `pymc.MvNormal`.

References
----------
- Haslett, J. and Raftery, A. E. (1989). "Space-time modelling with long-memory dependence:
  assessing Ireland's wind power resource". Applied Statistics 38, 1-50.
- Gneiting, T. (2002). "Nonseparable, stationary covariance functions for space-time data".
  Journal of the American Statistical Association 97, 590-600.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import pymc as pm
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pymc.blocking import DictToArrayBijection
from pytensor.tensor.variable import TensorVariable

# Loads the BLAS that compiled models call, without which `threadpool_limits` can't find it
from scipy.linalg import toeplitz
from threadpoolctl import threadpool_limits

from pymc_kron import KroneckerMvNormal, load_irish_wind

EARTH_RADIUS_KM = 6371.0
DAYS_PER_YEAR = 365.25
UNIT = "sqrt(m/s)"

PARAMETERS = ["sigma", "nu", "range", "a", "alpha"]
FORMULA = """\
  cov[y(s, t), y(s', t')] = sigma^2 K_space(h) K_time(u)
  K_space(h) = (1 - nu) exp(-h / range) + nu [h = 0]    h: great-circle distance in km
  K_time(u)  = 1 / (1 + a u^(2 alpha))                  u: lag in days"""

DENSE_DAYS = 50
TIMED_CALLS = 30

PLOTTED_LAGS = 14
DATA_COLOR, PREDICTIVE_COLOR, FIT_COLOR = "black", "tab:blue", "tab:orange"


def prepare(
    data: xr.Dataset, *, leave_out: Sequence[str] = ("ROS",), harmonics: int = 2
) -> xr.DataArray:
    """Turn wind speeds into anomalies, as Haslett and Raftery (1989) did.

    The square root makes the speeds nearly normal and their variance nearly the same at all
    stations and seasons. The annual cycle that all stations share and the mean of each station
    are fitted by least squares to all the years, and removed.

    Parameters
    ----------
    data
        As from `load_irish_wind`, with ``wind`` in m/s.
    leave_out
        Codes of stations to drop. Rosslare's wind correlates less with the other stations' than
        their distance explains.
    harmonics
        The number of harmonics of the annual cycle.

    Returns
    -------
    xarray.DataArray
        Anomalies in sqrt(m/s), with dims ``("station", "time")``.
    """
    root_speed = np.sqrt(data["wind"].drop_sel(station=list(leave_out)))
    days = (root_speed["time"] - root_speed["time"][0]) / np.timedelta64(1, "D")
    phase = 2 * np.pi * days.to_numpy() / DAYS_PER_YEAR
    waves = [wave(k * phase) for k in range(1, harmonics + 1) for wave in (np.cos, np.sin)]
    design = np.column_stack([np.ones_like(phase), *waves])
    coefficients, *_ = np.linalg.lstsq(design, root_speed.mean("station").to_numpy())
    anomalies = root_speed - xr.DataArray(design @ coefficients, dims="time")
    anomalies = anomalies - anomalies.mean("time")
    return anomalies.assign_attrs(long_name="anomaly of the root of wind speed", units=UNIT)


def great_circle_distance(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Distances in km between points in degrees, by the haversine formula: ``(n),(n)->(n,n)``."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    haversine = (
        np.sin(np.subtract.outer(phi, phi) / 2) ** 2
        + np.multiply.outer(np.cos(phi), np.cos(phi)) * np.sin(np.subtract.outer(lam, lam) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(haversine))


def spatial_correlation(distance: np.ndarray, nu: Any, range_km: Any) -> Any:
    """Correlation at distances in km, one at zero; of NumPy arrays or PyTensor variables."""
    # A power, which both kinds of arguments understand
    return (1 - nu) * math.e ** (-distance / range_km) + nu * (distance == 0)


def temporal_correlation(lag: np.ndarray, a: Any, alpha: Any) -> Any:
    """Correlation at lags in days, one at zero; of NumPy arrays or PyTensor variables."""
    return 1 / (1 + a * lag ** (2 * alpha))


def build_model(anomalies: xr.DataArray, *, dense: bool = False) -> pm.Model:
    """Build the separable model of a grid of anomalies.

    Parameters
    ----------
    anomalies
        In sqrt(m/s), with dims ``("station", "time")``, a day apart in time, and the coords
        ``latitude`` and ``longitude`` in degrees.
    dense
        Write the same likelihood as a `pymc.MvNormal` with the ``(N, N)`` covariance.

    Returns
    -------
    pymc.Model
        ``y`` of shape ``(N,)`` holds the cells in row-major order, the station slowest.
    """
    n_stations, n_days = anomalies.sizes["station"], anomalies.sizes["time"]
    distance = great_circle_distance(
        anomalies["latitude"].to_numpy(), anomalies["longitude"].to_numpy()
    )
    lags = np.arange(n_days)
    observed = anomalies.transpose("station", "time").to_numpy().ravel()

    with pm.Model(coords={"cell": np.arange(observed.size)}) as model:
        # Root speeds average 2.2 sqrt(m/s) and are positive: a deviation beyond 2 is absurd
        sigma = pm.HalfNormal("sigma", 1)
        # Neighbouring stations share most of their wind: the share of a station's own variance
        # averages 1/5, and none is likeliest
        nu = pm.Beta("nu", 1, 4)
        # Weather systems are hundreds of km wide: 95% between 40 and 2,100 km, while the
        # stations are 60 to 430 km apart
        range_km = pm.LogNormal("range", math.log(300), 1)
        # The correlation from one day to the next, 1 / (1 + a), has the median 1/2 and is
        # between 0.12 and 0.88 with probability 95%
        a = pm.LogNormal("a", 0, 1)
        # The correlation is valid in (0, 1]. Keeps away from both ends: at 0 it no longer falls
        # with the lag, at 1 it is that of a smooth process
        alpha = pm.Beta("alpha", 2, 2)

        # The two factors' scales aren't identified separately: only one of them has a scale
        K_space = sigma**2 * spatial_correlation(distance, nu, range_km)
        K_time = temporal_correlation(lags.astype(float), a, alpha)[toeplitz(lags)]
        if dense:
            cov = dense_kron(K_space, K_time, (n_stations, n_days))
            pm.MvNormal("y", 0, cov=cov, observed=observed, dims="cell")
        else:
            KroneckerMvNormal("y", 0, covs=[K_space, K_time], observed=observed, dims="cell")
    return model


def dense_kron(A: TensorVariable, B: TensorVariable, sizes: tuple[int, int]) -> TensorVariable:
    """Form the Kronecker product ``(m,m),(n,n)->(mn,mn)`` of factors of the given sizes.

    From `pytensor.tensor.linalg.kron` a `pymc.MvNormal` would become a `KroneckerMvNormal`.
    """
    return (A[:, None, :, None] * B[None, :, None, :]).reshape((math.prod(sizes),) * 2)


@dataclass(frozen=True)
class GradientTiming:
    """Seconds that one log-density with its gradient takes, and how far the two forms differ."""

    n_days: int
    n_cells: int
    factorwise: float
    dense: float
    difference: float
    """The largest among the log-density and the gradient, relative to the largest of these."""


def time_gradients(anomalies: xr.DataArray) -> GradientTiming:
    """Time one gradient of the log-density, factorwise and dense, at the initial point.

    Raises
    ------
    AssertionError
        If the log-densities or the gradients differ by more than 1e-8, relative to their size
        or, where they are smaller than one, absolutely.
    """
    seconds: dict[bool, float] = {}
    values: dict[bool, np.ndarray] = {}
    for dense in (False, True):
        model = build_model(anomalies, dense=dense)
        logp_dlogp = model.logp_dlogp_function(ravel_inputs=True)
        logp_dlogp.set_extra_values({})
        point = DictToArrayBijection.map(model.initial_point()).data
        # The first call compiles
        logp, dlogp = logp_dlogp(point)
        values[dense] = np.append(dlogp, logp)
        seconds[dense] = np.median([_seconds(logp_dlogp, point) for _ in range(TIMED_CALLS)])
    np.testing.assert_allclose(values[False], values[True], rtol=1e-8, atol=1e-8)
    return GradientTiming(
        n_days=anomalies.sizes["time"],
        n_cells=anomalies.size,
        factorwise=seconds[False],
        dense=seconds[True],
        difference=np.abs(values[False] - values[True]).max() / np.abs(values[True]).max(),
    )


def _seconds(function: Callable, *args: object) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def sample(
    model: pm.Model, *, draws: int, tune: int, chains: int, rng: np.random.Generator
) -> xr.DataTree:
    """Sample the posterior and its predictions, both in the returned `xarray.DataTree`."""
    with model:
        # PyMC's own sampler, so that the job is the same whether or not nutpie is installed
        trace = pm.sample(
            draws,
            tune=tune,
            chains=chains,
            cores=min(chains, os.cpu_count() or 1),
            random_seed=rng,
            nuts_sampler="pymc",
        )
        pm.sample_posterior_predictive(trace, random_seed=rng, extend_inferencedata=True)
    return trace


def spatial_covariances(x: np.ndarray) -> np.ndarray:
    """Covariances about zero between stations on the same day: ``(s,t)->(s,s)``."""
    return x @ x.swapaxes(-1, -2) / x.shape[-1]


def temporal_covariances(x: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """Covariances about zero at lags in days, averaged over stations: ``(s,t),(k)->(k)``."""
    n_days = x.shape[-1]
    products = [(x[..., lag:] * x[..., : n_days - lag]).mean(axis=(-2, -1)) for lag in lags]
    return np.stack(products, axis=-1)


def next_day_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation about zero of one series with another a day later: ``(t),(t)->()``."""
    covariance = (x[..., :-1] * y[..., 1:]).mean(axis=-1)
    return covariance / np.sqrt((x**2).mean(axis=-1) * (y**2).mean(axis=-1))


def quantities(x: np.ndarray, stations: xr.DataArray) -> dict[str, np.ndarray]:
    """Return the test quantities of a grid: ``(s,t)->()`` each.

    Parameters
    ----------
    x
        Anomalies in sqrt(m/s), ``(..., n_stations, n_days)``.
    stations
        Any array with the coords ``station``, ``latitude`` and ``longitude`` of the stations.
    """
    codes = stations["station"].to_numpy()
    longitude = stations["longitude"].to_numpy()
    distance = great_circle_distance(stations["latitude"].to_numpy(), longitude)
    pairs = np.argwhere(np.triu(distance))
    by_distance = pairs[np.argsort(distance[tuple(pairs.T)])]
    west, east = np.argmin(longitude), np.argmax(longitude)

    lags = [lag for lag in (1, 2, 4, 7) if lag < x.shape[-1]]
    variance, *autocovariances = np.moveaxis(temporal_covariances(x, [0, *lags]), -1, 0)
    covariances = spatial_covariances(x)
    deviations = np.sqrt(np.diagonal(covariances, axis1=-2, axis2=-1))

    result = {f"standard deviation, {UNIT}": np.sqrt(variance)}
    result["station deviations, max / min"] = deviations.max(axis=-1) / deviations.min(axis=-1)
    for lag, autocovariance in zip(lags, autocovariances, strict=True):
        result[f"autocorrelation, lag {lag} d"] = autocovariance / variance
    for name, (i, j) in (("nearest", by_distance[0]), ("farthest", by_distance[-1])):
        key = f"correlation, {name}: {codes[i]}-{codes[j]}, {distance[i, j]:.0f} km"
        result[key] = covariances[..., i, j] / (deviations[..., i] * deviations[..., j])
    result[f"lead of west over east: {codes[west]}, {codes[east]}"] = next_day_correlation(
        x[..., west, :], x[..., east, :]
    ) - next_day_correlation(x[..., east, :], x[..., west, :])
    return result


def predictive_check(
    anomalies: xr.DataArray, replicates: np.ndarray
) -> tuple[dict[int, float], pd.DataFrame]:
    """Compare the data with draws of the predictive distribution.

    Parameters
    ----------
    anomalies
        ``(n_stations, n_days)`` in sqrt(m/s).
    replicates
        ``(n_draws, n_stations, n_days)`` in sqrt(m/s).

    Returns
    -------
    coverage : dict
        The share of cells inside their central predictive interval, by its percentage.
    table : pandas.DataFrame
        For each test quantity its observed value, the central 90% of its predictive
        distribution, and ``p``, the probability that a draw exceeds the data.
    """
    y = anomalies.to_numpy()
    coverage = {}
    for percent in (50, 90):
        lower, upper = np.percentile(replicates, [50 - percent / 2, 50 + percent / 2], axis=0)
        coverage[percent] = ((lower <= y) & (y <= upper)).mean()

    observed = quantities(y, anomalies)
    predicted = quantities(replicates, anomalies)
    table = pd.DataFrame(
        {
            "observed": observed[name],
            "5%": np.percentile(predicted[name], 5),
            "95%": np.percentile(predicted[name], 95),
            "p": (predicted[name] >= observed[name]).mean(),
        }
        for name in observed
    )
    return coverage, table.set_index(pd.Index(observed, name="test quantity"))


def plot(
    anomalies: xr.DataArray, replicates: np.ndarray, posterior: dict[str, np.ndarray]
) -> Figure:
    """Draw the predictions against the data, and the fitted against the empirical covariances.

    Parameters
    ----------
    anomalies, replicates
        As in `predictive_check`.
    posterior
        Draws of each parameter, ``(n_draws,)``.
    """
    # A figure of its own: pyplot and the user's backend stay as they are
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic(
        [["data"] * 3, ["draw"] * 3, ["cells", "space", "time"]], height_ratios=[1, 1, 2]
    )
    axes["draw"].sharey(axes["data"])
    _plot_series(axes["data"], axes["draw"], anomalies, replicates)
    _plot_cells(axes["cells"], anomalies.to_numpy(), replicates)
    _plot_space(axes["space"], anomalies, replicates, posterior)
    _plot_time(axes["time"], anomalies.to_numpy(), replicates, posterior)
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_series(
    data_ax: Axes, draw_ax: Axes, anomalies: xr.DataArray, replicates: np.ndarray
) -> None:
    """One station: the data above, and one draw of the predictive distribution below."""
    station = 0
    days = anomalies["time"].to_numpy()
    name = anomalies["station_name"].to_numpy()[station]
    draws = replicates[:, station]
    for ax, series, color, title in (
        (data_ax, anomalies.to_numpy()[station], DATA_COLOR, f"{name}: the data"),
        (draw_ax, draws[-1], PREDICTIVE_COLOR, f"{name}: one draw of the posterior predictive"),
    ):
        for percent, alpha in ((90, 0.15), (50, 0.25)):
            lower, upper = np.percentile(draws, [50 - percent / 2, 50 + percent / 2], axis=0)
            ax.fill_between(
                days,
                lower,
                upper,
                alpha=alpha,
                color=PREDICTIVE_COLOR,
                linewidth=0,
                label=f"{percent}% posterior predictive",
            )
        ax.plot(days, series, lw=1, color=color)
        ax.set_title(title, loc="left")
        ax.set(ylabel=f"Anomaly ({UNIT})", xlim=(days[0], days[-1]))
    draw_ax.set_xlabel("Day")
    above_right = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    data_ax.legend(ncols=2, frameon=False, **above_right)


def _plot_cells(ax: Axes, y: np.ndarray, replicates: np.ndarray) -> None:
    edges = np.linspace(y.min() - 0.2, y.max() + 0.2, 30)
    densities = [np.histogram(draw, edges, density=True)[0] for draw in replicates]
    lower, upper = np.percentile(densities, [5, 95], axis=0)
    ax.stairs(
        upper,
        edges,
        baseline=lower,
        fill=True,
        alpha=0.4,
        color=PREDICTIVE_COLOR,
        label="90% predictive",
    )
    density, _ = np.histogram(y, edges, density=True)
    ax.stairs(density, edges, lw=1.5, color=DATA_COLOR, label="data")
    ax.set_title("All cells", loc="left")
    ax.set(
        xlabel=f"Anomaly of the root of wind speed ({UNIT})",
        ylabel=f"Density (1 / {UNIT})",
        ylim=(0, 1.1 * upper.max()),
    )
    ax.legend(frameon=False)


def _plot_space(
    ax: Axes,
    anomalies: xr.DataArray,
    replicates: np.ndarray,
    posterior: dict[str, np.ndarray],
) -> None:
    distance = great_circle_distance(
        anomalies["latitude"].to_numpy(), anomalies["longitude"].to_numpy()
    )
    h = np.linspace(0, 1.05 * distance.max(), 200)[1:]
    variance: np.ndarray = posterior["sigma"] ** 2
    correlation = spatial_correlation(h[:, None], posterior["nu"], posterior["range"])
    _plot_fit(ax, h, variance * correlation)
    # The nugget sets the variance apart from the curve
    lower, median, upper = np.percentile(variance, [5, 50, 95])
    reach = [[median - lower], [upper - median]]
    ax.errorbar(0, median, reach, fmt="s", capsize=5, lw=2, color=FIT_COLOR, zorder=2)

    pairs = np.triu_indices_from(distance, 1)

    def empirical(x: np.ndarray) -> np.ndarray:
        """Mean variance of the stations, then the covariance of each pair: ``(s,t)->(k)``."""
        covariances = spatial_covariances(x)
        variances = np.diagonal(covariances, axis1=-2, axis2=-1)
        return np.concatenate(
            [variances.mean(axis=-1, keepdims=True), covariances[..., *pairs]], axis=-1
        )

    _plot_empirical(
        ax,
        np.append(0, distance[pairs]),
        empirical(anomalies.to_numpy()),
        empirical(replicates),
    )
    ax.set_title("Two stations, same day (at 0: variance)", loc="left")
    ax.set(
        xlabel="Great-circle distance (km)",
        ylabel="Covariance (m/s)",
        ylim=(0, None),
    )
    ax.legend(frameon=False, loc="lower left")


def _plot_time(
    ax: Axes, y: np.ndarray, replicates: np.ndarray, posterior: dict[str, np.ndarray]
) -> None:
    lags = range(min(PLOTTED_LAGS + 1, y.shape[-1]))
    u = np.linspace(0, lags[-1], 200)
    correlation = temporal_correlation(u[:, None], posterior["a"], posterior["alpha"])
    _plot_fit(ax, u, posterior["sigma"] ** 2 * correlation)
    _plot_empirical(
        ax, np.array(lags), temporal_covariances(y, lags), temporal_covariances(replicates, lags)
    )
    ax.set_title("Same station, two days (mean of stations)", loc="left")
    ax.set(xlabel="Lag (days)", ylabel="Covariance (m/s)")
    ax.legend(frameon=False)


def _plot_fit(ax: Axes, x: np.ndarray, draws: np.ndarray) -> None:
    """Draw a curve from its posterior draws, ``(n_points, n_draws)``."""
    lower, median, upper = np.percentile(draws, [5, 50, 95], axis=1)
    ax.fill_between(x, lower, upper, alpha=0.3, linewidth=0, color=FIT_COLOR, label="90% posterior")
    ax.plot(x, median, lw=1.5, color=FIT_COLOR, label="posterior median")


def _plot_empirical(ax: Axes, x: np.ndarray, observed: np.ndarray, replicated: np.ndarray) -> None:
    """Draw empirical covariances, ``(k,)``, and those of the replicates, ``(n_draws, k)``."""
    lower, upper = np.percentile(replicated, [5, 95], axis=0)
    ax.vlines(x, lower, upper, color=PREDICTIVE_COLOR, alpha=0.35, zorder=1, label="90% predictive")
    ax.plot(x, observed, "o", ms=4, color=DATA_COLOR, zorder=3, label="data")


def parse_options(argv: Sequence[str] | None, n_days: int) -> argparse.Namespace:
    """Read the command line; `n_days` is the number of days there are."""
    parser = argparse.ArgumentParser(
        prog="python -m pymc_kron",
        description="Fit a separable space x time model to daily wind at 11 stations in Ireland "
        "(the 12 of Haslett and Raftery (1989) without Rosslare), check it, and time it "
        "against the dense multivariate normal.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # R-hat needs 4 draws
    integer_options = (
        ("draws", 300, 4, None, "posterior draws a chain"),
        ("tune", 250, 0, None, "tuning steps a chain"),
        ("chains", 2, 1, None, "chains, which run in parallel"),
        ("days", 365, 2, n_days, "days from 1961-01-01 on"),
        ("seed", 1961, 0, None, "seed of all random numbers"),
    )
    for name, default, least, most, what in integer_options:
        parser.add_argument(
            f"--{name}", type=_integer(least, most), default=default, metavar="N", help=what
        )
    parser.add_argument(
        "--output", type=_png, default="irish_wind.png", metavar="FILE", help="the figure, a .png"
    )
    return parser.parse_args(argv)


def _integer(least: int, most: int | None) -> Callable[[str], int]:
    """Return a reader of integers within bounds, which belong to the range."""

    def read(text: str) -> int:
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        number = int(text) if text.removeprefix("-").isdecimal() else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be an integer, {bounds}, got {text!r}")
        return number

    return read


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file name ending in .png, in a folder that exists, got {text!r}"
        )
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration with the given command line, by default the program's own."""
    data = load_irish_wind()
    options = parse_options(argv, data.sizes["time"])
    rng = np.random.default_rng(options.seed)
    # Where chains are forked, `pymc.sample` ignores its `blas_cores`, and the BLAS threads of all
    # chains wait for one another: on 2 cores, 2 chains took three to ten times as long
    with threadpool_limits(limits=1, user_api="blas"):
        run(data, options, rng)


def run(data: xr.Dataset, options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Go through the steps of the job, and print what each finds."""
    all_anomalies = prepare(data)
    anomalies = all_anomalies.isel(time=slice(options.days))
    shape = anomalies.shape
    first, last = anomalies["time"].dt.strftime("%Y-%m-%d").to_numpy()[[0, -1]]
    deviation = math.sqrt((anomalies**2).mean())
    print(
        f"Data: daily wind at {shape[0]} stations in Ireland, {first} to {last}, "
        f"{shape[0]} x {shape[1]} = {anomalies.size:,} cells (without Rosslare).\n"
        "  y is the square root of the speed in m/s, less its annual cycle and the station's mean"
        f"\n  (both of 1961 to 1978); its standard deviation is {deviation:.2f} {UNIT}.\n\n"
        f"Model: y is normal with mean zero and a separable covariance,\n{FORMULA}\n"
    )

    model = build_model(anomalies)
    prior = pm.sample_prior_predictive(500, model=model, random_seed=rng)
    deviations = prior["prior_predictive"]["y"].std("cell")
    low, high = np.percentile(deviations, [5, 95])
    print(
        f"Prior predictive: a grid's standard deviation is between {low:.2f} and {high:.2f} "
        f"{UNIT} with probability 90%.\n"
    )

    trace = sample(model, draws=options.draws, tune=options.tune, chains=options.chains, rng=rng)
    summary = az.summary(trace, var_names=PARAMETERS, ci_prob=0.9)
    print(f"\nPosterior (sigma in {UNIT}, range in km):\n{summary.to_string()}\n")

    replicates = trace["posterior_predictive"]["y"].to_numpy().reshape(-1, *shape)
    coverage, table = predictive_check(anomalies, replicates)
    print(
        "Posterior predictive check:\n"
        f"  50% intervals hold {coverage[50]:.1%} of the cells, "
        f"90% intervals {coverage[90]:.1%}.\n"
        f"{table.to_string(float_format='{:.3f}'.format)}\n"
        "  5% and 95% bound what the model predicts; p is the probability of more than observed.\n"
        "  Weather comes from the west, but a separable covariance is symmetric in time: the lead\n"
        "  of west over east that it predicts is zero on average (Gneiting, 2002).\n"
    )

    posterior = {name: trace["posterior"][name].to_numpy().ravel() for name in PARAMETERS}
    plot(anomalies, replicates, posterior).savefig(options.output, dpi=150)
    print(f"Figure: {options.output}\n")

    timing = time_gradients(anomalies.isel(time=slice(DENSE_DAYS)))
    print(
        f"One log-density and gradient, {shape[0]} stations x {timing.n_days} days "
        f"({timing.n_cells} cells), median of {TIMED_CALLS} calls, one BLAS thread:\n"
        f"  pymc_kron.KroneckerMvNormal  {timing.factorwise * 1e3:9.3f} ms\n"
        f"  dense pymc.MvNormal          {timing.dense * 1e3:9.3f} ms, "
        f"{timing.dense / timing.factorwise:.0f} times as long\n"
        f"  The values agree to {timing.difference:.0e}, relatively. A dense covariance of all "
        f"{anomalies.size:,} cells would take {anomalies.size**2 * 8 / 1e6:,.0f} MB."
    )


if __name__ == "__main__":
    main()
