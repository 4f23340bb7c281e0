// What both pages share: building elements, talking to the API, writing numbers and times for a person, folding long text.
//
// Whatever a task says reaches the page as a text node and nothing else: element() is the only way in which these pages
// build anything, and it knows no HTML.

const REQUEST_SECONDS = 30; // the server itself waits 15 s for a Redis that is away
const ID_CHARS = 20;
const FOLD_CHARS = 1_200; // of a text that is shown unfolded
const FOLD_LINES = 12;
const LINE_CHARS = 88; // of JSON that stays on one line
const CHUNK_CHARS = 16_000; // of an unfolded text in one block: the browser lays out only the blocks in view
const SKEW_MS = 2_000; // a server's clock that is nearer than this is taken to be ours

export const TERMINAL = new Set(["completed", "failed", "cancelled"]);

// -- elements -------------------------------------------------------------------------------------------------

/** Build an element: element("p", {class: "muted", hidden: true}, "text", child). A null or false property is left out. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined)); // a string becomes a text node
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Set an element's text only where it changes: a text that is set anew loses the reader's selection. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// -- the API --------------------------------------------------------------------------------------------------

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer came
  }
}

let skewMs = 0; // the server's clock minus ours

/** Return the time by the server's clock, in ms. */
export const now = () => Date.now() + skewMs;

/** Fetch JSON; raise ApiError with a sentence for a person. `text` is a request body, JSON already. */
export async function api(path, { method = "GET", text, headers = {} } = {}) {
  const type = text === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  let body;
  try {
    response = await fetch(path, {
      method,
      body: text,
      cache: "no-store",
      headers: { Accept: "application/json", ...type, ...headers },
      signal: AbortSignal.timeout(REQUEST_SECONDS * 1000),
    });
    body = await response.text();
  } catch (error) {
    const why = error.name === "TimeoutError" ? `no answer within ${REQUEST_SECONDS} s` : "no connection";
    throw new ApiError(0, `The server cannot be reached (${why}).`);
  }
  if (response.status === 401) {
    location.assign("/login");
    throw new ApiError(401, "Please log in.");
  }
  const behind = Date.parse(response.headers.get("Date")) - Date.now();
  if (Number.isFinite(behind)) skewMs = Math.abs(behind) > SKEW_MS ? behind : 0;

  const value = parsed(body);
  if (response.ok && value !== undefined) return value;
  const said = asText(value?.detail) || `the server answered ${response.status} ${response.statusText}`;
  throw new ApiError(response.status, `${said[0].toUpperCase()}${said.slice(1).replace(/\.$/, "")}.`); // application/problem+json
}

export const taskPath = (id) => `/tasks/${encodeURIComponent(id)}`;

/** Build a link to a task's page, with as much of its id as fits between other words. */
export function taskLink(id, before = "") {
  const shown = id.length > ID_CHARS ? `${id.slice(0, ID_CHARS - 1)}…` : id;
  return element("a", { href: taskPath(id), title: id }, before + shown);
}

/** Parse JSON; undefined where it is none. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

// -- words for a person ---------------------------------------------------------------------------------------

/** Return any JSON value as text: a text as it is, everything else as JSON on one line, or on many if `pretty`. */
export function asText(value, pretty = false) {
  if (typeof value === "string") return value;
  if (value === undefined) return "";
  try {
    return pretty ? prettyJson(value) : JSON.stringify(value);
  } catch {
    return "(nested too deep to be shown)"; // RangeError: the stack is full
  }
}

/** Indent JSON, but leave on one line what fits there: ["date", "region"] is read faster so. */
function prettyJson(value, indent = "") {
  const isList = Array.isArray(value);
  const parts = value === null || typeof value !== "object" ? [] : Object.entries(value);
  if (parts.length === 0) return JSON.stringify(value);
  const inner = `${indent}  `;
  const items = parts.map(([name, item]) => (isList ? "" : `${JSON.stringify(name)}: `) + prettyJson(item, inner));
  const [open, close] = isList ? "[]" : "{}";
  const length = items.reduce((sum, item) => sum + item.length + 2, indent.length);
  if (length <= LINE_CHARS && !items.some((item) => item.includes("\n"))) return open + items.join(", ") + close;
  return `${open}\n${inner}${items.join(`,\n${inner}`)}\n${indent}${close}`;
}

