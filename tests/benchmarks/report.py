"""The tables and the plot of the results, for ``docs/benchmarks.md``."""

import json
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tests.benchmarks import peers
from tests.benchmarks.measure import WORKS

IMPLEMENTATIONS = [
    "KroneckerMvNormal",
    "pm.KroneckerNormal",
    "pm.MatrixNormal",
    "GPyTorch",
    "TFP",
    "NumPyro",
    "JAX by hand",
]
WITH_HOLES = {
    "smooth": "squared exponential in time, noise",
    "rough": "exponential in time, no noise",
}
LATENT = {"bernoulli": "Bernoulli", "poisson": "Poisson", "counts": "Poisson"}
DTYPES = ["float64", "float32"]
MEDIANS = ("ess", "gradients")
GRADIENTS = [work for work in WORKS.values() if work.with_gradient]


def write(results: Path, docs: Path):
    """Write the tables into the page, each between its marks, and draw the plot."""
    files = {
        path.relative_to(results).with_suffix("").as_posix(): json.loads(path.read_text())
        for path in sorted(results.rglob("*.json"))
    }
    parts = {part: content["results"] for part, content in files.items()}
    ratios = Ratios(parts)
    texts = {
        "provenance": provenance(files.values()),
        "ratios": ratios_table(ratios),
        "growth": growth_table(ratios, parts.get("memory", [])),
        "draws": draws_table(parts),
        "predictive": predictive_table(parts),
        "elnino": elnino_table(parts),
        "cold": cold_table(parts),
        "solve": solve_table(parts),
        "missing": missing_table(parts),
        "non-centred": non_centred_table(parts),
        "latent": latent_table(parts),
        "on-jax": on_jax_table(parts),
        "devices": devices_table(parts),
    }
    page = docs / "benchmarks.md"
    text = page.read_text()
    for name, new in texts.items():
        between = re.compile(f"(<!-- {name} -->\\n).*?(<!-- end -->\\n)", re.DOTALL)
        text = between.sub(lambda match, new=new: f"{match[1]}\n{new}\n{match[2]}", text)
    page.write_text(text)
    plot(ratios, docs / "images" / "benchmarks.png")


class Ratios:
    """Seconds of the limit beside the distributions of PyMC, and ratios to the limit of all."""

    def __init__(self, parts):
        self.seconds, self.ratios = {}, {}
        for work in WORKS.values():
            for folder in ("distributions", *peers.PEERS):
                for cell in parts.get(f"{folder}/{work.slug}", []):
                    sizes, seconds = tuple(cell["sizes"]), dict(cell["seconds"])
                    reference = seconds.pop("limit")
                    if folder == "distributions":
                        self.seconds[work, sizes] = reference
                    for name, value in seconds.items():
                        self.ratios[work, sizes, name] = value / reference

    def grids(self, work):
        return [sizes for other, sizes in self.seconds if other == work]


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def grid(sizes):
    return " x ".join(map(str, sizes))


def microseconds(seconds):
    return f"{seconds * 1e6:,.0f}"


def ratio(value):
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def provenance(files):
    dates = sorted({content["date"] for content in files})
    machines = sorted({content["machine"] for content in files})
    kernels = sorted({kernel for content in files for kernel in content["kernels"]})
    versions = {}
    for content in files:
        for package, version in content["versions"].items():
            versions.setdefault(package, set()).add(version)
    packages = ", ".join(
        f"{package} {' and '.join(sorted(numbers))}" for package, numbers in versions.items()
    )
    return (
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, {' and '.join(machines)} "
        f"(OpenBLAS kernels: {', '.join(kernels)}), float64, one thread. {packages}.\n"
    )


def ratios_table(ratios):
    rows = [
        [
            f"{work}, {grid(sizes)}",
            microseconds(ratios.seconds[work, sizes]),
            *(ratio(ratios.ratios.get((work, sizes, name))) for name in IMPLEMENTATIONS),
        ]
        for work in WORKS.values()
        for sizes in ratios.grids(work)
    ]
    return table(["work", "limit, us", *IMPLEMENTATIONS], rows)


