// The question that a task asks: its text, and a button for each answer, or a field for any text.

import { asText, element } from "./common.js";

export class QuestionBox {
  /** `send(answer, number)` sends an answer; it is awaited, and the box does nothing meanwhile. */
  constructor(root, send) {
    this.root = root;
    this.send = send;
    this.shown = "";
    this.isSending = false;
  }

  /** Show a question of GET /api/tasks/<id>; null: there is none. */
  draw(question) {
    const shown = JSON.stringify(question ?? null);
    if (shown === this.shown) return;
    this.shown = shown;
    this.root.hidden = !question;
    if (!question) return;
    const title = element("h3", {}, "This task asks");
    const text = element("p", { class: "prose" }, asText(question.question));
    this.root.replaceChildren(title, text, question.options ? this.#buttons(question) : this.#form(question));
  }

  #buttons({ options, number }) {
    const buttons = options.map((option) => {
      const button = element("button", { type: "button" }, asText(option));
      button.addEventListener("click", () => this.#answer(option, number));
      return button;
    });
    return element("p", { class: "answers" }, ...buttons);
  }

  #form({ number }) {
    const field = element("input", { type: "text", required: true, "aria-label": "Your answer", autocomplete: "off" });
    const form = element("form", { class: "answers" }, field, element("button", { type: "submit" }, "Answer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#answer(field.value, number);
    });
    return form;
  }

  async #answer(answer, number) {
    if (this.isSending) return;
    this.isSending = true;
    try {
      await this.send(answer, number);
    } finally {
      this.isSending = false;
    }
  }
}
