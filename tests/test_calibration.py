"""Posteriors are calibrated: slow, and recorded in ``docs/calibration.md``."""

import pytest

from tests import calibration


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", calibration.PATTERNS)
def test_ranks_are_uniform(name):
    ranks = calibration.ranks(calibration.PATTERNS[name], seed=0)
    p_values = {quantity: calibration.p_value(values) for quantity, values in ranks.items()}
    # Less than one in a hundred runs fails by chance
    assert min(p_values.values()) > 0.01 / len(p_values), p_values
