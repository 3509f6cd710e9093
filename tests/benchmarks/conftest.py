import pytest

# Loads the BLAS that compiled functions call: a limit finds only what is loaded
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield
