"""Real data on grids, shipped with the package.

The files are described in ``README.md`` beside them.
"""

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

KNOTS_TO_M_S = 0.5148


def load_irish_wind() -> xr.Dataset:
    """Load daily wind speeds at 12 stations in Ireland, 1961 to 1978.

    Returns
    -------
    xarray.Dataset
        ``wind``, the daily average wind speed in m/s, with dims ``("station", "time")`` and
        shape (12, 6574), without missing cells; and along ``station`` the coords ``latitude``
        and ``longitude`` in decimal degrees and ``station_name``.

    References
    ----------
    .. [1] Haslett, J. and Raftery, A. E. (1989). "Space-time modelling with long-memory
       dependence: assessing Ireland's wind power resource". Applied Statistics 38, 1-50.

    Examples
    --------
    .. code-block:: python

        import pymc_kron as pk

        wind = pk.load_irish_wind()["wind"]
        wind.sel(station="DUB", time="1961-01-01").item()  # 7.04 m/s
    """
    knots = _read_csv("irish_wind.csv", index_col="date", parse_dates=["date"])
    stations = _read_csv("irish_wind_stations.csv", index_col="code").loc[knots.columns]
    return xr.Dataset(
        {
            "wind": (
                ("station", "time"),
                knots.to_numpy().T * KNOTS_TO_M_S,
                {"long_name": "daily average wind speed", "units": "m/s"},
            )
        },
        coords={
            "station": knots.columns.to_numpy(dtype=str),
            "time": knots.index.to_numpy(),
            "station_name": ("station", stations["station"].to_numpy(dtype=str)),
            "latitude": ("station", stations["lat"].to_numpy(), {"units": "degrees_north"}),
            "longitude": ("station", stations["lon"].to_numpy(), {"units": "degrees_east"}),
        },
    )


def load_elnino() -> xr.DataArray:
    """Load monthly sea surface temperatures of the eastern tropical Pacific, 1950 to 2010.

    Returns
    -------
    xarray.DataArray
        The temperature in degrees Celsius in the Niño 1+2 region, with dims
        ``("year", "month")`` and shape (61, 12), without missing cells.

    References
    ----------
    .. [1] NOAA Climate Prediction Center, monthly sea surface temperature indices, as
       distributed with statsmodels.

    Examples
    --------
    .. code-block:: python

        import pymc_kron as pk

        sst = pk.load_elnino()
        sst.sel(year=1950, month=1).item()  # 23.11 degrees Celsius
    """
    table = _read_csv("elnino.csv", index_col="YEAR")
    return xr.DataArray(
        table.to_numpy(),
        dims=("year", "month"),
        coords={"year": table.index.to_numpy(), "month": np.arange(1, 13)},
        name="sst",
        attrs={"long_name": "sea surface temperature", "units": "degree_Celsius"},
    )


def _read_csv(name: str, **kwargs: Any) -> pd.DataFrame:
    with files(__name__).joinpath(name).open() as file:
        return pd.read_csv(file, **kwargs)
