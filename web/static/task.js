// One task's page: its record from GET /api/tasks/<id>, its entries from the stream of server-sent events.
//
// Entries wait in a list and are told in batches, a few milliseconds a frame, so that ten thousand of them at once do not
// stop the page. window.shownEntries holds the ids of those that are told, in order: each is told once.

import {
  TERMINAL, ago, api, asText, byId, clock, count, duration, element, longText, moment, percentOf, placeOf, setText, taskPath,
} from "./common.js";
import { follow, setAway } from "./live.js";
import { QuestionBox } from "./question.js";
import { RawEntries } from "./raw.js";
import { Story } from "./story.js";
import { Timeline } from "./timeline.js";

const BATCH_MS = 10; // of a frame
const LATE_MS = 250; // a hidden page draws no frames: then a batch comes so late
const WAITING_MS = 2_000; // between two looks at the record, for the place in the queue
const RUNNING_MS = 10_000; // and while it runs, for what no entry says: that its end was asked for
const UNKNOWN_MS = 5_000; // before it is asked again for a task that is not known
const SOON_MS = 300;
const SETTLE_MS = 1_000; // after the last entry: until then the end, or a link's goal, is kept in view
const NEAR_END_PX = 80;
const NARROW = "(max-width: 60rem)"; // as in style.css

const id = decodeURIComponent(location.pathname.split("/")[2]);
const apiPath = `/api/tasks/${encodeURIComponent(id)}`;
const story = new Story(byId("story"));
const timeline = new Timeline(byId("timeline"));
const raw = new RawEntries(byId("raw-entries"));
const question = new QuestionBox(byId("question"), answer);

const seen = new Set(); // entry ids that have arrived
const pending = []; // what has arrived and is not told yet: functions that tell it
window.shownEntries = []; // entry ids that are told

let record = null; // the task, as GET tells it
let recordAt = -Infinity; // when it was asked for
let told = null; // {state, status}, as the last entry that changed it says
let toldAt = -Infinity;
let ended = null; // the terminal entry
let percent = null;
let doing = "";
let attempt = null;
let worker = null;
let firstStart = null; // ms; the record knows only when the last attempt began
let cursor = ""; // the last entry id that has arrived
let stream = null;

// -- entries --------------------------------------------------------------------------------------------------

function onEvent(name, data, text) {
  if (typeof data.id !== "string" || seen.has(data.id)) return;
  seen.add(data.id);
  cursor = data.id;
  pending.push(() => tell(name, data, text));
  if (TERMINAL.has(name)) stream.close(); // nothing follows; left open, it would connect again
  schedule();
}

function onNotice(name, data) {
  if (name === "reset") {
    cursor = "";
    seen.clear();
  }
  pending.push(name === "reset" ? startAnew : () => tellGap(data));
  schedule();
}

let scheduled = false;

function schedule() {
  if (scheduled || pending.length === 0) return;
  scheduled = true;
  let done = false;
  const once = () => {
    if (done) return;
    done = true;
    scheduled = false;
    tellBatch();
  };
  requestAnimationFrame(once);
  setTimeout(once, LATE_MS);
}

function tellBatch() {
  const until = performance.now() + BATCH_MS;
  let taken = 0;
  while (taken < pending.length && performance.now() < until) pending[taken++]();
  pending.splice(0, taken);
  raw.draw();
  draw();
  keepInView(taken > 0);
  schedule();
}

function tellGap(data) {
  const missed = asText(data.missed);
  story.notice("gap", `${missed} earlier ${missed === "1" ? "entry is" : "entries are"} gone: the stream was trimmed.`);
}

function tell(name, data, text) {
  const at = Date.parse(data.timestamp);
  window.shownEntries.push(data.id);
  raw.add(name, data.id, text);
  story.add(name, data, at);
  timeline.add(name, data, at);
  take(name, data);
}

function startAnew() {
  window.shownEntries.length = 0;
  for (const part of [story, timeline, raw]) part.clear();
  told = ended = percent = attempt = worker = firstStart = null;
  story.notice("reset", "The stream was lost in part, as after a failover. This is what it holds now, from its start.");
}

/** Take from an entry what the head of the page shows. */
function take(name, data) {
  if (TERMINAL.has(name)) {
    ended = data;
    change(name, name);
    setTimeout(() => (live = false), SETTLE_MS);
  } else if (name === "started") {
    percent = null;
    doing = "";
    worker = asText(data.worker);
    if (typeof data.attempt === "number" && data.attempt > 0) attempt = data.attempt;
    firstStart ??= attempt === 1 ? Date.parse(data.timestamp) : null;
    change("running", "running");
  } else if (name === "input_required") {
    change("waiting", "parked");
  } else if (name === "error") {
    if (data.will_retry) change("waiting", "retrying");
  } else if (name === "progress") {
    percent = percentOf(data.percent);
    doing = asText(data.step).slice(0, 200);
  } else if (name === "processing") {
    doing = asText(data.step).slice(0, 200);
  }
}