/** 850 -> "850 ms"; 2551 -> "2.55 s"; 75000 -> "1 min 15 s"; 120000 -> "2 min"; 7500000 -> "2 h 5 min" */
export function duration(ms) {
  if (typeof ms !== "number" || !Number.isFinite(ms)) return "";
  const all = Math.max(0, Math.round(ms));
  if (all < 1_000) return `${all} ms`;
  if (all < 59_950) return `${(all / 1_000).toFixed(all < 9_995 ? 2 : 1)} s`;
  const seconds = Math.round(all / 1_000);
  const rest = seconds % 60 ? ` ${seconds % 60} s` : "";
  if (seconds < 3_600) return `${Math.floor(seconds / 60)} min${rest}`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1_440)} d ${Math.floor((minutes % 1_440) / 60)} h`;
}

/** A time in ms, seen from now: "just now", "12 s ago", "5 min ago"; what is older than a day is a date. */
export function ago(ms) {
  const seconds = Math.floor((now() - ms) / 1_000);
  if (seconds < 2) return "just now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3_600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3_600)} h ago`;
  return new Date(ms).toLocaleDateString();
}

/** The time since then, in whole seconds: it is written anew each second. */
export function sinceThen(ms) {
  const seconds = Math.max(0, Math.floor((now() - ms) / 1_000));
  return seconds < 60 ? `for ${seconds} s` : `for ${duration(seconds * 1_000)}`;
}

/** The time since a beginning, always in the same unit so that a column of them is read at a glance: "+0.51 s" */
export const offset = (ms) => (ms < 600_000 ? `+${(ms / 1_000).toFixed(2)} s` : `+${duration(ms)}`);

export const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour12: false });
export const moment = (ms) => new Date(ms).toISOString().replace("T", " ").replace("Z", " UTC");
export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** Return a percentage between 0 and 100, or null: an event's fields may hold any JSON value. */
export const percentOf = (value) => (typeof value === "number" ? Math.min(100, Math.max(0, value)) : null);

/** What a task is in one line: a text of its payload, or its data as JSON. */
export function summaryOf(task) {
  const payload = task.data?.payload ?? task.data;
  const { file, subject } = payload ?? {};
  const text = typeof file === "string" ? file : typeof subject === "string" ? subject : asText(payload);
  return text.length > 200 ? `${text.slice(0, 200)}…` : text;
}

/** How a waiting task waits, in words; "" where there is nothing to say. */
export function placeOf(task) {
  if (task.status === "retrying") return "rests until its retry";
  if (task.status === "delayed") return "waits until it is due";
  if (task.status === "parked") return "waits for an answer";
  if (typeof task.ahead !== "number") return "";
  return task.ahead === 0 ? "next in the queue" : `${task.ahead.toLocaleString("en")} ahead in the queue`;
}

// -- long texts -----------------------------------------------------------------------------------------------

/** Build a block with a text of any length: a long one is folded behind a button, and laid out only where it is in view. */
export function longText(text, className = "") {
  const head = beginningOf(text);
  const shown = element("div", { class: `text ${className}` }, head);
  if (head.length === text.length) return shown;

  const all = `Show all (${count(text.length, "character")})`;
  const button = element("button", { type: "button", class: "plain", "aria-expanded": "false" }, all);
  let unfolding = 0; // counts up with each click, so that a click stops what the last one began
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show less" : all;
    shown.classList.toggle("unfolded", open);
    if (open) shown.tabIndex = 0; // it scrolls by itself then, by keyboard too
    else shown.removeAttribute("tabindex");
    shown.replaceChildren();
    unfolding += 1;
    if (open) appendChunks(shown, text, unfolding, () => unfolding);
    else shown.append(head);
  });
  shown.append("…");
  return element("div", { class: "folded" }, shown, button);
}

/** Return the beginning of a text that is short enough to be shown, and never cut inside of a character. */
function beginningOf(text) {
  let end = 0;
  for (let line = 0; line < FOLD_LINES && end !== -1; line += 1) end = text.indexOf("\n", end + 1);
  const cut = Math.min(end === -1 ? text.length : end, FOLD_CHARS);
  if (text.length <= cut * 1.2) return text; // a button that shows three more words is a nuisance
  const half = text.charCodeAt(cut - 1); // subtle: a high surrogate, whose other half the cut would leave behind
  return text.slice(0, half >= 0xd800 && half <= 0xdbff ? cut - 1 : cut);
}

function appendChunks(parent, text, turn, current, start = 0) {
  const until = performance.now() + 8; // ms of a frame
  let from = start;
  while (from < text.length && performance.now() < until) {
    // a chunk is a block, so it ends where a line does; a text of one endless line is cut all the same
    let to = text.lastIndexOf("\n", from + CHUNK_CHARS);
    if (to <= from) to = text.lastIndexOf(" ", from + CHUNK_CHARS);
    if (to <= from || text.length - from <= CHUNK_CHARS) to = Math.min(from + CHUNK_CHARS, text.length);
    parent.append(element("div", { class: "chunk" }, text.slice(from, to)));
    from = text[to] === "\n" ? to + 1 : to; // the block's end is this line's end
  }
  if (from === text.length) return;
  requestAnimationFrame(() => current() === turn && appendChunks(parent, text, turn, current, from));
}
