"""Documentation pages: read them, and render them with the API reference as a static HTML site.

The pages are rendered by markdown-it and the docstrings by pdoc (https://pdoc.dev), in the same frame.
"""

import importlib
import pkgutil
import re
import warnings
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

import metarec_jax

SOURCE: Traversable = files("metarec_jax") / "docs"
TEMPLATES = Path(__file__).parent / "templates"
NOT_IN_API = {"cli"}  # `metarec --help` is its reference


class Page(NamedTuple):
    """A page as HTML: `sections` are the (id, title) of its second-level headings."""

    name: str
    title: str
    sections: list[tuple[str, str]]
    body: str


def page_names() -> list[str]:
    """Names of the pages, sorted."""
    return sorted(file.name.removesuffix(".md") for file in SOURCE.iterdir() if file.name.endswith(".md"))


def read_page(name: str | None) -> str:
    """Markdown of a page; of the list of pages if `name` is None.

    Raises:
      click.UsageError: there is no such page.
    """
    if name is not None and name not in page_names():
        raise click.UsageError(f"there is no page {name!r}; choose from {', '.join(page_names())}")
    return (SOURCE / f"{name or 'index'}.md").read_text(encoding="utf-8")


def build(folder: Path) -> Path:
    """Write the pages to `folder` and the API reference to `folder / "api"`; return the first page.

    Raises:
      click.UsageError: the `docs` extra is not installed.
    """
    first = write_pages(folder)
    write_api(folder)
    return first


def write_pages(folder: Path) -> Path:
    """Write every page, and the images beside them, to `folder`; return the first page."""
    render = _templates()
    names = page_names()
    pages = {name: _page(name, names) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages.values():
        html = render.env.get_template("page.html.jinja2").render(page=page, groups=_groups(pages), root="")
        (folder / f"{page.name}.html").write_text(html, encoding="utf-8")
    for file in SOURCE.iterdir():
        if file.is_file() and not file.name.endswith(".md"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder / "index.html"


def write_api(folder: Path) -> None:
    """Write the API reference of `public_modules` to `folder / "api"`, with links to the pages in `folder`."""
    render = _templates()
    import pdoc

    modules = []
    for name in public_modules():
        try:
            importlib.import_module(name)
            modules.append(name)
        except ImportError as error:
            click.echo(f"note: {name} is left out of the API reference ({error})", err=True)
    names = page_names()
    render.configure(docformat="google", template_directory=TEMPLATES)
    render.env.globals["groups"] = _groups({name: _page(name, names) for name in names})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # it is shown without links
        warnings.filterwarnings("ignore", "The module specification .* has already been added", UserWarning)
        pdoc.pdoc(*modules, output_directory=folder / "api")


def public_modules() -> list[str]:
    """Names of the modules in the API reference: the package, its rooms and the modules of `strategies`.

    A room with `__all__` shows what it exports on its own page; of a room without, all modules are listed.
    """
    modules = [metarec_jax.__name__]
    for room in pkgutil.iter_modules(metarec_jax.__path__, "metarec_jax."):
        short = room.name.rpartition(".")[2]
        if not room.ispkg or short.startswith("_") or short in NOT_IN_API:
            continue
        modules.append(room.name)
        package = importlib.import_module(room.name)
        if short == "strategies" or not hasattr(package, "__all__"):
            inside = pkgutil.walk_packages(package.__path__, f"{room.name}.")
            modules += [module.name for module in inside if "._" not in module.name]
    return modules


def _templates() -> Any:
    """pdoc's renderer with the templates of this folder."""
    try:
        from pdoc import render
    except ImportError as error:
        raise click.UsageError(f"a site needs more packages: pip install 'metarec-jax[docs]' ({error})") from error
    render.configure(template_directory=TEMPLATES)
    return render


def _page(name: str, names: list[str]) -> Page:
    """Render one page; links to pages in `names` lead to their HTML."""
    markdown = MarkdownIt("commonmark", {"highlight": _highlight}).enable("table")
    tokens = markdown.parse(read_page(name))
    title, sections = name, []
    for token, following in zip(tokens, [*tokens[1:], Token("", "", 0)], strict=True):
        if token.type == "heading_open":
            anchor = re.sub(r"[^a-z0-9]+", "-", following.content.lower()).strip("-")
            token.attrSet("id", anchor)
            text = following.content.replace("`", "")
            if token.tag == "h1":
                title = text
            elif token.tag == "h2":
                sections.append((anchor, text))
        for child in token.children or ():
            target, mark, part = str(child.attrGet("href") or "").partition("#")
            if child.type == "link_open" and target.removesuffix(".md") in names:
                child.attrSet("href", target.removesuffix(".md") + ".html" + mark + part)
    return Page(name, title, sections, markdown.renderer.render(tokens, markdown.options, {}))


def _groups(pages: dict[str, Page]) -> list[tuple[str, list[Page]]]:
    """Pages by the bold headings of the first page, in its order; a page that it does not list comes last."""
    groups: list[tuple[str, list[Page]]] = [("", [pages["index"]])]
    for line in read_page(None).splitlines():
        if heading := re.fullmatch(r"\*\*(.+)\*\*", line):
            groups.append((heading[1], []))
        elif (link := re.match(r"- \[.*?\]\((.+?)\.md\)", line)) and link[1] in pages:
            groups[-1][1].append(pages[link[1]])
    listed = {page.name for _, group in groups for page in group}
    groups.append(("More", [page for page in pages.values() if page.name not in listed]))
    return [(heading, group) for heading, group in groups if group]


def _highlight(code: str, language: str, _: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language) if language else TextLexer()
    except ClassNotFound:
        lexer = TextLexer()
    return str(highlight(code, lexer, HtmlFormatter(cssclass="pdoc-code codehilite", wrapcode=True)))
