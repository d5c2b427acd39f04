"""Settings of the site that `make docs` builds: the pages that index.md leads to, and the API
from the docstrings. A dead link is a warning, and `make docs` turns warnings into errors.

The root of the site is the root of the repository, since pages link to LOG.md and README.md.
"""

import builtins
import importlib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "Dataset Diffusion"
html_title = project
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
CARDS = "dd/embedded/assets/*/README.md"
include_patterns = ["docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", CARDS]
# folders that need not be searched for pages, such as data sets
exclude_patterns = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in {"docs", "dd"}]

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4
highlight_language = "text"
suppress_warnings = ["misc.highlighting_failure"]  # shell with an ellipsis, JSON with a comment

nitpicky = True
nitpick_ignore = [  # pieces of annotations that Sphinx names wrongly
    ("py:class", "collections.abc.Annotated"),
    ("py:class", "types.Annotated"),
    ("py:class", "dict[str"),
]
autodoc_default_options = {"exclude-members": "model_config, noun, missing"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 80


def navigation(index: str) -> str:
    """The tables of the index as table of contents: a caption for each reader, an entry for each
    row."""
    trees = ["```{toctree}\n:hidden:\nStart </README>\n```"]
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| \[(.+?)\]\((.+?)\.md\)", section, re.MULTILINE)
        entries = [
            f"{title} <{'/' + path[3:] if path.startswith('../') else path}>"
            for title, path in rows
        ]
        caption = section.partition("\n")[0]
        lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]
        trees.append("\n".join(lines))
    return "\n\n".join(trees)


def add_navigation(app, docname, source):
    if docname == root_doc:
        source[0] += "\n\n" + navigation(source[0])


def mend_page(app, doctree):
    """The cards of the embedded generators are reached by links, not by the navigation. A link to
    a folder, which has no page, becomes its text."""
    from sphinx.addnodes import pending_xref  # here, as tests read this file without Sphinx

    if app.env.docname.startswith("dd/"):
        app.env.metadata[app.env.docname]["orphan"] = True
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(doctree.findall(pending_xref)):
        if link["reftype"] == "myst" and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def readable_signature(app, what, name, thing, options, signature, returns):
    """Without what says nothing to a reader: how a protocol is built, how a value is checked, the
    address of a function."""
    if signature is None:
        return None
    if signature.startswith("(*args, **kwargs"):
        return "", returns
    signature = re.sub(r",? ~?[\w.]*(Before|After)Validator\([^()]*\)", "", signature)
    return re.sub(r"<\w+( [^<>]*(<\w+>)?)?>", "...", signature), returns


def exists(name: str) -> bool:
    """Whether ``name`` can be imported, as ``torch.Tensor`` or ``dd.masks.chain.STEPS``."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return hasattr(builtins, name)


def without_page(app, env, node, text):
    """A name in a docstring that has no entry here stays plain text; one that does not exist is
    a dead link."""
    if node.get("refdomain") != "py":
        return None
    name, module, owner = (node.get(key) for key in ("reftarget", "py:module", "py:class"))
    places = [name, f"{module}.{name}", f"{module}.{owner}.{name}"]
    return text if any(map(exists, places)) else None


def lead_in(app, error):
    """The site opens at its root too."""
    if error is None and app.builder.name == "html":
        page = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")


def setup(app):
    os.chdir(ROOT)
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", mend_page)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("missing-reference", without_page)
    app.connect("build-finished", lead_in)
