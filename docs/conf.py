"""The site: `make docs` builds it into build/docs, and every warning is an error."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import figures

import fused_attn

project = "fused_attn"
version = release = fused_attn.__version__
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "fused_attn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"
smartquotes = False  # an error is searched for as it was printed
autodoc_typehints = "none"  # shapes and meanings are in the docstrings; signatures stay readable on a phone
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def in_rest(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings have `code` and formulas; what reStructuredText would take for markup is escaped."""
    for at, line in enumerate(lines):
        spans = re.split(r"(`[^`]+`)", line)
        spans[::2] = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", text) for text in spans[::2]]
        spans[1::2] = [f"`{span}`" for span in spans[1::2]]
        lines[at] = "".join(spans)


class PictureDirective(SphinxDirective):
    """A picture of figures.py, drawn when the page is built; what follows its name are stored results."""

    required_arguments, optional_arguments, final_argument_whitespace, has_content = 1, 1, True, True

    def run(self) -> list[nodes.Node]:
        name, *given = " ".join(self.arguments).split()
        note_results(self)
        picture = figures.PICTURES[name](*given)
        figure = nodes.container(classes=["picture"])
        figure += nodes.raw("", picture.svg(), format="html")
        if self.content:
            caption = nodes.container(classes=["caption"])
            caption += self.parse_content_to_nodes()
            figure += caption
        return [figure]


class StoredDirective(SphinxDirective):
    """A table or sentence of figures.py, of stored results."""

    required_arguments, optional_arguments, final_argument_whitespace = 1, 1, True

    def run(self) -> list[nodes.Node]:
        name, *given = " ".join(self.arguments).split()
        note_results(self)
        return self.parse_text_to_nodes(figures.TABLES[name](*given))


def note_results(directive: SphinxDirective) -> None:
    """The page is built again once a result, a finding or a drawing has changed."""
    read = [Path(figures.__file__), *figures.RESULTS.rglob("*.json"), *(figures.ROOT / "findings").glob("*.sh")]
    for path in read:
        directive.env.note_dependency(str(path))


# index.md lists some pages by pattern, and one may match none; Sphinx gives that warning no type to suppress.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(lambda record: "glob pattern" not in str(record.msg))


def setup(app: Sphinx) -> None:
    app.add_directive("picture", PictureDirective)
    app.add_directive("stored", StoredDirective)
    app.connect("autodoc-process-docstring", in_rest)
