// Rate a few items, watch the recommendations change: puts the parts of the page together.

import * as service from "./service.js";
import { call, describe, known, rated, who } from "./service.js";
import * as list from "./list.js";
import { at, line, make, tile } from "./tiles.js";

const FOUND = 8; // of a search
const START = 12; // items to start with
const VALUES = 16; // of a field that are shown before "more"

const wanted = new Map(); // field -> set of values
let start = [];
let round = 0; // answers to earlier rounds are dropped

const say = (text) => { at("status").textContent = text; };
const attempt = (work) => (...given) => work(...given).catch((error) => say(error.message));

// What the list is, by what the model predicts.
const MEANING = {
  ranking: (items) => `What you are most likely to choose next out of all ${items.toLocaleString()} items, best first. Bars compare with the first.`,
  click: () => "What you are most likely to like, with the probability that you do.",
  rating: () => "What you would rate highest, with the rating that is expected.",
};

// Whoever rates by keyboard goes on from where they were, although lists are drawn anew.
function keepFocus(draw) {
  const focused = document.activeElement;
  const label = focused?.getAttribute("aria-label");
  const inside = focused?.matches(":focus-visible") ? focused.closest("ul, ol") : null;
  const place = inside ? [...inside.children].indexOf(focused.closest("li")) : -1;
  draw();
  if (!inside || inside.contains(document.activeElement)) return;
  const same = [...inside.querySelectorAll("button")].find((own) => own.getAttribute("aria-label") === label);
  const near = inside.children[Math.min(place, inside.children.length - 1)]?.querySelector("button");
  (same || near || at("search")).focus({ preventScroll: true });
}

const onRate = attempt(async (entry, rating) => {
  await service.rate(entry, rating);
  at("search").value = "";
  await show();
});

const onRemove = attempt(async (item) => {
  await service.unrate(item);
  await show();
});

const search = attempt(async () => {
  const text = at("search").value.trim();
  const { items } = text ? await call("v1/items?search=" + encodeURIComponent(text)) : { items: [] };
  if (at("search").value.trim() !== text) return;
  at("found").replaceChildren(...items.slice(0, FOUND).map((entry) => line(entry, onRate)));
  if (text && !items.length) at("found").append(make("li", "line", "Nothing has this in its title."));
});

function drawOwn() {
  at("own").hidden = !rated.size;
  at("rated").replaceChildren(...[...rated.values()].reverse().map(({ entry }) => line(entry, onRate, onRemove)));
  const left = start.filter((entry) => !rated.has(entry.item));
  at("begin").hidden = !left.length;
  at("start").replaceChildren(...left.map((entry) => tile(entry, onRate)));
  if (!at("search").value) at("found").replaceChildren();
}

function state(moves) {
  if (!rated.size) {
    return `Nothing is known of you yet: what most people ${known.model.predicts === "ranking" ? "choose" : "like"}.`;
  }
  const parts = Object.entries(moves).filter(([, count]) => count).map(([kind, count]) => `${count} ${kind}`);
  return `${rated.size} rated.` + (parts.length ? ` In the list: ${parts.join(", ")}.` : "");
}

async function show() {
  round += 1;
  const mine = round;
  const current = () => mine === round;
  at("recommended").setAttribute("aria-busy", "true");
  const where = Object.fromEntries([...wanted].filter(([, own]) => own.size).map(([field, own]) => [field, [...own]]));
  const filtered = Object.keys(where).length ? { where } : {};
  const { items, model } = await call("v1/recommend", { user: who, k: list.COMPARED, ...filtered });
  if (!current()) return;
  if (model !== known.model.model) await learn(); // another model is served now
  const entries = await describe(items.slice(0, list.SHOWN).map((entry) => entry.item));
  if (!current()) return;
  keepFocus(() => {
    drawOwn();
    say(state(list.show(items, entries, onRate)));
  });
  at("recommended").setAttribute("aria-busy", "false");
  await list.explain(current);
  if (current()) document.body.dataset.round = String(mine); // all of this round is on the page
}

// Buttons of the values of each field; several values of a field widen the choice, several fields narrow it.
function drawFilters() {
  at("filters").replaceChildren(...known.fields.map((field) => {
    const chosen = new Set();
    wanted.set(field.name, chosen);
    const group = make("div", "filter");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `Only these: ${field.name}`);
    const all = make("button", "chip", "All");
    const press = attempt(async (own, value) => {
      if (value === null) chosen.clear();
      else if (!chosen.delete(value)) chosen.add(value);
      for (const other of group.querySelectorAll("[data-value]")) {
        other.setAttribute("aria-pressed", String(chosen.has(other.dataset.value)));
      }
      all.setAttribute("aria-pressed", String(!chosen.size));
      list.restart();
      await show();
    });
    all.type = "button";
    all.setAttribute("aria-pressed", "true");
    all.addEventListener("click", () => press(all, null));
    group.append(make("span", "label", field.name), all);
    field.values.forEach(({ value, items }, place) => {
      const own = make("button", "chip", value);
      own.type = "button";
      own.title = `${items} items`;
      own.dataset.value = value;
      own.setAttribute("aria-pressed", "false");
      own.hidden = place >= VALUES;
      own.addEventListener("click", () => press(own, value));
      group.append(own);
    });
    if (field.values.length > VALUES) {
      const more = make("button", "chip more", `${field.values.length - VALUES} more`);
      more.type = "button";
      more.addEventListener("click", () => {
        const first = group.querySelector("[hidden]");
        for (const own of group.querySelectorAll("[hidden]")) own.hidden = false;
        more.remove();
        first.focus();
      });
      group.append(more);
    }
    return group;
  }));
}

async function learn() {
  known.model = await call("v1/model");
  known.fields = (await call("v1/fields")).fields;
  start = (await call(`v1/start?k=${START}`)).items;
  service.forgetEntries();
  list.restart();
  at("meaning").textContent = MEANING[known.model.predicts](known.model.items);
  drawFilters();
}

let typing = 0;
at("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 120);
});
at("forget").addEventListener("click", attempt(async () => {
  await service.forget();
  list.restart();
  await show();
}));
attempt(async () => {
  await learn();
  await service.remind();
  await show();
})();
