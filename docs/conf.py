"""Sphinx builds the site from the Markdown files as they lie in the repository: `make docs`.

The source folder is the root of the repository, so that links between pages, README and
CONTRIBUTING are the same here as on GitHub.
"""

import ast
import warnings
from pathlib import Path

import cae_mm

warnings.filterwarnings('ignore')  # of what the frameworks import; Sphinx has warnings of its own

project, author, copyright = 'cae-mm', 'the cae-mm authors', 'the cae-mm authors'
version = release = cae_mm.__version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
root_doc = 'docs/index'
include_patterns = ['docs/**', '*.md', 'benchmarks/README.md', 'cae_ckpt/README.md']
exclude_patterns = ['.*', 'build', 'data', 'work_dirs', 'docs/_*']  # not to be walked through
templates_path = [str(Path(__file__).with_name('_templates'))]  # absolute: autosummary wants it

html_theme = 'furo'
html_favicon = 'images/icon.svg'
html_title = f'cae-mm {version}'
html_additional_pages = {'index': 'to_root.html'}  # the site's address leads to docs/index.html
html_copy_source = False

myst_enable_extensions = ['html_image']
myst_heading_anchors = 4

autosummary_generate = True
autodoc_inherit_docstrings = False  # torch's own are not ours to repeat
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_use_rtype = False
python_use_unqualified_type_names = True


def name_languages(app, doctree):
    """Indented blocks say no language: what Python can parse is Python, the rest is a shell's."""
    for block in doctree.findall(lambda node: node.tagname == 'literal_block'):
        if block.get('language') in ('none', 'default', None, ''):
            block['language'] = language_of(block.astext())


def language_of(code):
    """Return 'python' or 'bash'."""
    try:
        ast.parse(code)
    except SyntaxError:
        return 'bash'
    return 'python'


def setup(app):
    """Sphinx calls this."""
    app.connect('doctree-read', name_languages)
