"""Sphinx configuration: python -m sphinx -W -b html docs docs/_build."""

import os
import sys
from pathlib import Path

# Autodoc and the notebooks' kernels import this checkout.
ROOT = str(Path(__file__).parents[1])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = ROOT

from fmnist_jax.version import __version__  # noqa: E402 (needs the path)

project = "fmnist_jax"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]

default_role = "code"
napoleon_use_ivar = True
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
maximum_signature_line_length = 80

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"fmnist_jax {__version__}"


def _skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, which their class describes."""
    return skip or type(obj).__name__ == "_tuplegetter"


def setup(app):
    """Registers the hook."""
    app.connect("autodoc-skip-member", _skip_fields)
