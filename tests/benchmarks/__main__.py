"""Run the benchmarks, and write their tables and plot into ``docs``.

``uv run python -m tests.benchmarks [PART ...]``

Each part runs in a process of its own, takes a few minutes and leaves a file of results. A part
that has left one is not run again: what was stopped is resumed. Without arguments all parts run;
a part or a folder of parts runs these alone. The tables are made from all results that are there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import peers, report
from tests.benchmarks.measure import WORKS

ROOT = Path(__file__).parents[2]

THREADS = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
# What keeps OpenBLAS from the kernels of the processor
KERNELS = ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"]

OURS = ["KroneckerMvNormal", "pm.KroneckerNormal"]
COLD = {"logp-and-gradient": [*OURS, "pm.MatrixNormal"], "noisy-logp-and-gradient": OURS}

# The module of each part, and its arguments
PARTS = {
    **{f"distributions/{work}": ("distributions", work) for work in WORKS},
    **{f"elnino/{name}": ("elnino", name) for name in OURS},
    **{
        f"cold/{work}/{name}": ("cold", name, work)
        for work, names in COLD.items()
        for name in names
    },
    **{part: (part,) for part in ("draws", "latent", "memory", "solve", "devices")},
    **{f"missing/{name}": ("missing", name) for name in report.WITH_HOLES},
    **{f"non_centred/{name}": ("non_centred", name) for name in report.LATENT},
    **{f"on_jax/{dtype}": ("on_jax", dtype) for dtype in report.DTYPES},
    **{f"{peer}/{work}": (f"peers.{peer}", work) for peer in peers.PEERS for work in WORKS},
}


def run(part: str, output: Path):
    module, *arguments = PARTS[part]
    peer = module.removeprefix("peers.")
    python = peers.python(peer) if peer in peers.PEERS else sys.executable
    environment = {key: value for key, value in os.environ.items() if key not in KERNELS}
    environment |= dict.fromkeys(THREADS, "1")
    command = [python, "-m", f"tests.benchmarks.{module}", *arguments, output]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        epilog="\n".join(["parts:", *(f"  {part}" for part in PARTS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="a part, or a folder of parts")
    parser.add_argument(
        "--results", type=Path, default=ROOT / ".benchmarks", help="the folder of results"
    )
    options = parser.parse_args()
    chosen = [
        part
        for part in PARTS
        if not options.parts or any(f"{part}/".startswith(f"{name}/") for name in options.parts)
    ]
    if not chosen:
        parser.error(f"no such part; the parts are {', '.join(PARTS)}")
    for part in chosen:
        output = options.results.absolute() / f"{part}.json"
        if not output.exists():
            print(part, flush=True)
            run(part, output)
    report.write(options.results, ROOT / "docs")


if __name__ == "__main__":
    main()
