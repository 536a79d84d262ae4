"""Sphinx configuration: python -m sphinx -W -b html docs docs/_build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # autodoc documents this checkout

from fmnist_jax.version import __version__

project = "fmnist_jax"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

# Docstrings are written in Google style with Markdown's `code`.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

html_theme = "furo"
html_title = f"fmnist_jax {__version__}"
