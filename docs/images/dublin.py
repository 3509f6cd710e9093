"""The picture of the first page: wind in Dublin, predicted from eleven other stations.

The model is that of the page on prediction, at the means of its posterior.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pymc as pm

import pymc_kron as pk

LEVEL, AMPLITUDE, RANGE_KM, DAYS, SIGMA = 2.72, 0.8, 764.0, 4.3, 0.129


def predict(wind):
    """Return mean and standard deviation of the root of the wind in Dublin, in sqrt(m/s)."""
    is_new = (wind["station"] == "DUB").values
    degrees = np.array([wind["longitude"] * np.cos(np.deg2rad(53)), wind["latitude"]])
    position = 6371 * np.deg2rad(degrees).T
    distance = np.linalg.norm(position[:, None] - position, axis=-1)
    K_space = AMPLITUDE**2 * np.exp(-distance / RANGE_KM)
    lag = np.abs(np.subtract.outer(np.arange(wind.sizes["time"]), np.arange(wind.sizes["time"])))
    with pm.Model():
        covs = [K_space[~is_new][:, ~is_new], np.exp(-lag / DAYS)]
        observed = np.sqrt(wind.values[~is_new])
        y = pk.TensorNormal("y", LEVEL, covs, sigma=SIGMA, observed=observed)
        dublin = pk.conditional(
            "dublin",
            y,
            cross_covs=[K_space[is_new][:, ~is_new], None],
            new_covs=[K_space[is_new][:, is_new], None],
            mu=LEVEL,
            sigma=SIGMA,
        )
        mean, variance = pm.draw([dublin.mean, dublin.variance])
    return mean[0], np.sqrt(variance[0])


def draw(wind):
    mean, deviation = predict(wind)
    low, high = np.maximum(mean - 1.645 * deviation, 0) ** 2, (mean + 1.645 * deviation) ** 2
    figure, (place, days) = plt.subplots(
        1, 2, figsize=(10, 3.4), width_ratios=[1, 2.6], layout="constrained"
    )
    others, dublin = wind.drop_sel(station="DUB"), wind.sel(station="DUB")
    place.plot(others["longitude"], others["latitude"], "o", color="0.3")
    place.plot(dublin["longitude"], dublin["latitude"], "o", color="tab:orange")
    at = dublin["longitude"].item(), dublin["latitude"].item()
    place.annotate("Dublin", at, (4, 6), textcoords="offset points", color="tab:orange", ha="right")
    place.set(xlabel="longitude (degrees east)", ylabel="latitude (degrees north)")
    place.set_aspect(1 / np.cos(np.deg2rad(53)))
    place.set_title("12 stations in Ireland")

    day = wind["time"].dt.day
    inside = ((low <= dublin) & (dublin <= high)).sum().item()
    days.fill_between(day, low, high, color="tab:orange", alpha=0.25, lw=0, label="90% interval")
    days.plot(day, mean**2, color="tab:orange", label="predicted from the other stations")
    days.plot(day, dublin, "o", color="black", ms=4, label="measured")
    days.set(xlabel="day of January 1961", ylabel="wind in Dublin (m/s)", ylim=(0, 16))
    days.set_title(f"{inside} of {len(day)} days in the interval")
    days.legend(frameon=False, ncols=3, loc="upper center")
    return figure


if __name__ == "__main__":
    _, path = sys.argv
    draw(pk.load_irish_wind()["wind"].sel(time="1961-01")).savefig(path, dpi=150)
