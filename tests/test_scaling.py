"""Chains and grids on a cluster of processes, as `docs/scaling.md` has them."""

from pathlib import Path

import numpy as np
import pytest

from tests.test_project import MARKDOWN_BLOCK

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def page(name):
    """Return what the first block of the page defines, in a module of this name."""
    namespace = {"__name__": name}
    exec(MARKDOWN_BLOCK.findall(PAGE.read_text())[0], namespace)
    return namespace


def test_chains_and_grids_on_two_processes():
    distributed = pytest.importorskip("distributed")
    recipe = page("recipe")
    # Compiles in a second, and samples slowly
    quick = {"draws": 20, "tune": 20, "nuts_sampler": "pymc", "compute_convergence_checks": False}
    quick["compile_kwargs"] = {"mode": "FAST_COMPILE"}
    grids = np.random.default_rng(1).normal(size=(2, 3, 4))
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        chains = client.map(recipe["sample_chain"], [1, 2], y=grids[0], **quick)
        other = client.submit(recipe["sample_chain"], 1, grids[1], **quick)
        *chains, other = client.gather([*chains, other])
    idata = recipe["joined"](chains)
    assert idata["posterior"].sizes["chain"] == 2
    assert idata["posterior"]["chain"].values.tolist() == [0, 1]
    assert idata["observed_data"]["y"].dims == chains[0]["observed_data"]["y"].dims
    first, second = idata["posterior"]["length_scale"].values
    assert (first != second).any()
    assert (first != other["posterior"]["length_scale"].values[0]).any()


@pytest.mark.nightly
def test_the_recipe_itself():
    pytest.importorskip("distributed")
    idata = page("__main__")["idata"]
    assert idata["posterior"].sizes["chain"] == 2
    assert (np.abs(idata["posterior"]["length_scale"].mean("chain")) > 0).all()