def growth_table(ratios, memory):
    arrays = {(entry["noisy"], tuple(entry["sizes"])): entry["arrays"] for entry in memory}
    rows, exponents = [], []
    for work in GRADIENTS:
        cubes = [sizes for sizes in ratios.grids(work) if len(sizes) == 3]
        Ns = list(map(math.prod, cubes))
        times = [
            ratios.ratios[work, sizes, "KroneckerMvNormal"] * ratios.seconds[work, sizes]
            for sizes in cubes
        ]
        for sizes, N, seconds in zip(cubes, Ns, times, strict=True):
            peak = arrays.get((work.noisy, sizes))
            rows.append(
                [work, f"{N:,}", microseconds(seconds), "" if peak is None else f"{peak:.1f}"]
            )
        if len(cubes) > 1:
            exponent, _ = np.polyfit(np.log(Ns), np.log(times), 1)
            exponents.append(f"{exponent:.2f} ({work})")
    header = ["work", "N", "us", "peak memory, arrays of N doubles"]
    return table(header, rows) + f"\nTime grows as N to the power {', '.join(exponents)}.\n"


def draws_table(parts):
    rows = [
        [
            grid(cell["sizes"]),
            f"{1 / cell['seconds']['KroneckerMvNormal']:,.0f}",
            *(
                ratio(cell["seconds"]["KroneckerMvNormal"] / cell["seconds"][name])
                for name in ("limit", "product")
            ),
        ]
        for cell in parts.get("draws", {"grids": []})["grids"]
    ]
    header = ["cells", "draws a second", "time, in draws of SciPy", "in products alone"]
    return table(header, rows)


def predictive_table(parts):
    rows = []
    for work, seconds in parts.get("draws", {"predictive": {}})["predictive"].items():
        ours, theirs = seconds.values()
        rows.append([work, f"{ours * 1e3:,.0f}", f"{theirs * 1e3:,.0f}", ratio(theirs / ours)])
    return table(["", "`KroneckerMvNormal`, ms", "`pm.KroneckerNormal`, ms", "ratio"], rows)


def elnino_table(parts):
    rows = [
        [
            f"`{name}`",
            f"{run['ess'] / run['seconds']:.2f}",
            f"{run['ess']:.0f}",
            f"{run['seconds']:.0f}",
            f"{run['sampling']:.0f}",
            f"{run['gradients']:,}",
            f"{run['r_hat']:.3f}",
            run["divergences"],
        ]
        for name in IMPLEMENTATIONS
        if (run := parts.get(f"elnino/{name}"))
    ]
    header = [
        "",
        "ESS a second",
        "least ESS",
        "s",
        "of them sampling",
        "gradients",
        "R-hat",
        "divergences",
    ]
    return table(header, rows)


def cold_table(parts):
    works = {"logp-and-gradient": "no noise, s", "noisy-logp-and-gradient": "noise, s"}
    rows = []
    for name in IMPLEMENTATIONS[:3]:
        runs = [parts.get(f"cold/{work}/{name}") for work in works]
        rows.append(
            [f"`{name}`", *("" if run is None else f"{run['seconds']:.1f}" for run in runs)]
        )
    return table(["", *works.values()], rows)


def solve_table(parts):
    rows = []
    for cell in parts.get("solve", []):
        n, (without, bundle) = cell["n"], cell["seconds"].values()
        rows.append(
            [n, f"{n**2:,}", *map(microseconds, (bundle, without)), ratio(without / bundle)]
        )
    return table(["n", "N", "with the bundle, us", "without, us", "ratio"], rows)


def missing_table(parts):
    rows = []
    for name, field in WITH_HOLES.items():
        for cell in parts.get(f"missing/{name}", []):
            imputed, marginal = cell["runs"].values()
            rates = [run["ess"] / run["seconds"] for run in (imputed, marginal)]
            missing = (
                f"{cell['what']} ({cell['missing']})" if "row" in cell["what"] else cell["what"]
            )
            rows.append(
                [
                    field,
                    missing,
                    *(f"{run['gradient'] * 1e3:.2f}" for run in (imputed, marginal)),
                    *(f"{rate:,.1f}" for rate in rates),
                    ratio(rates[1] / rates[0]),
                    *(f"{run['gradients']:,}" for run in (imputed, marginal)),
                    f"{max(run['r_hat'] for run in (imputed, marginal)):.3f}",
                ]
            )
    header = ["field", "missing", "gradient imputed, ms", "integrated out, ms"]
    header += ["ESS a second imputed", "integrated out", "ratio"]
    return table([*header, "gradients imputed", "integrated out", "worst R-hat"], rows)


