"""The documentation site.

Its source folder is the repository, so that notebooks and changelog are pages where they are, and
a link leads to the same file here and on a code host. ``developer/documentation.md`` says more.
"""

import inspect
from pathlib import Path

from sphinx.util.inspect import stringify_signature

import pymc_kron

project = "pymc_kron"
author = "The pymc_kron developers"
version = release = pymc_kron.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "C*.md"]
exclude_patterns = [".*", "docs/_*"]
# Absolute, since autosummary looks from the source folder and HTML from this one
templates_path = [str(Path(__file__).parent / "_templates")]

# The tests execute notebooks and blocks of code; the pages show the outputs that are committed
nb_execution_mode = "off"
myst_heading_anchors = 3

default_role = "autolink"
autodoc_typehints = "none"
numpydoc_show_class_members = False
# "all" but these. Not every text needs more than its first line or a See Also (ES01, SA01), and the
# tests look for examples (EX01). Distributions document what `dist` takes, results their
# attributes (PR01, PR02), and parameters as of another function have the types that they have
# there (PR04)
numpydoc_validation_checks = {"all", "ES01", "EX01", "PR01", "PR02", "PR04", "SA01"}

OTHER_PROJECTS = {
    "arviz": "https://python.arviz.org/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pymc": "https://www.pymc.io/projects/docs/en/stable/",
    "pytensor": "https://pytensor.readthedocs.io/en/latest/",
    "xarray": "https://docs.xarray.dev/en/stable/",
}
# Where the web can't be reached, as in CI, the inventory without names is taken: names of other
# projects are no links then, and that isn't a warning
intersphinx_mapping = {
    name: (url, (None, "docs/no_names.inv")) for name, url in OTHER_PROJECTS.items()
}
# Names of this package that lead nowhere are errors. Those of the others can't be checked where
# their inventories can't be reached
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"({'|'.join(OTHER_PROJECTS)})\..*")]

html_theme = "pydata_sphinx_theme"
html_title = f"pymc_kron {release}"
html_extra_path = ["_site"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {"header_links_before_dropdown": 5}
# Pages of the first level have no section to navigate, but for those that are one
SECTION = ["sidebar-nav-bs"]
html_sidebars = {"C*": [], "docs/*": []}
html_sidebars |= dict.fromkeys(["docs/api", "docs/migration", "docs/notebooks"], SECTION)


def show_parameters(app, what, name, obj, options, signature, return_annotation):
    """Give a distribution the signature with which it is called: a name, and what `dist` takes."""
    if what == "class" and hasattr(obj, "dist"):
        called = inspect.signature(obj)
        parameters = [called.parameters["name"], *inspect.signature(obj.dist).parameters.values()]
        signature = stringify_signature(
            called.replace(parameters=parameters), show_annotation=False
        )
    return signature, return_annotation


def setup(app):
    app.connect("autodoc-process-signature", show_parameters)
