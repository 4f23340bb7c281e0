// From a task's entries to the story that a person reads: one block a thought, an answer of the LLM, a tool call.
//
// Several entries can make one block: an LLM's words and its response, a tool's start and its end. Each entry still has one
// element of its own with data-entry="<entry id>": the block itself for the first, a mark inside of it for the others.

import { asText, clock, count, duration, element, longText, moment, offset, percentOf, setText } from "./common.js";

const STREAMING_CHARS = 4_000; // of an answer that still grows: its end is shown, and all of it when it is complete
const WORD = /_/g;

export class Story {
  constructor(root) {
    this.root = root;
    this.clear();
  }

  clear() {
    this.root.replaceChildren();
    this.section = null; // of the attempt that is being told
    this.attempt = undefined;
    this.startedAt = NaN; // ms, of the attempt
    this.words = null; // the block of an answer that still grows
    this.tools = new Map(); // call -> its block
    this.last = null; // the last block
    this.lastError = undefined;
    this.asked = NaN; // ms: when the LLM was asked, if its answer comes next
  }

  /** Tell one entry. `at` is its time in ms, NaN where it has none. */
  add(name, entry, at) {
    const attempt = name === "started" ? (entry.attempt ?? this.attempt) : this.attempt; // by hand it may have none
    if (attempt !== this.attempt || this.section === null) this.#begin(attempt, at);
    if (!["llm_delta", "llm_response"].includes(name)) this.#closeWords();
    const tell = Object.hasOwn(TELL, name) ? TELL[name] : tellOther; // an event may be called `constructor`
    tell(this, entry, at, name);
    this.asked = name === "rate_limited" ? at + Number(entry.wait_ms) : at;
  }

  /** Tell what no entry says: a gap or a reset. */
  notice(name, text) {
    if (this.section === null) this.#section();
    this.#closeWords();
    this.append(element("div", { class: "block notice", "data-event": name }, element("p", {}, text)));
  }

  /** Append a block of its own for an entry, with its time on the left. Returns what is inside. */
  block(name, entry, at, ...content) {
    const body = element("div", { class: "body" }, ...content);
    const since = Number.isFinite(at - this.startedAt) ? offset(at - this.startedAt) : "";
    const time = element("time", { class: "at", title: Number.isFinite(at) ? moment(at) : "" }, since);
    const properties = { class: `block ${name}`, "data-event": name, "data-entry": entry.id, id: anchorOf(entry.id) };
    this.append(element("div", properties, time, body));
    return body;
  }

  append(block) {
    this.section.append(block);
    this.last = block;
  }

  /** Leave a mark for an entry that another entry's block tells. */
  mark(block, entry) {
    block.append(element("span", { hidden: true, "data-entry": entry.id }));
  }

  #section(title = null) {
    this.section = element("section", { class: "attempt" }, title);
    this.root.append(this.section);
  }

  #begin(attempt, at) {
    this.#closeWords();
    this.attempt = attempt;
    this.startedAt = at;
    this.tools.clear(); // what the last attempt left unfinished stays as it is
    const name = typeof attempt === "number" && attempt > 0 ? `Attempt ${attempt}` : "Entries";
    const when = Number.isFinite(at) ? element("time", { class: "muted", title: moment(at) }, clock(at)) : null;
    this.#section(element("h2", {}, name, " ", when));
    this.section.dataset.attempt = asText(attempt);
  }

  #closeWords() {
    this.words?.block.classList.remove("growing");
    this.words = null;
  }
}

/** The id of an entry's block, for links: "1700000000000-7" -> "e-1700000000000-7". */
export const anchorOf = (entryId) => `e-${entryId}`;

export const callOf = (entry) => JSON.stringify([entry.call_id]);

export const toolOf = ({ tool, action }) => (action === undefined ? asText(tool) : `${asText(tool)}.${asText(action)}`);

const label = (...parts) => element("p", { class: "label" }, ...parts);
const inWords = (name) => asText(name).replace(WORD, " ");

// -- how each event is told -----------------------------------------------------------------------------------

