import numpy as np
from numpy.testing import assert_allclose

import pymc_kron as pk


def test_irish_wind():
    dataset = pk.load_irish_wind()
    wind = dataset["wind"]
    assert wind.dims == ("station", "time")
    assert wind.shape == (12, 6574)
    assert not wind.isnull().any()
    assert wind.attrs["units"] == "m/s"
    assert str(wind["time"].values[0])[:10] == "1961-01-01"
    assert str(wind["time"].values[-1])[:10] == "1978-12-31"
    assert (np.diff(wind["time"]) == np.timedelta64(1, "D")).all()
    # 13.67 knots
    assert_allclose(wind.sel(station="DUB", time="1961-01-01"), 7.037316)


def test_irish_wind_stations_are_those_of_the_columns():
    # The station file has its own order, and its own mean wind to check it by
    dataset = pk.load_irish_wind()
    means = dataset["wind"].mean("time")
    published = {"VAL": 5.48, "BEL": 6.75, "MAL": 8.03, "KIL": 3.25, "DUB": 5.05}
    for station, mean in published.items():
        assert_allclose(means.sel(station=station), mean, rtol=0.01)
    assert dataset["station_name"].sel(station="MAL") == "Malin Head"
    assert_allclose(dataset["latitude"].sel(station="MAL"), 55.3667)
    assert_allclose(dataset["longitude"].sel(station="VAL"), -10.25)


def test_elnino():
    sst = pk.load_elnino()
    assert sst.dims == ("year", "month")
    assert sst.shape == (61, 12)
    assert not sst.isnull().any()
    assert sst.sel(year=1950, month=1) == 23.11
    assert sst.sel(year=2010, month=12).dtype == "float64"
    assert list(sst["year"].values[[0, -1]]) == [1950, 2010]
