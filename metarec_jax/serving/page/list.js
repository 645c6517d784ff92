// The recommended items: how each moved since the last rating, and which ratings moved it.

import { call, known, rated, who } from "./service.js";
import { at, button, chips, colour, controls, likes, make, name } from "./tiles.js";

export const SHOWN = 12;
export const COMPARED = 100; // places within which a move is known
const CAUSES = 6; // explained in full
const SMALLEST = { ranking: 0.0005, click: 0.0005, rating: 0.005 }; // effect that is shown

let places = null; // item -> place, of the list before; null where it says nothing, as for other filters

export function restart() {
  places = null;
}

// How far an item moved: {kind, text, label}.
function move(item, place) {
  if (!places) return null;
  if (!places.has(item)) return { kind: "new", text: "new", label: `new: was not among the first ${COMPARED}` };
  const by = places.get(item) - place;
  const ways = `${Math.abs(by)} place${Math.abs(by) === 1 ? "" : "s"}`;
  if (by > 0) return { kind: "up", text: `▲ ${by}`, label: `up ${ways}` };
  if (by < 0) return { kind: "down", text: `▼ ${-by}`, label: `down ${ways}` };
  return { kind: "same", text: "=", label: "same place" };
}

// A bar: how likely an item is to be chosen next, relative to the first, exp(score - first score); else the score.
function worth(entry, first) {
  if (known.model.predicts === "ranking") {
    const bar = make("meter");
    bar.value = Math.exp(entry.score - first);
    bar.style.setProperty("--value", String(bar.value));
    bar.title = `${Math.round(100 * bar.value)} % as likely as the first`;
    bar.setAttribute("aria-label", bar.title);
    return bar;
  }
  return make("span", "score", readable(entry.score));
}

// A score, or a change of one, as people read it.
function readable(value) {
  return known.model.predicts === "click" ? `${(100 * value).toFixed(1)} %` : value.toFixed(2);
}

function row(entry, place, score, onRate) {
  const made = make("li", "item");
  made.dataset.item = entry.item;
  const rank = colour(make("span", "rank", String(place + 1)), entry);
  const text = make("div", "text");
  const brief = make("div", "why");
  brief.hidden = !rated.size;
  text.append(make("span", "title", name(entry)), chips(entry), brief);
  const moved = move(entry.item, place);
  const mark = make("span", "move " + (moved ? moved.kind : ""), moved ? moved.text : "");
  if (moved) {
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", moved.label);
    mark.title = moved.label;
    made.dataset.move = moved.kind;
  }
  const reasons = make("div", "reasons");
  reasons.id = `reasons-${place}`;
  reasons.hidden = true;
  const why = button(`Why ${name(entry)}?`, () => {
    reasons.hidden = !reasons.hidden;
    why.setAttribute("aria-expanded", String(!reasons.hidden));
  }, "Why?");
  why.setAttribute("aria-expanded", "false");
  why.setAttribute("aria-controls", reasons.id);
  const actions = make("span", "actions");
  actions.append(controls(entry, onRate), why);
  made.append(rank, text, mark, score, actions, reasons);
  return made;
}

// `items`: the first COMPARED, of which `entries` describes those that are shown. Returns how many moved which way.
export function show(items, entries, onRate) {
  const list = at("recommended");
  const before = new Map([...list.children].map((own) => [own.dataset.item, own.getBoundingClientRect().top]));
  const rows = entries.map((entry, place) => {
    const scored = { ...entry, score: items[place].score };
    return row(entry, place, worth(scored, items[0].score), onRate);
  });
  list.replaceChildren(...rows);
  at("none").hidden = rows.length > 0;
  if (places) glide(rows, before);
  places = new Map(items.map((entry, place) => [entry.item, place]));
  const count = (kind) => rows.filter((own) => own.dataset.move === kind).length;
  return { new: count("new"), up: count("up"), down: count("down") };
}

// Each row comes from where it was; new ones fade in.
function glide(rows, before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const own of rows) {
    const options = { duration: 500, easing: "cubic-bezier(.2, .8, .2, 1)" };
    if (!before.has(own.dataset.item)) {
      own.animate([{ opacity: 0, transform: "translateX(2rem)" }, { opacity: 1, transform: "none" }], options);
      continue;
    }
    const by = before.get(own.dataset.item) - own.getBoundingClientRect().top;
    if (by) own.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], options);
  }
}

// Fills in why each item is there, one after the other, while `current()` holds.
export async function explain(current) {
  for (const own of [...at("recommended").children]) {
    const item = [...places.keys()].find((one) => String(one) === own.dataset.item);
    const found = await call("v1/explain", { user: who, item });
    if (!current()) return;
    const causes = found.causes.filter((cause) => Math.abs(cause.effect) >= SMALLEST[known.model.predicts]);
    brief(own.querySelector(".why"), causes.slice(0, 3));
    full(own.querySelector(".reasons"), found, causes);
  }
}

const ranks = () => known.model.predicts === "ranking"; // its scores compare items, so that a change of one has no unit
const title = (cause) => cause.title || String(cause.item);
const given = (cause) => Number(cause.rating.toFixed(2));
const amount = (value) => (value > 0 ? "+" : "−") + readable(Math.abs(value));

function brief(place, causes) {
  const parts = causes.map((cause) => {
    const up = cause.effect > 0;
    const part = make("span", "cause");
    const text = ` ${title(cause)}${likes() ? "" : ` (${given(cause)})`}`;
    part.append(make("span", up ? "up" : "down", ranks() ? (up ? "▲" : "▼") : amount(cause.effect)), text);
    return part;
  });
  place.replaceChildren(...parts);
}

function sentence(cause) {
  const { rating } = cause;
  const middle = (known.model.ratings[0] + known.model.ratings[1]) / 2;
  const did = likes() ? (rating > middle ? `You like ${title(cause)}` : `${title(cause)} is not for you`)
    : `You gave ${given(cause)} to ${title(cause)}`;
  const moved = cause.effect > 0 ? "moves it up" : "moves it down";
  return `${did}: ${moved}${ranks() ? "" : ` by ${readable(Math.abs(cause.effect))}`}.`;
}

function full(place, found, causes) {
  const parts = [];
  if (!ranks()) parts.push(make("p", "", `${readable(found.before)} before you rated anything, ${readable(found.score)} now.`));
  if (!rated.size) parts.push(make("p", "", `You have rated nothing yet: this is what most people ${ranks() ? "choose" : "like"}.`));
  else if (!causes.length) parts.push(make("p", "", "None of your ratings moved it."));
  const largest = Math.max(...causes.map((cause) => Math.abs(cause.effect)));
  const list = make("div", "causes");
  for (const cause of causes.slice(0, CAUSES)) {
    const bar = make("span", "bar " + (cause.effect > 0 ? "up" : "down"));
    bar.style.setProperty("--size", String(Math.abs(cause.effect) / largest));
    const own = make("p", "reason");
    own.append(bar, make("span", "", sentence(cause)));
    list.append(own);
  }
  if (causes.length > CAUSES) parts.push(make("p", "", `${causes.length - CAUSES} more of your ratings did less.`));
  place.replaceChildren(...(causes.length ? [list] : []), ...parts);
}
