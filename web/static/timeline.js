// What took how long: from a task's entries to steps with a beginning and an end, and from steps to bars.
//
// A tool call lasts from its `started` to its end. The LLM is asked when the entry before its first word is written, and
// has answered with llm_response. A lost worker's step lasts until its last entry. A step of a plain consumer, a wait for
// the LLM's turn and a rest until the retry last until the next entry.

import { TERMINAL, asText, count, duration, element, now, setText } from "./common.js";
import { anchorOf, callOf, toolOf } from "./story.js";

const MOST_BARS = 40; // more than these, and the shortest are left out
const SMALLEST_PERCENT = 0.6; // of a bar: what was quick is still seen

export class Timeline {
  constructor(root) {
    this.root = root;
    this.from = element("span");
    this.to = element("span");
    this.bars = element("ol", { class: "bars" });
    this.left = element("p", { class: "muted" });
    this.empty = element("p", { class: "muted" }, "Nothing has been done yet.");
    root.replaceChildren(this.empty, element("p", { class: "scale muted" }, this.from, this.to), this.bars, this.left);
    this.clear();
  }

  clear() {
    this.steps = []; // {kind, name, entry, from, to}; `to` is NaN while it lasts
    this.open = new Map(); // what lasts: "llm", "until next", or a tool call -> its step
    this.before = NaN; // time of the last entry
    this.first = NaN;
    this.ended = NaN;
    this.rows = new Map(); // entry id -> its row
    this.bars.replaceChildren();
    this.changed = true;
  }

  /** Take in one entry; `at` is its time in ms. Nothing is drawn. */
  add(name, entry, at) {
    if (!Number.isFinite(at)) return;
    if (Number.isNaN(this.first)) this.first = at;
    const waited = this.#close("until next", at);
    this.changed = true;

    if (name === "llm_delta" || name === "llm_response") {
      const asked = waited?.kind === "wait" ? waited.to : this.before; // a wait for its turn has a bar of its own
      if (!this.open.has("llm")) this.#begin("llm", "llm", "LLM", entry, Number.isFinite(asked) ? asked : at);
      if (name === "llm_response") this.#close("llm", at);
    } else if (name === "tool_usage") {
      this.#tool(entry, at);
    } else if (name === "processing") {
      this.#begin("until next", "step", asText(entry.step), entry, at);
    } else if (name === "rate_limited") {
      this.#begin("until next", "wait", "waits for its turn", entry, at).atMost = Number(entry.wait_ms);
    } else if (name === "worker_lost") {
      const last = Number.isFinite(this.before) ? this.before : at; // its last sign of life
      this.#closeAll(last);
      this.steps.push({ kind: "wait", name: "nothing heard of its worker", entry: entry.id, from: last, to: at });
    } else if (name === "error" || name === "started") {
      this.#closeAll(at);
      if (name === "error" && entry.will_retry) this.#begin("until next", "wait", "rests until its retry", entry, at);
    } else if (TERMINAL.has(name)) {
      this.#closeAll(at);
      this.ended = at;
    }
    this.before = at;
  }

  #tool(entry, at) {
    const key = callOf(entry);
    if (entry.status === "started") {
      this.#begin(key, "tool", toolOf(entry), entry, at);
      return;
    }
    const took = typeof entry.duration_ms === "number" ? entry.duration_ms : null;
    const step = this.#close(key, at);
    if (step) step.took = took; // as the tool itself has measured it
    else this.steps.push({ kind: "tool", name: toolOf(entry), entry: entry.id, from: at - took, to: at }); // start trimmed
  }

  #begin(key, kind, name, entry, from) {
    const step = { kind, name, entry: entry.id, from, to: NaN, took: null };
    this.steps.push(step);
    this.open.set(key, step);
    return step;
  }

  #close(key, at) {
    const step = this.open.get(key);
    if (step === undefined) return null;
    step.to = step.atMost >= 0 ? Math.min(at, step.from + step.atMost) : at;
    this.open.delete(key);
    return step;
  }

  #closeAll(at) {
    for (const key of [...this.open.keys()]) this.#close(key, at);
  }

  /** Draw the bars, where anything has changed or lasts. */
  draw() {
    if (!this.changed && this.open.size === 0) return;
    this.changed = false;
    this.empty.hidden = this.steps.length > 0;
    const end = Number.isFinite(this.ended) ? this.ended : Math.max(this.before, now());
    const first = Math.min(this.first, this.steps[0]?.from ?? Infinity);
    const whole = Math.max(end - first, 1);
    const lengthOf = (step) => Math.max(0, (Number.isFinite(step.to) ? step.to : end) - step.from);

    let shown = this.steps;
    if (shown.length > MOST_BARS) {
      const longest = [...shown].sort((a, b) => lengthOf(b) - lengthOf(a)).slice(0, MOST_BARS);
      const chosen = new Set(longest);
      shown = shown.filter((step) => chosen.has(step));
    }
    const others = this.steps.length - shown.length;
    setText(this.left, others ? `The longest ${MOST_BARS} steps. ${count(others, "shorter one")} left out.` : "");
    setText(this.from, this.steps.length ? "0" : "");
    setText(this.to, this.steps.length ? duration(whole) : "");

    const wanted = new Set(shown.map((step) => step.entry));
    for (const [entry, { row }] of this.rows) {
      if (wanted.has(entry)) continue;
      row.remove();
      this.rows.delete(entry);
    }
    shown.forEach((step, place) => this.#row(step, place, first, whole, lengthOf(step)));
  }

  #row(step, place, first, whole, length) {
    if (!this.rows.has(step.entry)) {
      const bar = element("span", { class: "bar" });
      const took = element("span", { class: "took" });
      const name = element("span", { class: "name" }, step.name);
      const link = element("a", { href: `#${anchorOf(step.entry)}`, title: step.name.slice(0, 200) }, name, took);
      const track = element("span", { class: "track", "aria-hidden": "true" }, bar);
      const row = element("li", { "data-kind": step.kind }, link, track);
      this.rows.set(step.entry, { row, bar, took });
    }
    const { row, bar, took } = this.rows.get(step.entry);
    if (this.bars.children[place] !== row) this.bars.insertBefore(row, this.bars.children[place] ?? null);
    row.toggleAttribute("data-lasts", !Number.isFinite(step.to));
    setText(took, duration(step.took ?? length));
    // through the CSSOM, which the Content-Security-Policy allows; a style attribute would be refused
    const width = Math.max((100 * length) / whole, SMALLEST_PERCENT);
    bar.style.width = `${width}%`;
    bar.style.marginInlineStart = `${Math.max(0, Math.min((100 * (step.from - first)) / whole, 100 - width))}%`;
  }
}
