"""Configuration of the documentation: ``python -m sphinx -W --keep-going docs build/docs``."""

import re
import shutil
from pathlib import Path

from docutils import nodes

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
author = "The adalora_jax authors"
copyright = author
release = adalora_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # in place of sphinx.ext.mathjax, which loads MathJax from elsewhere
    "sphinx_design",
    "sphinx_copybutton",
]
html_theme = "sphinx_book_theme"
html_title = "adalora_jax"
html_static_path = ["_static"]
html_css_files = ["style.css", "reference.css"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_show_sourcelink = False

# The tests run the notebooks; the site shows their stored outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# References to names of this package must exist; those to other packages are not checked, offline.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!adalora_jax).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Names that signatures show as they are written, not as the private classes or unions behind them.
autodoc_type_aliases = {
    name: name
    for name in (
        "Array",
        "ArrayLike",
        "DTypeLike",
        "Model",
        "PRNGKeyArray",
        "PrecisionLike",
        "PyTree",
    )
} | {"_Model": "Module", "AllocatorInfo": "AllocatorInfo"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Attributes:" as one list, not as an entry of the index for each.
napoleon_custom_sections = [("Attributes", "params_style")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def link_to_pages(app, docname, source):
    """Rewrite links that work in a checkout for the site, which has copies below ``docs/``."""
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../")
    up = "../" * docname.count("/")
    link = rf"(\]\(|\{{image\}} |\{{figure\}} )\.\./{re.escape(up)}(notebooks|benchmarks)/"
    source[0] = re.sub(link, rf"\1{up}\2/", source[0])


def shorten_signature(app, what, name, obj, options, signature, returns):
    """Write the types of a signature without the modules that hold them."""
    if not signature:
        return None
    if getattr(obj, "_is_protocol", False):
        return "", None
    patterns = {
        r"TypeAliasForwardRef\('(\w+)'\)": r"\1",
        r"dataclasses\.InitVar\[(.*?)\](?= = )": r"\1",
        r"~(?:\w+\.)+|collections\.abc\.": "",
        "<factory>": "...",
    }
    for pattern, short in patterns.items():
        signature = re.sub(pattern, short, signature)
        returns = returns and re.sub(pattern, short, returns)
    return signature, returns


def hide_private_names(app, doctree):
    """Show type variables as the class they stand for, and no private module before a name."""
    for text in list(doctree.findall(nodes.Text)):
        if text in ("_Model", "adalora_jax._src.core.monitor."):
            text.parent.replace(text, nodes.Text("Module" if text == "_Model" else ""))


def setup(app):
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("doctree-read", hide_private_names)
    app.connect("source-read", link_to_pages)