function change(state, status) {
  told = { state, status };
  toldAt = performance.now();
  look(SOON_MS);
}

// -- the record -----------------------------------------------------------------------------------------------

let looking = 0;

function look(inMs) {
  clearTimeout(looking);
  looking = setTimeout(loadRecord, inMs);
}

async function loadRecord() {
  const askedAt = performance.now();
  try {
    record = await api(apiPath);
    recordAt = askedAt;
    setAway("redis", false);
    showProblem("");
    draw();
  } catch (error) {
    if (error.status === 503) setAway("redis", true);
    else if (error.status === 0) setAway("server", stream !== null); // the stream's next connection takes it back
    else if (record === null || error.status !== 404) showProblem(error.message);
    draw();
    if (error.status === 404) {
      setAway("redis", false); // it was asked, and does not know the task, or not any more
      return;
    }
  }
  const { state } = stateNow();
  if (!TERMINAL.has(state)) look(state === "waiting" ? WAITING_MS : RUNNING_MS);
}

/** The state by what was heard last: an entry, or the record. */
function stateNow() {
  if (ended) return told;
  if (record && (told === null || recordAt > toldAt || TERMINAL.has(record.state))) return record;
  return told ?? { state: "", status: "" };
}

// -- drawing --------------------------------------------------------------------------------------------------

function showProblem(text) {
  setText(byId("problem"), text);
  byId("problem").hidden = !text;
}

function draw() {
  const { state, status } = stateNow();
  const word = ["retrying", "parked"].includes(status) ? status : state;
  const badge = byId("state");
  if (badge.dataset.state !== state || badge.textContent !== word) {
    badge.dataset.state = state;
    badge.textContent = word;
    if (word) setText(byId("announce"), `Task ${id}: ${word}`);
  }
  const running = state === "running";
  const known = percent ?? percentOf(record?.percent);
  byId("progress").hidden = known === null || !(running || status === "retrying");
  if (known !== null) byId("progress").value = known;
  setText(byId("doing"), doingOf(state, status, known));
  const share = running && known !== null ? ` ${Math.round(known)} %` : "";
  document.title = word ? `Task ${id} · ${word}${share}` : `Task ${id}`;

  const stops = Boolean(record?.cancel) && !TERMINAL.has(state);
  byId("cancel").hidden = !(state === "waiting" || running);
  setText(byId("cancel"), stops ? "Stopping…" : "Cancel");
  if (!pressing) disable(byId("cancel"), stops);
  byId("retry").hidden = state !== "failed";
  question.draw(TERMINAL.has(state) ? null : record?.question);

  const none = window.shownEntries.length === 0 && pending.length === 0;
  document.querySelector("aside").hidden = none && record === null;
  const place = state === "waiting" ? placeOf(stateNow()) : "";
  byId("waiting").hidden = !(none && state === "waiting");
  setText(byId("waiting"), `The task waits for a worker${place ? `: ${place}` : ""}. Its story appears here by itself.`);
  setText(byId("entries"), count(window.shownEntries.length, "entry", "entries"));
  byId("entries").title = cursor && `the last: ${cursor}`;
  drawFacts(state);
}

function doingOf(state, status, known) {
  if (state === "waiting") return placeOf(["retrying", "parked"].includes(status) ? { status } : (record ?? {}));
  if (TERMINAL.has(state)) return tookMs() > 0 ? `took ${duration(tookMs())}` : "";
  if (state !== "running") return "";
  return [known === null ? "" : `${Math.round(known)} %`, doing || asText(record?.step ?? "")].filter(Boolean).join(" · ");
}

const startedAt = () => firstStart ?? record?.started_at ?? NaN; // no number where nobody began: all that follows is none
const tookMs = () => (ended ? Date.parse(ended.timestamp) : record?.finished_at) - startedAt();

let factsShown = "";

function drawFacts(state) {
  if (record === null) return;
  const { put_at: putAt } = record;
  const waited = startedAt() - (putAt ?? NaN);
  const facts = [
    ["type", record.type],
    ["put", putAt && `${clock(putAt)}, ${ago(putAt)}`, putAt && moment(putAt)],
    ["waited", waited >= 0 && duration(waited)],
    ["took", TERMINAL.has(state) && tookMs() > 0 && duration(tookMs())],
    ["attempts", attempt ?? (record.attempts || null)],
    ["worker", worker ?? record.worker],
    ["to be cancelled", !TERMINAL.has(state) && record.cancel],
  ].filter(([, value]) => value);
  const shown = JSON.stringify(facts);
  if (shown === factsShown) return;
  factsShown = shown;
  byId("facts").replaceChildren(
    ...facts.map(([name, value, title]) =>
      element("div", {}, element("dt", {}, name), element("dd", { title: title || null }, asText(value).slice(0, 200))),
    ),
  );
  if (byId("data").firstChild) return;
  const { data } = record;
  const asked = data !== null && typeof data === "object" && Object.hasOwn(data, "payload") ? data.payload : data;
  byId("data").append(longText(asText(asked, true), "data"));
}