const TELL = {
  started(story, entry, at) {
    if (!Number.isNaN(at)) story.startedAt = at;
    story.block("started", entry, at, label("started by worker ", element("code", {}, asText(entry.worker))));
  },

  processing: (story, entry, at) => story.block("processing", entry, at, longText(asText(entry.step))),

  chain_of_thought(story, entry, at) {
    const said = entry.thought ?? entry.prompt;
    story.block("chain_of_thought", entry, at, label(inWords(entry.step)), longText(asText(said, true), "prose"));
  },

  llm_delta(story, entry, at) {
    if (story.words === null) {
      const text = document.createTextNode("");
      const before = element("span", { class: "muted" });
      const name = label("LLM");
      const body = story.block("llm_response", entry, at, name, element("div", { class: "text data" }, before, text));
      const block = body.parentNode;
      block.classList.add("growing");
      story.words = { block, body, name, text, before, cut: 0, from: Math.min(story.asked, at) };
    } else {
      story.mark(story.words.block, entry);
    }
    const words = story.words;
    words.text.appendData(asText(entry.text));
    if (words.text.length > 2 * STREAMING_CHARS) {
      words.cut += words.text.length - STREAMING_CHARS;
      words.text.deleteData(0, words.text.length - STREAMING_CHARS);
      words.before.textContent = `(${words.cut.toLocaleString("en")} characters before) … `;
    }
  },

  llm_response(story, entry, at) {
    const words = story.words;
    const name = label("LLM ", element("code", {}, asText(entry.model)));
    const answer = longText(asText(entry.response, true), "data");
    if (words === null) {
      story.block("llm_response", entry, at, name, answer);
      return;
    }
    if (Number.isFinite(at - words.from)) name.append(` · ${duration(at - words.from)}`);
    name.append(tokensOf(entry.usage));
    story.mark(words.block, entry);
    words.body.replaceChildren(name, answer); // what it says in the end is what counts
    words.block.classList.remove("growing");
    story.words = null;
  },

  tool_usage(story, entry, at) {
    const call = callOf(entry);
    let card = entry.status === "started" ? undefined : story.tools.get(call);
    if (card === undefined) {
      card = newCard(story, entry, at);
      story.tools.set(call, card);
    } else {
      story.mark(card.block, entry);
    }
    if (entry.arguments !== undefined) card.inside.append(named("arguments", entry.arguments));
    const outcome = entry.status === "failed" ? "error" : "result";
    if (entry.result !== undefined) card.inside.append(named(outcome, entry.result));
    if (entry.error !== undefined) card.inside.append(named("error", entry.error));
    card.block.dataset.status = asText(entry.status);
    setText(card.status, entry.status === "started" ? "running" : asText(entry.status));
    setText(card.took, duration(entry.duration_ms));
    if (entry.status !== "started") story.tools.delete(call);
  },

  progress(story, entry, at) {
    const percent = percentOf(entry.percent);
    const text = percent === null ? asText(entry.percent) : `${Math.round(percent)} %`;
    if (story.last?.dataset.tool === asText(entry.step) && story.last.dataset.status !== "started") {
      story.mark(story.last, entry);
      story.last.querySelector(".percent").textContent = text;
      return;
    }
    story.block("progress", entry, at, label(text, " ", asText(entry.step)));
  },

  llm_call(story, entry) {
    if (story.last) story.mark(story.last, entry); // the answer tells who was asked
    else story.block("llm_call", entry, NaN, label("LLM ", element("code", {}, asText(entry.model))));
  },

  resumed(story, entry, at) {
    const steps = typeof entry.steps === "number" ? count(entry.steps, "completed step") : "completed steps";
    const what = entry.reason === undefined ? `goes on: ${steps} taken from the log` : "starts over";
    const reason = entry.reason === undefined ? [] : [longText(asText(entry.reason), "data")];
    story.block("resumed", entry, at, label(what), ...reason);
  },

  in_doubt(story, entry, at) {
    const step = element("code", {}, asText(entry.step));
    story.block("in_doubt", entry, at, label("in doubt: ", step), longText(asText(entry.reason), "data"));
  },

  input_required(story, entry, at) {
    const options = Array.isArray(entry.options) ? ` (${entry.options.map((one) => asText(one)).join(" / ")})` : "";
    story.block("input_required", entry, at, label("asks a person"), longText(asText(entry.question) + options, "prose"));
  },

  input_received(story, entry, at) {
    const by = entry.by ? ` by ${asText(entry.by)}` : "";
    const answer = entry.answer === null ? "Nobody answered in time." : asText(entry.answer);
    story.block("input_received", entry, at, label(`answered${by}`), longText(answer, "prose"));
  },

  steered(story, entry, at) {
    const by = entry.by ? ` by ${asText(entry.by)}` : "";
    story.block("steered", entry, at, label(`was told${by}`), longText(asText(entry.text), "prose"));
  },

  rate_limited(story, entry, at) {
    const wait = typeof entry.wait_ms === "number" ? duration(entry.wait_ms) : asText(entry.wait_ms);
    story.block("rate_limited", entry, at, label(`waits ${wait} for its turn: no more than ${asText(entry.limit)}`));
  },

  error(story, entry, at) {
    const next = entry.will_retry ? "error, to be tried again" : "error";
    const type = entry.error_type === undefined ? "" : `${asText(entry.error_type)}: `;
    story.lastError = entry.error;
    story.block("error", entry, at, label(next), longText(type + asText(entry.error, true), "data"));
  },

  worker_lost(story, entry, at) {
    const worker = element("code", {}, asText(entry.worker));
    const end = " was lost: nothing was heard of it any more. Another takes over.";
    story.block("worker_lost", entry, at, label("Worker ", worker, end));
  },

  completed(story, entry, at) {
    const { result } = entry;
    const { summary, ...details } = result !== null && typeof result === "object" ? result : { summary: result };
    const body = story.block("completed", entry, at, ending("Completed", "in", entry.duration_ms));
    if (typeof summary !== "string") body.append(named("result", result));
    else body.append(longText(summary, "prose"));
    if (typeof summary === "string" && Object.keys(details).length) body.append(named("details", details));
  },

  failed(story, entry, at) {
    const attempts = typeof entry.attempts === "number" ? ` after ${count(entry.attempts, "attempt")}` : "";
    const body = story.block("failed", entry, at, element("h3", {}, `Failed${attempts}`));
    if (entry.error === story.lastError) return; // it stands just above
    body.append(longText(asText(entry.error, true), "data"));
  },

  cancelled(story, entry, at) {
    story.block("cancelled", entry, at, element("h3", {}, "Cancelled"), longText(asText(entry.reason)));
  },
};

