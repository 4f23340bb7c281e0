// The raw entries, on request: exactly the JSON that the server sent, one entry a row, the last ones first drawn.

import { byId, element, longText } from "./common.js";

const PAGE = 200; // rows that are added at a time

export class RawEntries {
  constructor(root) {
    this.root = root;
    this.earlier = element("button", { type: "button", class: "plain", onclick: () => this.#showEarlier() });
    this.first = element("li", { hidden: true }, this.earlier);
    this.clear();
  }

  clear() {
    this.entries = []; // {name, id, text}
    this.from = 0; // those before it are not shown yet
    this.to = 0;
    this.root.replaceChildren(this.first);
  }

  add(name, id, text) {
    this.entries.push({ name, id, text });
  }

  /** Show the entries in place of the story, or hide them. */
  toggle(open) {
    this.root.hidden = !open;
    byId("story").hidden = open;
    const button = byId("raw");
    button.setAttribute("aria-pressed", String(open));
    button.textContent = open ? "Show the story" : "Show raw entries";
    this.draw();
  }

  /** Append what has come since the last time. */
  draw() {
    if (this.root.hidden) return;
    if (this.to === 0) this.from = this.to = Math.max(0, this.entries.length - PAGE);
    this.root.append(...this.entries.slice(this.to).map(rowOf));
    this.to = this.entries.length;
    this.#drawEarlier();
  }

  #showEarlier() {
    const from = Math.max(0, this.from - PAGE);
    this.first.after(...this.entries.slice(from, this.from).map(rowOf));
    this.from = from;
    this.#drawEarlier();
  }

  #drawEarlier() {
    this.first.hidden = this.from === 0;
    this.earlier.textContent = `Show ${Math.min(PAGE, this.from)} of ${this.from.toLocaleString("en")} earlier entries`;
  }
}

function rowOf({ name, id, text }) {
  return element("li", {}, element("p", { class: "label" }, element("code", {}, id), ` ${name}`), longText(text, "data"));
}
