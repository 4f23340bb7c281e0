// The list of tasks: GET /api/tasks when the page opens and where an event says that the list may have changed, at most
// once a second and only while somebody looks. Progress is drawn from the events themselves.

import {
  TERMINAL, ago, api, byId, count, duration, element, moment, percentOf, placeOf, setText, sinceThen, summaryOf, taskLink,
  taskPath,
} from "./common.js";
import { follow, setAway } from "./live.js";

const PAGE = 50; // tasks on a page
const REFRESH_MS = 1_000; // between two GETs, at least
const POLL_MS = 5_000; // and at most: a task that only waits writes no event, and neither does an idle worker
const SEARCH_MS = 250; // after the last key
const ANNOUNCE_MS = 5_000; // between two sentences for a screen reader
const CHANGES = new Set([...TERMINAL, "started", "error", "worker_lost"]); // of a task's state

const rows = new Map(); // task id -> {row, task, parts}
let order = []; // the ids on the page, as they stand
let view = viewOf(location.search);

// -- what the address says ------------------------------------------------------------------------------------

function viewOf(search) {
  const { state = "", q = "", before = "" } = Object.fromEntries(new URLSearchParams(search));
  return { state, q, before };
}

const filled = (fields) => Object.entries(fields).filter(([, value]) => value);

function addressOf(fields) {
  const query = new URLSearchParams(filled(fields)).toString();
  return query ? `/?${query}` : "/";
}

function show(next, replace = false) {
  view = next;
  history[replace ? "replaceState" : "pushState"](null, "", addressOf(view));
  drawControls();
  refresh(true);
}

// -- asking for the list --------------------------------------------------------------------------------------

let asking = 0; // counts up with each GET, so that only the last one's answer is shown
let askedAt = -Infinity;
let timer = 0;
let loading = false;
let again = false; // something changed while an answer was under way

/** Ask for the list soon; `atOnce` where the reader has asked for something. */
function refresh(atOnce = false) {
  if (document.hidden) return; // asked for when the page is seen again
  if (loading && !atOnce) {
    again = true; // a slow server is not asked twice at a time, nor is its answer thrown away
    return;
  }
  const wait = atOnce ? 0 : askedAt + REFRESH_MS - performance.now();
  clearTimeout(timer);
  timer = setTimeout(load, Math.max(0, wait));
}

async function load() {
  askedAt = performance.now();
  clearTimeout(timer);
  const turn = ++asking;
  loading = true;
  again = false;
  const query = new URLSearchParams([["limit", PAGE], ...filled(view)]);
  let problem = "";
  try {
    const answer = await api(`/api/tasks?${query}`);
    if (turn !== asking) return;
    setAway("redis", false);
    draw(answer);
  } catch (error) {
    if (turn !== asking) return;
    if (error.status === 503) setAway("redis", true);
    else if (error.status === 0) setAway("server", true); // the stream's next connection takes it back
    else problem = error.message;
  }
  setText(byId("list-error"), problem);
  byId("list-error").hidden = !problem;
  loading = false;
  clearTimeout(timer);
  timer = setTimeout(refresh, again ? REFRESH_MS : POLL_MS);
}

// -- drawing --------------------------------------------------------------------------------------------------

function draw({ tasks, next, counts, queue_length: queued, workers }) {
  const all = Object.values(counts).reduce((sum, number) => sum + number, 0);
  for (const [name, number] of Object.entries({ "": all, ...counts })) {
    const link = document.querySelector(`#filter [data-filter="${CSS.escape(name)}"] .count`);
    if (link) setText(link, number.toLocaleString("en"));
  }
  setText(byId("summary"), `${queued.toLocaleString("en")} in the queue · ${count(workers.length, "worker")}`);
  drawTasks(tasks);
  drawWorkers(workers);
  drawPaging(next);
}

function drawTasks(tasks) {
  const list = byId("tasks");
  const ids = tasks.map((task) => task.id);
  for (const [id, { row }] of rows) {
    if (ids.includes(id)) continue;
    row.remove();
    rows.delete(id);
  }
  for (const task of tasks) {
    const known = rows.get(task.id) ?? newRow(task.id);
    rows.set(task.id, { ...known, task });
    drawRow(task.id);
  }
  order = ids;
  // rows that stand where they belong are not touched: the focus and a selection stay
  ids.forEach((id, place) => {
    const { row } = rows.get(id);
    if (list.children[place] !== row) list.insertBefore(row, list.children[place] ?? null);
  });
  const empty = view.q || view.state || view.before ? "No task matches." : "No tasks yet. Put one with the form “New task”.";
  setText(byId("empty"), empty);
  byId("empty").hidden = tasks.length > 0;
}

