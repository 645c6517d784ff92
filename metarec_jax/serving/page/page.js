"use strict";

// Everything the page knows: who is rating, and what has been rated so far (item -> {title, rating}).
const who = (() => {
  const kept = sessionStorage.getItem("user");
  if (kept) return kept;
  const fresh = "web-" + crypto.getRandomValues(new Uint32Array(2)).join("-");
  sessionStorage.setItem("user", fresh);
  return fresh;
})();
const rated = new Map();
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

function stars(item, title) {
  const row = make("span", "stars");
  for (let rating = 1; rating <= 5; rating += 1) {
    const filled = rated.has(item) && rated.get(item).rating >= rating;
    const star = make("button", "", filled ? "★" : "☆");
    star.type = "button";
    star.setAttribute("aria-label", `${rating} of 5 for ${title}`);
    star.addEventListener("click", attempt(() => rate(item, title, rating)));
    row.append(star);
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

async function show() {
  round += 1;
  const mine = round;
  at("rated").replaceChildren(...[...rated].map(([item, { title }]) => line(item, title)));
  const { items } = await call("v1/recommend", { user: who, k: MOST });
  if (mine !== round) return;
  const entries = items.map((entry) => {
    const row = make("div", "row");
    row.append(make("span", "", name(entry)), make("span", "score", entry.score.toFixed(2)));
    const element = make("li");
    element.dataset.item = entry.item;
    element.append(row, make("div", "why"), stars(entry.item, name(entry)));
    return element;
  });
  at("recommended").replaceChildren(...entries);
  say(rated.size ? `${rated.size} rated. Each line says what moved it.` : "Nothing known of you yet: what most people like.");
  for (const [place, entry] of items.entries()) {
    const found = await call("v1/explain", { user: who, item: entry.item });
    if (mine !== round) return;
    explain(entries[place].querySelector(".why"), found);
  }
  document.body.dataset.round = String(mine); // all of this round is on the page
}

function explain(place, found) {
  const causes = found.causes.filter((cause) => Math.abs(cause.effect) >= 0.0005).slice(0, 3);
  const parts = causes.flatMap((cause) => {
    const amount = make("span", cause.effect > 0 ? "up" : "down", (cause.effect > 0 ? "+" : "−") + Math.abs(cause.effect).toFixed(3));
    return [amount, document.createTextNode(` ${cause.title || cause.item} (${cause.rating})  `)];
  });
  place.replaceChildren(make("span", "", `${found.before.toFixed(2)} before you. `), ...parts);
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
