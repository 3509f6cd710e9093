"""The tests in `tests.two_devices`, in a process that has two devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

HERE = Path(__file__).parent


def run(*arguments):
    flags = "--xla_force_host_platform_device_count=2"
    command = [sys.executable, "-m", "pytest", "-n0", HERE / "two_devices.py", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_on_two_devices():
    run()


@pytest.mark.nightly
def test_more_models_on_two_devices():
    run("-m", "nightly")