function newRow(id) {
  const parts = {
    state: element("span", { class: "state" }),
    type: element("span", { class: "type" }),
    what: element("span", { class: "what" }),
    bar: element("progress", { max: 100, "aria-label": `progress of task ${id}` }),
    how: element("span", { class: "how" }),
    when: element("time", { class: "when" }),
  };
  const link = element(
    "a",
    { href: taskPath(id) },
    element("span", { class: "id", title: id }, id),
    element("span", { class: "about" }, parts.type, " ", parts.what),
    parts.state,
    element("span", { class: "doing" }, parts.bar, parts.how),
    parts.when,
  );
  return { row: element("li", { "data-task": id }, link), parts };
}

function drawRow(id) {
  const { row, parts, task } = rows.get(id);
  row.dataset.state = task.state;
  parts.state.dataset.state = task.state;
  setText(parts.state, ["retrying", "parked"].includes(task.status) ? task.status : task.state);
  setText(parts.type, task.type ?? "no type");
  setText(parts.what, summaryOf(task));
  parts.what.title = parts.what.textContent;
  const percent = task.state === "running" ? percentOf(task.percent) : null;
  parts.bar.hidden = percent === null;
  if (percent !== null) parts.bar.value = percent;
  drawTimes(id);
}

function drawTimes(id) {
  const { parts, task } = rows.get(id);
  setText(parts.how, howOf(task));
  if (typeof task.put_at === "number") {
    setText(parts.when, ago(task.put_at));
    parts.when.title = `put ${moment(task.put_at)}`;
  }
}

function howOf(task) {
  const took = task.started_at && task.finished_at > task.started_at ? duration(task.finished_at - task.started_at) : "";
  const attempts = task.attempts > 1 ? `attempt ${task.attempts}` : "";
  if (task.state === "waiting") return [placeOf(task), attempts && `after ${attempts}`].filter(Boolean).join(" · ");
  if (task.state !== "running") return [took && `took ${took}`, attempts].filter(Boolean).join(" · ");
  const since = task.started_at ? sinceThen(task.started_at) : "";
  const step = typeof task.step === "string" ? task.step : "";
  return [task.cancel ? "stops soon" : step, attempts, since].filter(Boolean).join(" · ");
}

function drawWorkers(workers) {
  const none = "No worker is alive. Start one: python agent_consumer.py";
  const items = workers.map(({ name, tasks }) => {
    const links = tasks.flatMap((id, place) => [place ? ", " : "", taskLink(id)]);
    const doing = tasks.length ? element("span", {}, tasks.length > 1 ? "tasks " : "task ", ...links) : "idle";
    return element("li", { "data-worker": name }, element("code", {}, name), element("span", { class: "muted" }, doing));
  });
  const list = byId("workers");
  const shown = JSON.stringify(workers); // drawn anew only where it changed, so that a focused link stays
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...(items.length ? items : [element("li", { class: "muted" }, none)]));
}

function drawPaging(next) {
  const older = byId("older");
  const newest = byId("newest");
  older.hidden = !next;
  older.href = addressOf({ ...view, before: next ?? "" });
  newest.hidden = !view.before;
  newest.href = addressOf({ ...view, before: "" });
}

function drawControls() {
  for (const link of document.querySelectorAll("#filter a")) {
    if (link.dataset.filter === view.state) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    link.href = addressOf({ ...view, state: link.dataset.filter, before: "" });
  }
  if (byId("q").value.trim() !== view.q) byId("q").value = view.q;
}

// -- the form -------------------------------------------------------------------------------------------------

