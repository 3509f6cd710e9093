"""What is written about the package, against the package."""

import inspect
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import pymc_kron
import pymc_kron.dims
import pymc_kron.sharding
from tests.helpers import run_python

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(pymc_kron, name) for name in pymc_kron.__all__}
DOCUMENTED = {
    **PUBLIC,
    "dims.KroneckerMvNormal": pymc_kron.dims.KroneckerMvNormal,
    "transforms.whiten": pymc_kron.transforms.whiten,
    "sharding.sharded_logp": pymc_kron.sharding.sharded_logp,
}
# What `explain` returns
RESULTS = [
    "Explanation",
    "Fired",
    "DenseProduct",
    "Distribution",
    "SharedScale",
    "ScaledFactor",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILT = ROOT / "docs" / "_build"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if BUILT not in page.parents),
]

MARKDOWN_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
AUTOSUMMARY_BLOCK = re.compile(r"^\.\. autosummary::\n {3}:.*\n\n((?: {3}.*\n)*)", re.MULTILINE)
DOCSTRING_BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:(?: {4}.*)?\n?)*)", re.MULTILINE)


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [newest, *_] = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    [cited] = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project["version"] == pymc_kron.__version__ == newest == cited


def test_the_reference_names_what_is_public():
    blocks = AUTOSUMMARY_BLOCK.findall((ROOT / "docs/api.md").read_text())
    named = [name for block in blocks for name in block.split()]
    results = [f"diagnostics.{name}" for name in RESULTS]
    assert sorted(named) == sorted([*DOCUMENTED, *results])


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_docstrings_have_examples_that_run(name):
    blocks = DOCSTRING_BLOCK.findall(inspect.getdoc(DOCUMENTED[name]))
    assert blocks
    namespace = {}
    for block in blocks:
        exec(inspect.cleandoc(block), namespace)


# PyMC's MatrixNormal
@pytest.mark.filterwarnings("ignore:pytensor.tensor.linalg.trace is deprecated")
@pytest.mark.documentation
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_code_that_runs_and_links_that_lead_somewhere(page):
    text = page.read_text()
    namespace = {}
    for block in MARKDOWN_BLOCK.findall(text):
        exec(block, namespace)
    for target in re.findall(r"\]\(([^)#]+)\)", MARKDOWN_BLOCK.sub("", text)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.documentation
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    script = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    # Where nothing else has started threads before chains fork
    run_python("-c", script, MPLBACKEND="agg")


def test_the_picture_of_the_first_page_shows_predictions_that_hold(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    picture = runpy.run_path(ROOT / "docs" / "images" / "dublin.py")
    figure = picture["draw"](pymc_kron.load_irish_wind()["wind"].sel(time="1961-01"))
    _place, days = figure.axes
    assert days.get_title() == "29 of 31 days in the interval"


def test_the_rewrites_page_names_every_rewrite():
    text = (ROOT / "docs/background/rewrites.md").read_text()
    rewriting = pymc_kron.rewriting
    for name in rewriting.kron_rewrites_db._names | rewriting.as_written_rewrites_db._names:
        assert f"| `{name}` |" in text


def test_no_file_of_the_repository_records_a_download_address():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "uv.lock" in ignored
