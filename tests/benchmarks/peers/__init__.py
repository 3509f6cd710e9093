"""The other libraries, each in an environment of its own."""

import os
import subprocess
import tempfile
from pathlib import Path

# A module of this package, the Python it runs on and what it needs
PEERS = {
    # uv takes the build for CPUs where UV_TORCH_BACKEND=cpu or UV_FIND_LINKS says where it is
    "gpytorch_kronecker": ("3.11", ["gpytorch", "torch==2.13.0"]),
    "tfp_kronecker": ("3.12", ["jax", "tfp-nightly"]),
    "numpyro_matrixnormal": ("3.12", ["numpyro"]),
    "jax_by_hand": ("3.12", ["jax"]),
}


def python(peer: str) -> str:
    """Return the Python of a peer's environment, made if it isn't there, in a temporary folder."""
    version, packages = PEERS[peer]
    environment = Path(tempfile.gettempdir()) / "pymc_kron-peers" / peer
    uv = os.environ.get("UV", "uv")
    executable = environment / "bin" / "python"
    packages = [*packages, "numpy", "scipy", "threadpoolctl"]
    for command in (
        [uv, "venv", "--quiet", "--allow-existing", "--python", version, environment],
        [uv, "pip", "install", "--quiet", "--python", executable, *packages],
    ):
        subprocess.run(command, check=True)
    return str(executable)
