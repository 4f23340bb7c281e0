// The one connection of a page: server-sent events, with a banner while the server or Redis is away.
//
// EventSource connects again by itself, with Last-Event-ID, when a connection breaks. It gives up where the server answers
// with an error, or with 204, which means that the stream has ended; after an error it is tried again from here.

import { byId, parsed, setText } from "./common.js";

const AGAIN_MS = 1_000; // before the first new try; doubled with each
const AGAIN_AT_MOST_MS = 10_000;
const HIDDEN_MS = 30_000; // a tab hidden for longer gives its connection back: browsers allow six, over all tabs

// The names of docs/events.md. An entry with a name of its own comes as "message".
const NOTICES = new Set(["gap", "reset"]); // what the server itself says
const NAMES = [
  "started", "processing", "chain_of_thought", "llm_call", "llm_delta", "llm_response", "tool_usage", "progress",
  "rate_limited", "input_required", "input_received", "steered", "error", "worker_lost", "resumed", "in_doubt", "completed", "failed", "cancelled", "message", ...NOTICES,
];

const away = new Set(); // "server", "redis"

function showBanner() {
  const text = away.has("server")
    ? "The connection to the server is lost. Reconnecting…"
    : "Redis is away. Reconnecting… This page goes on by itself when Redis is back.";
  const banner = byId("banner");
  if (away.size) setText(banner, text);
  banner.hidden = away.size === 0;
}

/** Say that the server or Redis is away, or back: setAway("redis", true). */
export function setAway(what, isAway) {
  if (isAway) away.add(what);
  else away.delete(what);
  showBanner();
}

/** Ask why a stream was refused: EventSource does not tell. */
async function statusOf(url) {
  const asking = new AbortController();
  try {
    return (await fetch(url, { cache: "no-store", signal: asking.signal })).status;
  } catch {
    return 0;
  } finally {
    asking.abort(); // the status was all that was wanted
  }
}

/**
 * Follow a stream of events until close() is called.
 *
 * `url()` is asked at each new connection, for it may hold a cursor. `onEvent(name, data, text)` gets each entry;
 * `onNotice(name, data)` what the server itself says of a stream, a `gap` or a `reset`; `onOpen()` follows each connection that
 * stands; `onOver(status)` says that the server has no more to send (204) or refuses for good.
 */
export function follow({ url, onEvent, onNotice, onOpen, onOver }) {
  let source = null;
  let timer = 0;
  let pause = AGAIN_MS;
  let closed = false;

  function connect() {
    clearTimeout(timer);
    source?.close();
    source = new EventSource(url());
    source.addEventListener("open", () => {
      pause = AGAIN_MS;
      setAway("server", false);
      onOpen?.();
    });
    source.addEventListener("redis", (message) => setAway("redis", parsed(message.data)?.redis === "down"));
    for (const name of NAMES) source.addEventListener(name, receive);
  }

  function receive(message) {
    // subtle: an `error` that a task wrote and a broken connection arrive under the same name; only the first has data
    if (message.data === undefined) {
      if (message.type === "error") broken(message.target);
      return;
    }
    const data = parsed(message.data);
    if (data === undefined || closed) return;
    // a task's own event called `gap` comes as `message`; its true name is in the data
    if (NOTICES.has(message.type)) onNotice(message.type, data);
    else onEvent(typeof data.event === "string" ? data.event : message.type, data, message.data);
  }

  async function broken(from) {
    if (closed || from !== source) return;
    if (from.readyState !== EventSource.CLOSED) {
      setAway("server", true); // it connects again by itself
      return;
    }
    const status = await statusOf(url());
    if (closed || from !== source) return;
    if (status === 401) location.assign("/login");
    if ([204, 400, 404].includes(status)) {
      close();
      onOver?.(status);
      return;
    }
    setAway(status === 503 ? "redis" : "server", true);
    timer = setTimeout(connect, pause);
    pause = Math.min(2 * pause, AGAIN_AT_MOST_MS);
  }

  function rest() {
    clearTimeout(timer);
    source?.close();
    source = null;
  }

  function visibility() {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(rest, HIDDEN_MS);
    else if (source === null || source.readyState === EventSource.CLOSED) connect();
  }

  function close() {
    closed = true;
    rest();
    document.removeEventListener("visibilitychange", visibility);
    setAway("server", false);
  }

  document.addEventListener("visibilitychange", visibility);
  connect();
  return { close };
}