// -- following the end ----------------------------------------------------------------------------------------

let following = true;
let live = true; // entries are still to come; of a task that has ended before, they only take a moment to arrive
let lastY = 0;

const pageHeight = () => document.documentElement.scrollHeight;
const atEnd = () => innerHeight + scrollY >= pageHeight() - NEAR_END_PX;

let goal = location.hash.slice(1); // a link to a place in the story, which is not told yet

function keepInView(hasNew) {
  if (goal && byId(goal)) {
    byId(goal).scrollIntoView();
    setTimeout(() => (goal = ""), SETTLE_MS); // what stands above may still get its size
    return;
  }
  if (!live) return;
  if (following) toEnd();
  else if (hasNew && !atEnd()) byId("new-events").hidden = false;
}

function toEnd() {
  scrollTo(0, pageHeight());
  lastY = scrollY;
}

function onScroll() {
  // only a move upwards is the reader's wish to stay; the page's growing moves nothing, or downwards
  if (atEnd()) following = true;
  else if (scrollY < lastY - 2) following = false;
  lastY = scrollY;
  if (following) byId("new-events").hidden = true;
}

// -- buttons --------------------------------------------------------------------------------------------------

let pressing = false; // the answer to the last press is under way

/** Let a button do nothing, or again something. It is not `disabled`, since then the focus would be lost. */
function disable(button, isDisabled) {
  if (isDisabled) button.setAttribute("aria-disabled", "true");
  else button.removeAttribute("aria-disabled");
}

/** Send what a button asks for, once at a time; an error is said above the story. */
async function press(button, path, text) {
  if (button.hasAttribute("aria-disabled")) return undefined;
  pressing = true;
  disable(button, true);
  try {
    showProblem("");
    return await api(path, { method: "POST", text });
  } catch (error) {
    showProblem(error.message);
    byId("problem").scrollIntoView({ block: "center" });
    return undefined;
  } finally {
    pressing = false;
    disable(button, false);
  }
}

async function cancel() {
  const answer = await press(byId("cancel"), `${apiPath}/cancel`, '{"reason": "cancelled in the browser"}');
  if (answer?.outcome === "requested") setText(byId("announce"), "The task was asked to stop.");
  look(0);
}

async function answer(text, number) {
  try {
    showProblem("");
    await api(`${apiPath}/answer`, { method: "POST", text: JSON.stringify({ answer: text, number }) });
  } catch (error) {
    showProblem(error.message);
  }
  look(0);
}

async function retry() {
  const task = await press(byId("retry"), `${apiPath}/retry`);
  if (task) location.assign(taskPath(task.id));
}

// -- the page -------------------------------------------------------------------------------------------------

/** The server has no more to send: the stream has expired, or the task is not known (yet). */
async function onOver(status) {
  await loadRecord();
  if (status === 404) setTimeout(open, UNKNOWN_MS);
  if (status !== 204 || ended || record === null) return;
  story.notice("expired", "The stream of this task has expired. What is left is its record.");
  if ((record.result ?? null) !== null) byId("story").append(longText(asText(record.result, true), "data"));
}

function open() {
  const url = () => `${apiPath}/events${cursor && `?since=${encodeURIComponent(cursor)}`}`;
  stream = follow({ url, onEvent, onNotice, onOpen: () => look(SOON_MS), onOver });
}

async function setUp() {
  document.title = `Task ${id}`;
  byId("title").append(` ${id}`);
  if (matchMedia(NARROW).matches) byId("about-fold").open = byId("timeline-fold").open = false; // the story comes first
  byId("cancel").addEventListener("click", cancel);
  byId("retry").addEventListener("click", retry);
  byId("raw").addEventListener("click", () => {
    raw.toggle(byId("raw").getAttribute("aria-pressed") === "false");
    keepInView(false);
  });
  byId("new-events").addEventListener("click", () => {
    following = true;
    byId("new-events").hidden = true;
    toEnd();
    byId("story").focus({ preventScroll: true });
  });
  byId("timeline").addEventListener("click", () => raw.toggle(false)); // its links lead into the story
  addEventListener("scroll", onScroll, { passive: true });
  // blocks out of view have a guessed size: the page's end moves when they come into view, too
  new ResizeObserver(() => keepInView(false)).observe(byId("main"));
  byId("main").addEventListener("click", () => (following = false)); // who unfolds a text wants to read it
  document.addEventListener("visibilitychange", () => document.hidden || ended || look(0));
  setInterval(() => {
    if (document.hidden) return;
    timeline.draw();
    drawFacts(stateNow().state); // "12 s ago" becomes "13 s ago"
  }, 500);

  await loadRecord();
  // what has ended is read from its beginning, and a link to a place in the story leads there
  live = !(record && TERMINAL.has(record.state));
  following = live && !location.hash;
  open();
}

setUp();