const EVERY_ENTRY = new Set(["task", "id", "event", "timestamp"]);

/** Tell an event with a name of its own. */
function tellOther(story, entry, at, name) {
  const fields = Object.entries(entry).filter(([field]) => !EVERY_ENTRY.has(field));
  const values = fields.map(([field, value]) => named(field, value));
  story.block("other", entry, at, label(inWords(name)), ...values);
}

function ending(word, preposition, ms) {
  const took = duration(ms);
  return element("h3", {}, took ? `${word} ${preposition} ${took}` : word);
}

function newCard(story, entry, at) {
  const status = element("span", { class: "status" });
  const took = element("span", { class: "took" });
  const percent = element("span", { class: "percent muted" });
  const inside = element("div", { class: "inside" });
  const tool = toolOf(entry);
  const head = element("p", { class: "head" }, element("code", { class: "tool" }, tool || "tool"), status, took, percent);
  const block = story.block("tool_usage", entry, at, element("div", { class: "card" }, head, inside)).parentNode;
  block.dataset.tool = tool;
  return { block, status, took, inside };
}

/** The tokens of a call to the LLM, as text: " · 812 + 64 tokens"; "" if nobody knows. */
function tokensOf(usage) {
  if (typeof usage?.input !== "number" || typeof usage?.output !== "number") return "";
  return ` · ${usage.input.toLocaleString("en")} + ${usage.output.toLocaleString("en")} tokens`;
}

/** A name and a value. */
function named(name, value) {
  const shown = longText(asText(value, true), "data");
  return element("div", { class: "named" }, element("span", { class: "name" }, name), shown);
}
