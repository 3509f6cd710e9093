import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit
from scipy.stats import multivariate_normal

from pymc_kron import load_irish_wind
from pymc_kron.__main__ import (
    build_model,
    great_circle_distance,
    main,
    predictive_check,
    prepare,
    quantities,
    spatial_covariances,
    temporal_covariances,
)
from tests.helpers import PY


@pytest.fixture(scope="module")
def data():
    return load_irish_wind()


@pytest.fixture(scope="module")
def anomalies(data):
    return prepare(data)


def test_main(tmp_path, capsys):
    figure = tmp_path / "wind.png"
    options = {"days": 20, "draws": 20, "tune": 20, "chains": 1, "seed": 3, "output": figure}
    main([f"--{name}={value}" for name, value in options.items()])
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for key in (
        "1961-01-01 to 1961-01-20, 11 x 20 = 220 cells",
        "K_time(u)  = 1 / (1 + a u^(2 alpha))",
        "Prior predictive: ",
        "ess_bulk",
        "r_hat",
        "90% intervals",
        "autocorrelation, lag 1 d",
        f"Figure: {figure}",
        "11 stations x 20 days (220 cells)",
        "times as long",
    ):
        assert key in printed


def test_prepare(data, anomalies):
    assert anomalies.dims == ("station", "time")
    assert anomalies.shape == (11, 6574)
    assert "ROS" not in anomalies["station"]
    assert anomalies.attrs["units"] == "sqrt(m/s)"
    assert_allclose(anomalies.mean("time"), 0, atol=1e-12)

    # The same cycle is removed at all stations
    removed = np.sqrt(data["wind"]).sel(station=anomalies["station"]) - anomalies
    cycle = removed - removed.mean("time")
    assert_allclose(cycle, np.broadcast_to(cycle[0], cycle.shape), atol=1e-12)


@pytest.mark.parametrize("harmonic", [1, 2])
def test_annual_cycle_is_removed(data, anomalies, harmonic):
    wave = np.exp(2j * np.pi * harmonic * np.arange(6574) / 365.25)
    before, after = (
        abs((x.mean("station").to_numpy() * wave).mean())
        for x in (np.sqrt(data["wind"]), anomalies)
    )
    assert before > 0.01
    assert after < 1e-4


def test_all_stations(data):
    assert prepare(data, leave_out=()).sizes["station"] == 12


def test_great_circle_distance():
    # London, Paris, the north pole
    distance = great_circle_distance(
        np.array([51.5074, 48.8566, 90.0]), np.array([-0.1278, 2.3522, 0.0])
    )
    assert_allclose(distance[0, 1], 343.56, atol=0.01)
    assert_allclose(distance[0, 2], 6371 * np.radians(90 - 51.5074))
    assert_allclose(distance, distance.T)
    assert (np.diag(distance) == 0).all()


def dense_covariance(anomalies, sigma, nu, range_km, a, alpha):
    """Fill in the covariance of the cells, entry by entry."""
    distance = great_circle_distance(
        anomalies["latitude"].to_numpy(), anomalies["longitude"].to_numpy()
    )
    cells = list(np.ndindex(anomalies.shape))
    cov = np.empty((len(cells), len(cells)))
    for i, (s, t) in enumerate(cells):
        for j, (s2, t2) in enumerate(cells):
            space = (1 - nu) * np.exp(-distance[s, s2] / range_km) + nu * (s == s2)
            cov[i, j] = sigma**2 * space / (1 + a * abs(t - t2) ** (2 * alpha))
    return cov


@pytest.mark.parametrize("dense", [False, True])
def test_model_against_scipy(anomalies, dense):
    grid = anomalies.isel(time=slice(9))
    model = build_model(grid, dense=dense)
    point = model.initial_point()
    cov = dense_covariance(
        grid,
        sigma=np.exp(point["sigma_log__"]),
        nu=expit(point["nu_logodds__"]),
        range_km=np.exp(point["range_log__"]),
        a=np.exp(point["a_log__"]),
        alpha=expit(point["alpha_logodds__"]),
    )
    logp = model.compile_logp(vars=[model["y"]], mode=PY)(point)
    expected = multivariate_normal(cov=cov).logpdf(grid.to_numpy().ravel())
    assert_allclose(logp, expected, rtol=1e-10)


def test_empirical_covariances():
    x = np.random.default_rng(5).normal(size=(2, 3, 4))
    for draw, space, time in zip(
        x, spatial_covariances(x), temporal_covariances(x, [0, 3]), strict=True
    ):
        assert_allclose(space[0, 2], np.mean(draw[0] * draw[2]))
        assert_allclose(time, [np.mean(draw**2), np.mean(draw[:, 0] * draw[:, 3])])


def test_quantities(anomalies):
    # Each day's field, the same at all stations west of Dublin, reaches it a day later
    field = np.tile([1.0, 1.0, -1.0, -1.0], 6)
    x = np.broadcast_to(field, (11, 24)).copy()
    x[anomalies["station"] == "DUB"] = np.roll(field, 1)
    result = quantities(x, anomalies)
    assert_allclose(result["standard deviation, sqrt(m/s)"], 1)
    assert_allclose(result["station deviations, max / min"], 1)
    assert_allclose(result["correlation, farthest: VAL-MAL, 427 km"], 1)
    # 23 pairs of days: all agree in one direction, in the other the sum of the signs is -23
    assert_allclose(result["lead of west over east: VAL, DUB"], 2)


def test_short_grids_have_no_long_lags(anomalies):
    grid = anomalies.isel(time=slice(2))
    names = quantities(grid.to_numpy(), grid)
    assert [name for name in names if "lag" in name] == ["autocorrelation, lag 1 d"]


def test_predictive_check(anomalies):
    grid = anomalies.isel(time=slice(100))
    rng = np.random.default_rng(8)
    replicates = rng.normal(size=(400, *grid.shape))
    calibrated, table = predictive_check(grid.copy(data=rng.normal(size=grid.shape)), replicates)
    assert_allclose([calibrated[50], calibrated[90]], [0.5, 0.9], atol=0.06)
    assert table["p"].between(0, 1).all()
    assert (table["5%"] < table["95%"]).all()

    narrow, table = predictive_check(grid.copy(data=2 * replicates[0]), replicates)
    assert narrow[90] < 0.7
    assert table.loc["standard deviation, sqrt(m/s)", "p"] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--days=1", "argument --days: must be an integer, between 2 and 6574, got '1'"),
        ("--days=6575", "argument --days: must be an integer, between 2 and 6574, got '6575'"),
        ("--days=x", "argument --days: must be an integer, between 2 and 6574, got 'x'"),
        ("--draws=3", "argument --draws: must be an integer, at least 4, got '3'"),
        ("--tune=-1", "argument --tune: must be an integer, at least 0, got '-1'"),
        ("--chains=0", "argument --chains: must be an integer, at least 1, got '0'"),
        ("--chains=1.5", "argument --chains: must be an integer, at least 1, got '1.5'"),
        ("--seed=-1", "argument --seed: must be an integer, at least 0, got '-1'"),
        ("--output=wind.jpg", "argument --output: must be a file name ending in .png"),
        ("--output=no/such/folder/wind.png", "in a folder that exists"),
    ],
)
def test_option_errors(capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        main([option])
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Rosslare" in capsys.readouterr().out