const EXAMPLES = {
  process_data: '{"file": "sample_data/sales.csv"}',
  send_email: '{\n  "to": "you@example.org",\n  "subject": "Your report",\n  "body": "The sales report is ready."\n}',
};
let key = ""; // Idempotency-Key: pressed again after a lost answer, the button puts no second task

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // not randomUUID(), which plain http has on localhost only
  return `web-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function showPutError(text, field) {
  const form = byId("put");
  for (const name of ["type", "payload"]) form.elements[name].removeAttribute("aria-invalid");
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
  setText(byId("put-error"), text);
  byId("put-error").hidden = !text;
}

async function put(submitted) {
  submitted.preventDefault();
  const { type, payload } = submitted.target.elements;
  const button = submitted.target.querySelector("button");
  if (button.getAttribute("aria-disabled")) return; // the answer to the last press is under way
  setText(byId("put-status"), "");
  if (!type.value.trim()) return showPutError("A task needs a type, such as process_data.", type);
  const problem = whyNot(payload.value);
  if (problem) return showPutError(`The payload is not JSON: ${problem}`, payload);
  showPutError("");

  button.setAttribute("aria-disabled", "true"); // not disabled: the focus would be lost
  key ||= newKey();
  try {
    // subtle: the payload goes as it was typed, so that numbers beyond 2^53 arrive as they are
    const text = `{"type": ${JSON.stringify(type.value.trim())}, "payload": ${payload.value}}`;
    const task = await api("/api/tasks", { method: "POST", text, headers: { "Idempotency-Key": key } });
    key = "";
    byId("put-status").replaceChildren("Queued: ", taskLink(task.id, "watch task "));
    refresh(true);
  } catch (error) {
    if (error.status >= 400 && error.status < 500) key = "";
    showPutError(error.message);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

function whyNot(text) {
  if (!text.trim()) return "it is empty. Without one, write {}.";
  try {
    JSON.parse(text);
    return "";
  } catch (error) {
    return error.message;
  }
}

async function loadSamples() {
  try {
    const { samples } = await api("/api/samples");
    byId("sample").append(...samples.map((name) => element("option", { value: name }, name)));
  } catch {
    // the form works without them
  }
}

function setUpForm() {
  const form = byId("put");
  const { type, payload, sample } = form.elements;
  form.addEventListener("submit", put);
  form.addEventListener("input", (change) => {
    key = "";
    if (change.target === sample) {
      if (!sample.value) return;
      type.value = "process_data";
      payload.value = JSON.stringify({ file: sample.value });
    } else {
      sample.value = ""; // what is typed is what counts
      const untouched = Object.values(EXAMPLES).includes(payload.value);
      const known = Object.hasOwn(EXAMPLES, type.value); // `constructor` is none
      if (change.target === type && untouched && known) payload.value = EXAMPLES[type.value];
    }
  });
  loadSamples();
}

// -- the page -------------------------------------------------------------------------------------------------

let announcedAt = -Infinity;

function onEvent(name, data) {
  const known = rows.get(data.task);
  if (known && name === "progress" && known.task.state === "running") {
    known.task = { ...known.task, percent: data.percent, step: data.step };
    drawRow(data.task);
  }
  if (known && TERMINAL.has(name) && performance.now() > announcedAt + ANNOUNCE_MS) {
    announcedAt = performance.now();
    setText(byId("announce"), `Task ${data.task}: ${name}`);
  }
  if (CHANGES.has(name)) refresh();
}

/** Let a plain click on a link change the list in place; with a modifier it opens a tab, as ever. */
function inPlace(click) {
  const link = click.target.closest("a");
  if (!link || click.button !== 0 || click.metaKey || click.ctrlKey || click.shiftKey || click.altKey) return;
  click.preventDefault();
  const turnsPage = link.id === "older" || link.id === "newest";
  show(viewOf(new URL(link.href).search));
  if (turnsPage) byId("main").focus(); // and scrolled to: the next page is read from its top
}

function setUp() {
  for (const link of document.querySelectorAll("#filter a")) link.append(" ", element("span", { class: "count" }));
  byId("filter").addEventListener("click", inPlace);
  for (const id of ["older", "newest"]) byId(id).addEventListener("click", inPlace);
  byId("search").addEventListener("submit", (submitted) => submitted.preventDefault());
  let typing = 0;
  byId("q").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => show({ ...view, q: byId("q").value.trim(), before: "" }, true), SEARCH_MS);
  });
  addEventListener("popstate", () => {
    view = viewOf(location.search);
    drawControls();
    refresh(true);
  });
  document.addEventListener("visibilitychange", () => refresh(true));
  setInterval(() => document.hidden || order.forEach(drawTimes), 1_000); // "12 s ago" becomes "13 s ago"
  setUpForm();
  drawControls();
  load();
  follow({ url: () => "/api/events", onEvent, onNotice: () => refresh(), onOpen: () => refresh() });
}

setUp();
