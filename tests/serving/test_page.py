"""The page, in a real browser: rate a few, watch the recommendations change, read why."""

import shutil
from contextlib import contextmanager

import pytest

from metarec_jax.serving import Service

SHOWN = 12


@pytest.fixture(scope="module")
def served(stocked, tmp_path_factory, run_app):
    """One service of one model, whose pages are all different users."""
    folder = tmp_path_factory.mktemp("page")
    stocked.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metarec_jax.serving.warming.SIZES", ())
        service = Service(folder / "model")
        with run_app(service) as address:
            yield service, address


@pytest.fixture(scope="module")
def chromium():
    """One browser for this file; its event loop ends before the tests of other files begin."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as p:
        try:
            running = p.chromium.launch(executable_path=found, args=quiet)
        except playwright.Error as error:
            pytest.skip(f"no browser here ({str(error).splitlines()[0]})")
        yield running
        running.close()


@pytest.fixture
def opened(served, chromium):
    """`with opened(**options) as page`: the page for a new user, after its first round; it must cause no error."""

    @contextmanager
    def opening(**options):
        context = chromium.new_context(**options)
        page, errors = context.new_page(), []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(served[1])
        rounds(page, 1)
        yield page
        context.close()
        assert errors == []

    return opening


def rounds(page, number):
    page.wait_for_selector(f"body[data-round='{number}']")


def shown(page):
    return page.locator("#recommended li").evaluate_all("all => all.map(li => Number(li.dataset.item))")


def test_rating_changes_what_is_recommended_and_says_why(opened, served):
    service, _ = served
    with opened() as page:
        before, events = shown(page), service.users.size()["events"]
        assert len(before) == SHOWN
        assert page.locator(".move:not(:empty)").count() == 0
        page.fill("#search", "thing 1")
        page.wait_for_selector("#found li")
        page.click("#found li:first-child button[aria-label^='5 of 5']")
        rounds(page, 2)
        first = shown(page)[0]
        page.click("#recommended li:first-child button[aria-label^='1 of 5']")
        rounds(page, 3)
        after = shown(page)
        assert after != before
        assert first not in after
        assert page.locator("#rated li").count() == 2
        assert "Thing 1" in page.locator("#recommended .why").first.inner_text()
        assert service.users.size()["events"] == events + 2

        page.click("#recommended li:first-child button[aria-label^='Why']")
        reasons = page.locator("#recommended li:first-child .reasons")
        assert "You gave 5 to Thing 1" in reasons.inner_text()
        assert "before you rated anything" in reasons.inner_text()
        assert page.locator("#recommended li:first-child .bar").count() == 2

        page.reload()
        rounds(page, 1)
        assert (shown(page), page.locator("#rated li").count()) == (after, 2)
        assert service.users.size()["events"] == events + 2
        page.click("#rated li:first-child button[aria-label^='Undo']")
        rounds(page, 2)
        assert page.locator("#rated li").count() == 1
        page.click("#forget")
        rounds(page, 3)
        assert shown(page) == before
        assert service.users.size()["events"] == events


def test_items_to_start_with_have_colours_and_categories(opened, stocked):
    with opened() as page:
        tiles = page.locator("#start li")
        first = [r.title for r in stocked.recommend([], 12, diversity=0.7)]
        assert tiles.locator(".title").all_inner_texts() == first
        assert set(tiles.locator(".chip").all_inner_texts()) == {"red", "green", "blue", "new", "sale", "eco"}
        hues = tiles.evaluate_all("all => all.map(li => [li.querySelector('.chip').innerText, li.style.cssText])")
        assert len(set(map(tuple, hues))) == len({colour for colour, _ in hues}) == 3
        tiles.first.locator("button[aria-label^='4 of 5']").click()
        rounds(page, 2)
        assert tiles.count() == 11
        assert page.locator("#rated .title").all_inner_texts() == first[:1]


def test_every_item_says_how_it_moved(opened, stocked):
    with opened() as page:
        before = [r.item for r in stocked.recommend({}, 100)]
        page.click("#start li:first-child button[aria-label^='1 of 5']")
        rounds(page, 2)
        marks = page.locator("#recommended .move").evaluate_all("all => all.map(m => m.getAttribute('aria-label'))")
        assert len(marks) == SHOWN
        for place, (item, mark) in enumerate(zip(shown(page), marks, strict=True)):
            by = before.index(item) - place
            places = f"{abs(by)} place{'s' if abs(by) != 1 else ''}"
            assert mark == ("same place" if by == 0 else f"{'up' if by > 0 else 'down'} {places}")


def test_filters_leave_what_has_the_category(opened, stocked):
    with opened() as page:
        page.click("#filters [data-value='red']")
        rounds(page, 2)
        page.click("#filters [data-value='sale']")
        rounds(page, 3)
        expected = [r.item for r in stocked.recommend({}, SHOWN, where={"colour": "red", "tags": "sale"})]
        assert shown(page) == expected
        page.click("[aria-label='Only these: tags'] >> text=All")
        rounds(page, 4)
        assert shown(page) == [r.item for r in stocked.recommend({}, SHOWN, where={"colour": "red"})]
        assert page.locator(".move:not(:empty)").count() == 0


def test_it_fits_a_phone_and_is_used_by_keyboard(opened):
    phone = {"width": 360, "height": 740}
    with opened(viewport=phone, color_scheme="dark", reduced_motion="reduce") as page:
        page.locator("#start button").first.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        rounds(page, 2)
        assert page.locator("#rated li").count() == 1
        assert page.evaluate("document.activeElement.closest('#start') !== null")
        why = page.locator("#recommended button[aria-label^='Why']").first
        why.focus()
        page.keyboard.press("Enter")
        assert why.get_attribute("aria-expanded") == "true"
        assert page.locator(".reasons").first.is_visible()
        assert page.evaluate("document.getAnimations().length") == 0
        page.fill("#search", "thing")
        page.wait_for_selector("#found li")
        assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
        clipped = """all => all.filter(b => {
            const own = b.getBoundingClientRect(), card = b.closest('li').getBoundingClientRect();
            return own.right > card.right || own.left < card.left || own.width < 24 || own.height < 24;
        }).length"""
        buttons = page.locator("#recommended button, #start button, #rated button, #found button")
        assert buttons.evaluate_all(clipped) == 0
