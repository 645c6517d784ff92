"""The page, in a real browser: rate a few, watch the recommendations change, read why."""


def test_rating_changes_what_is_recommended_and_says_why(serve, browser, service):
    with serve() as address:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("body[data-round='1']")
        before = page.locator("#recommended li").evaluate_all("all => all.map(li => li.dataset.item)")
        assert len(before) == 8
        page.fill("#search", "thing 1")
        page.wait_for_selector("#found li")
        page.click("#found li:first-child button[aria-label^='5 of 5']")
        page.wait_for_selector("body[data-round='2']")
        first = page.locator("#recommended li").first.get_attribute("data-item")
        page.click("#recommended li:first-child button[aria-label^='1 of 5']")
        page.wait_for_selector("body[data-round='3']")
        after = page.locator("#recommended li").evaluate_all("all => all.map(li => li.dataset.item)")
        assert after != before
        assert first not in after
        assert page.locator("#rated li").count() == 2
        assert "Thing 1" in page.locator("#recommended .why").first.inner_text()
        assert service.users.size()["events"] == 2
        page.click("#forget")
        page.wait_for_selector("body[data-round='4']")
        assert page.locator("#recommended li").evaluate_all("all => all.map(li => li.dataset.item)") == before
        assert service.users.size()["events"] == 0
        assert errors == []
        page.close()