def non_centred_table(parts):
    rows = []
    for name, observations in LATENT.items():
        if (part := parts.get(f"non_centred/{name}")) is None:
            continue
        rates = {}
        for transform, runs in part["runs"].items():
            rates[transform] = np.median([run["ess"] / run["seconds"] for run in runs])
            rows.append(
                [
                    f"{observations}, mean {part['mean']:.2g}",
                    transform,
                    f"{rates[transform]:,.1f}",
                    ratio(rates[transform] / rates["centred"]),
                    *(f"{np.median([run[key] for run in runs]):,.0f}" for key in MEDIANS),
                    f"{max(run['r_hat'] for run in runs):.3f}",
                    max(run["divergences"] for run in runs),
                    "" if transform == "centred" else f"{part['difference']:.1f}",
                ]
            )
    header = ["data", "", "ESS a second", "ratio", "least ESS", "gradients"]
    return table([*header, "worst R-hat", "most divergences", "largest difference"], rows)


def latent_table(parts):
    rows = [
        [
            f"{cell['n']} x {cell['n']}",
            *(f"{1e3 * seconds:.3f}" for seconds in cell["seconds"].values()),
            f"{cell['basis functions']:,}",
        ]
        for cell in parts.get("latent", [])
    ]
    names = [
        f"{name}, ms" for name in ("`KroneckerMvNormal`", "`pm.gp.LatentKron`", "`pm.gp.HSGP`")
    ]
    return table(["cells", *names, "basis functions"], rows)


def on_jax_table(parts):
    runs = {dtype: parts[f"on_jax/{dtype}"] for dtype in DTYPES if f"on_jax/{dtype}" in parts}
    if list(runs) != DTYPES:
        return ""
    rows = []
    for cells in zip(*(runs[dtype]["grids"] for dtype in DTYPES), strict=True):
        N = math.prod(cells[0]["sizes"])
        limit, *times = cells[0]["seconds"].values()
        times = [limit, *times, *list(cells[1]["seconds"].values())[1:]]
        times = [f"{1e3 * t:,.0f}" if t > 0.1 else f"{1e3 * t:.3g}" for t in times]
        gibibytes = [f"{cell['bytes'] / 2**30:.2g}" for cell in cells]
        errors = [f"{error:.0e}" for error in cells[1]["errors"]]
        noise = "noise" if cells[0]["work"].startswith("noisy") else ""
        rows.append([grid(cells[0]["sizes"]), f"{N:,}", noise, *times, *gibibytes, *errors])
    header = ["grid", "N", "", "limit, ms"]
    header += [f"{work}, {dtype}, ms" for dtype in DTYPES for work in ("logp", "and gradient")]
    header += [f"GiB, {dtype}" for dtype in DTYPES]
    header += ["error of logp, float32", "of the gradient"]
    devices = " and ".join(dict.fromkeys(run["device"] for run in runs.values()))
    return f"On {devices}.\n\n{table(header, rows)}"


def devices_table(parts):
    rows = []
    for cell in parts.get("devices", []):
        N = math.prod(cell["sizes"])
        part = 8 * N / cell["devices"]
        noise = "noise" if cell["noisy"] else ""
        held = cell["bytes"]
        rows.append([f"{N:,}", noise, cell["devices"], f"{held / 2**20:.0f}", f"{held / part:.1f}"])
    header = ["N", "", "devices", "MiB a device", "arrays of N / devices doubles"]
    return table(header, rows)


def plot(ratios, path):
    """Draw the ratios to the limit against n: a row a number of factors, a column a work."""
    figure, axes = plt.subplots(
        2, len(WORKS), figsize=(15, 7.5), sharey=True, sharex="row", layout="constrained"
    )
    lines = {}
    for row, (factors, shape) in enumerate([(2, "n x n"), (3, "n x n x n")]):
        for ax, work in zip(axes[row], WORKS.values(), strict=True):
            grids = [sizes for sizes in ratios.grids(work) if len(sizes) == factors]
            for i, name in enumerate(IMPLEMENTATIONS):
                points = {
                    sizes[0]: ratios.ratios[work, sizes, name]
                    for sizes in grids
                    if (work, sizes, name) in ratios.ratios
                }
                if points:
                    width = 3 if name == "KroneckerMvNormal" else 1.2
                    style = {
                        "zorder": 3 if width > 2 else 2,
                        "color": f"C{i}",
                        "marker": "osD^vPX"[i],
                        "linewidth": width,
                    }
                    [lines[name]] = ax.plot(points.keys(), points.values(), **style)
            ax.axhline(1, color="black", linestyle="--", linewidth=1)
            ax.set(xscale="log", yscale="log", title=f"{work}, {shape}", xlabel="n")
            ticks = [sizes[0] for sizes in grids]
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("time, as a ratio to the limit")
        ax.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    names = [name for name in IMPLEMENTATIONS if name in lines]
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
