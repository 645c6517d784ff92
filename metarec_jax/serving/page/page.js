"use strict";

// Everything the page knows: who is rating, what has been rated so far (item -> {title, rating}), and the model.
const who = (() => {
  const kept = sessionStorage.getItem("user");
  if (kept) return kept;
  const fresh = "web-" + crypto.getRandomValues(new Uint32Array(2)).join("-");
  sessionStorage.setItem("user", fresh);
  return fresh;
})();
const rated = new Map();
let model = null; // {predicts, ratings: [lowest, highest], items}
const MOST = 8;
let round = 0; // answers to earlier rounds are dropped

const at = (id) => document.getElementById(id);
const say = (text) => { at("status").textContent = text; };

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = "Bearer " + token;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  if (answer.status === 401) {
    const given = window.prompt("This service asks for a token:");
    if (given) {
      sessionStorage.setItem("token", given);
      return call(path, body);
    }
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
}

// Data that say only what people chose, or liked, have no scale for stars.
const binary = () => model.ratings[1] - model.ratings[0] <= 1;

function choice(text, label, work) {
  const button = make("button", "", text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", attempt(work));
  return button;
}

function stars(item, title) {
  const row = make("span", "stars");
  const [low, high] = model.ratings;
  const mine = rated.has(item) ? rated.get(item).rating : null;
  if (binary()) {
    row.append(
      choice(mine === high ? "✔" : "+", `Yes to ${title}`, () => rate(item, title, high)),
      choice(mine === low ? "✘" : "−", `No to ${title}`, () => rate(item, title, low)),
    );
    return row;
  }
  for (let star = 1; star <= 5; star += 1) {
    const rating = low + (high - low) * (star - 1) / 4; // five stars over the scale of the data
    const filled = mine !== null && mine >= rating;
    row.append(choice(filled ? "★" : "☆", `${star} of 5 for ${title}`, () => rate(item, title, rating)));
  }
  return row;
}

function line(item, title) {
  const row = make("div", "row");
  row.append(make("span", "", title), stars(item, title));
  const entry = make("li");
  entry.append(row);
  return entry;
}

function name(entry) {
  return entry.title || String(entry.item);
}

async function search() {
  const text = at("search").value.trim();
  const { items } = text ? await call("v1/items?search=" + encodeURIComponent(text)) : { items: [] };
  if (at("search").value.trim() !== text) return;
  at("found").replaceChildren(...items.slice(0, MOST).map((entry) => line(entry.item, name(entry))));
}

async function rate(item, title, rating) {
  await call("v1/update", { events: [{ user: who, item, kind: "rating", value: rating, id: crypto.randomUUID?.() || String(Math.random()) }] });
  rated.set(item, { title, rating });
  at("search").value = "";
  at("found").replaceChildren();
  await show();
}

// What the list is and what is beside each item, by what the model predicts.
const MEANING = {
  ranking: (items) => `What you are most likely to choose next out of all ${items.toLocaleString()} items, best first. Bars compare with the first.`,
  click: () => "What you are most likely to like, with the probability that you do.",
  rating: () => "What you would rate highest, with the rating that is expected.",
};

// A bar: how likely an item is to be chosen next, relative to the first, exp(score - first score).
function relative(score, first) {
  const bar = make("meter");
  bar.value = Math.exp(score - first);
  bar.title = `${Math.round(100 * bar.value)} % as likely as the first`;
  bar.setAttribute("aria-label", bar.title);
  return bar;
}

async function show() {
  round += 1;
  const mine = round;
  model = await call("v1/model");
  if (mine !== round) return;
  at("meaning").textContent = MEANING[model.predicts](model.items);
  at("rated").replaceChildren(...[...rated].map(([item, { title }]) => line(item, title)));
  const { items } = await call("v1/recommend", { user: who, k: MOST });
  if (mine !== round) return;
  const entries = items.map((entry) => {
    const row = make("div", "row");
    const score = model.predicts === "ranking" ? relative(entry.score, items[0].score) : make("span", "score", entry.score.toFixed(2));
    row.append(make("span", "", name(entry)), score);
    const element = make("li");
    element.dataset.item = entry.item;
    element.append(row, make("div", "why"), stars(entry.item, name(entry)));
    return element;
  });
  at("recommended").replaceChildren(...entries);
  say(rated.size ? `${rated.size} rated. Below each item: which of your ratings moved it most.` : `Nothing is known of you yet: what most people ${model.predicts === "ranking" ? "choose" : "like"}.`);
  for (const [place, entry] of items.entries()) {
    const found = await call("v1/explain", { user: who, item: entry.item });
    if (mine !== round) return;
    explain(entries[place].querySelector(".why"), found);
  }
  document.body.dataset.round = String(mine); // all of this round is on the page
}

function explain(place, found) {
  const ranks = model.predicts === "ranking"; // its scores compare items, so that a change of one has no unit
  const causes = found.causes.filter((cause) => Math.abs(cause.effect) >= 0.0005).slice(0, 3);
  const parts = causes.flatMap((cause) => {
    const up = cause.effect > 0;
    const amount = ranks ? (up ? "▲" : "▼") : (up ? "+" : "−") + Math.abs(cause.effect).toFixed(3);
    const rating = binary() ? "" : ` (${Number(cause.rating.toFixed(2))})`;
    return [make("span", up ? "up" : "down", amount), document.createTextNode(` ${cause.title || cause.item}${rating}  `)];
  });
  place.replaceChildren(...(ranks ? [] : [make("span", "", `${found.before.toFixed(2)} before you. `)]), ...parts);
}

function attempt(work) {
  return (...given) => work(...given).catch((error) => say(error.message));
}

at("search").addEventListener("input", attempt(search));
at("forget").addEventListener("click", attempt(async () => {
  await call("v1/forget", { user: who });
  rated.clear();
  await show();
}));
attempt(show)();
