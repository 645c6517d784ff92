"""Every Python example of the README and of the documentation runs as written."""

import re
from pathlib import Path

import pytest

import metarec_jax

README = Path(__file__).parent.parent / "README.md"
PAGES = sorted((Path(metarec_jax.__file__).parent / "docs").glob("*.md"))
NEEDS = "# needs "  # first line of a block that needs a download or another package: it is not run


def blocks(page):
    """Source of the Python blocks of a page, each with the line it starts on."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def run(code, line, page, names):
    exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("block", blocks(README), ids=lambda block: f"line {block[0]}")
def test_readme_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, code = block
    run(code, line, README, {})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """The blocks of a page share their names, as a reader types them one after the other."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, code in blocks(page):
        if code.startswith(NEEDS):
            compile(code, str(page), "exec")
            continue
        new = "aux" not in names
        run(code, line, page, names)
        if new and page.stem == "core":  # the functional example must learn, not only run
            assert names["aux"]["loss"] < 0.7 * 8  # predicting 0 costs 8 in the mean
            assert len([line for line in code.splitlines() if line.strip()]) <= 25
    if "several" in names:
        assert len(names["several"]) == 2
        assert len(names["several"][0]) == 5


def test_links_of_pages_lead_to_pages():
    for page in [README, *PAGES]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http") and not link.endswith(".png"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_in_the_list_of_pages():
    listed = (PAGES[0].parent / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.stem != "index" and f"]({page.name})" not in listed]
    assert not missing
