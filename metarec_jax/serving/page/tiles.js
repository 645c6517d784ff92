// Pieces of an item: its colour, chips of its categories, and buttons to rate it.

import { known, rated } from "./service.js";

const CHIPS = 4; // shown of an item, at most
const SVG = "http://www.w3.org/2000/svg";

export const at = (id) => document.getElementById(id);

export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function icon(name) {
  const drawn = document.createElementNS(SVG, "svg");
  drawn.setAttribute("class", "icon " + name);
  drawn.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", "#" + name);
  drawn.append(use);
  return drawn;
}

export const name = (entry) => entry.title || String(entry.item);

function hash(text) {
  let value = 2166136261; // FNV-1a
  for (const letter of text) value = Math.imul(value ^ letter.codePointAt(0), 16777619) >>> 0;
  return value;
}

// Steps of the golden angle keep the most frequent values of a field apart; a rare value gets any hue, and keeps it.
function hue(field, value) {
  const place = field.values.findIndex((own) => own.value === value);
  return place < 0 ? hash(value) % 360 : (255 + place * 137.508) % 360;
}

export function colour(element, entry) {
  const field = known.fields.find((own) => entry.about[own.name]);
  element.classList.add("coloured");
  if (field) element.style.setProperty("--hue", hue(field, entry.about[field.name][0]));
  else element.classList.add("plain");
  return element;
}

export function chips(entry, most = CHIPS) {
  const row = make("span", "chips");
  const all = known.fields.flatMap((field) => (entry.about[field.name] || []).map((value) => ({ field, value })));
  for (const { field, value } of all.slice(0, most)) {
    const chip = make("span", "chip", value);
    chip.title = field.name;
    chip.style.setProperty("--hue", hue(field, value));
    row.append(chip);
  }
  if (all.length > most) {
    const more = make("span", "chip", `+${all.length - most}`);
    more.title = all.slice(most).map(({ value }) => value).join(", ");
    row.append(more);
  }
  return row;
}

export function button(label, work, ...content) {
  const made = make("button");
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.append(...content);
  made.addEventListener("click", work);
  return made;
}

// A ranking knows what is chosen and what is not; so do data that hold no ratings. Both have no use for five stars.
export const likes = () => known.model.predicts === "ranking" || known.model.ratings[1] - known.model.ratings[0] <= 1;

// Buttons to rate an item; `onRate(entry, rating)`.
export function controls(entry, onRate, words = false) {
  const [low, high] = known.model.ratings;
  const mine = rated.has(entry.item) ? rated.get(entry.item).rating : null;
  const row = make("span", likes() ? "likes" : "stars");
  const add = (label, rating, pressed, ...content) => {
    const made = button(label, () => onRate(entry, rating), ...content);
    made.setAttribute("aria-pressed", String(pressed));
    made.title = label;
    row.append(made);
    return made;
  };
  if (likes()) {
    add(`Like ${name(entry)}`, high, mine === high, icon("heart"), ...(words ? ["Like"] : []));
    add(`Not for me: ${name(entry)}`, low, mine === low, icon("cross"), ...(words ? ["Not for me"] : []));
    return row;
  }
  for (let star = 1; star <= 5; star += 1) {
    const rating = low + (high - low) * (star - 1) / 4; // five stars over the scale of the data
    const made = add(`${star} of 5 for ${name(entry)}`, rating, mine === rating, icon("star"));
    if (mine !== null && mine >= rating) made.classList.add("filled");
  }
  return row;
}

// A tile to start with.
export function tile(entry, onRate) {
  const made = colour(make("li", "tile"), entry);
  const title = make("span", "title", name(entry));
  title.title = name(entry);
  made.append(title, chips(entry), controls(entry, onRate, true));
  return made;
}

// A line of the search or of the ratings; `onRemove(item)` takes a rating back.
export function line(entry, onRate, onRemove) {
  const made = make("li", "line");
  const text = make("span", "text");
  text.append(make("span", "title", name(entry)), chips(entry, onRemove ? 2 : CHIPS));
  made.append(colour(make("span", "swatch"), entry), text, controls(entry, onRate));
  if (onRemove) {
    const remove = button(`Undo the rating of ${name(entry)}`, () => onRemove(entry.item), "Undo");
    remove.classList.add("quiet");
    made.append(remove);
  }
  return made;
}
