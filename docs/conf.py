"""Configuration of the documentation: ``python -m sphinx -W --keep-going docs build/docs``."""

import shutil
from pathlib import Path

import adalora_jax

# Sphinx reads pages below its own folder only.
HERE = Path(__file__).parent
for folder in ("notebooks", "benchmarks"):
    shutil.rmtree(HERE / folder, ignore_errors=True)
    (HERE / folder).mkdir()
    for file in (HERE.parent / folder).iterdir():
        if file.suffix in {".ipynb", ".md", ".png"}:
            shutil.copy2(file, HERE / folder)

project = "adalora_jax"
copyright = "The adalora_jax authors"
release = adalora_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_design",
    "sphinx_copybutton",
]
html_theme = "sphinx_book_theme"
html_title = "adalora_jax"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_show_sourcelink = False

# The tests run the notebooks; the site shows their stored outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def link_to_pages(app, docname, source):
    """Rewrite a notebook's links to ``docs/``, which work in a checkout, for the site."""
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../")


def setup(app):
    app.connect("source-read", link_to_pages)
