// What the page knows, and how it asks the service.

// Who is rating: a name that this tab made up.
export const who = (() => {
  const kept = sessionStorage.getItem("user");
  if (kept) return kept;
  const fresh = "web-" + crypto.getRandomValues(new Uint32Array(2)).join("-");
  sessionStorage.setItem("user", fresh);
  return fresh;
})();

// The model, {predicts, ratings: [lowest, highest], items}, and its fields, [{name, values: [{value, items}]}].
export const known = { model: null, fields: [] };

// What has been rated: item -> {entry: {item, title, about}, rating, id}. It outlives a reload of the page.
export const rated = new Map(JSON.parse(sessionStorage.getItem("rated") || "[]"));

function keep() {
  sessionStorage.setItem("rated", JSON.stringify([...rated]));
}

export async function call(path, body) {
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

const fresh = () => crypto.randomUUID?.() || String(Math.random());
const event = (item, { rating, id }) => ({ user: who, item, kind: "rating", value: rating, id });

export async function rate(entry, rating) {
  const given = { entry, rating, id: fresh() };
  await call("v1/update", { events: [event(entry.item, given)] });
  rated.set(entry.item, given);
  keep();
}

export async function unrate(item) {
  await call("v1/update", { events: [{ user: who, item, kind: "remove", id: fresh() }] });
  rated.delete(item);
  keep();
}

export async function forget() {
  await call("v1/forget", { user: who });
  rated.clear();
  keep();
}

// After a reload: the service may have been started anew. An event that it knows by its id counts once.
export async function remind() {
  if (!rated.size) return;
  try {
    await call("v1/update", { events: [...rated].map(([item, given]) => event(item, given)) });
  } catch {
    rated.clear(); // another model is served now
    keep();
  }
}

// Items with their categories, each asked for once.
const entries = new Map();

export async function describe(items) {
  const missing = items.filter((item) => !entries.has(item));
  if (missing.length) {
    const query = missing.map((item) => "id=" + encodeURIComponent(item)).join("&");
    for (const entry of (await call("v1/items?" + query)).items) entries.set(entry.item, entry);
  }
  return items.map((item) => entries.get(item));
}

export function forgetEntries() {
  entries.clear();
}
