// The elements of one message: its text, what it cost, and what to do if it failed.

import { WORDS, capitalize, count, drawBar, make } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ORIGINS = ["accepted", "corrected", "own", "unverified"];

const button = (action, text, label = text) => make("button", { type: "button", className: "quiet", "data-action": action, "aria-label": label }, text);

/** What to do about an error of the service. */
export function remedyFor({ code, status }) {
  const reason = status === 401 ? "invalid_api_key" : status === 503 && !(code in WORDS.remedies) ? "unreachable" : code;
  return WORDS.remedies[reason] ?? WORDS.remedies.other;
}

class UserView {
  constructor(message) {
    const text = make("div", { className: "text" }, message.content);
    const actions = make("div", { className: "actions" }, button("edit", "Edit", "Edit this message"), button("copy", "Copy", "Copy this message"));
    this.element = make("article", { className: "message user", "aria-label": "You" }, text, actions);
  }

  update() {}
}

class AnswerView {
  constructor(message) {
    this.message = message;
    this.text = make("div", { className: "text" });
    this.markdown = new MarkdownView(this.text);
    this.thought = make("div", { className: "text" });
    this.thinking = make("details", { className: "thinking", hidden: true }, make("summary", {}, "Thinking"), this.thought);
    this.pending = make("p", { className: "pending", hidden: true });
    this.warning = make("p", { className: "warning", hidden: true });
    this.error = make("div", { className: "error", role: "alert", hidden: true });
    this.bar = make("div", { className: "bar", role: "img" });
    this.note = make("p", { className: "note" });
    const actions = [button("copy", "Copy", "Copy this answer"), button("again", "Regenerate", "Regenerate this answer")];
    this.actions = make("div", { className: "actions" }, ...actions);
    this.about = make("footer", { hidden: true }, this.bar, this.note, this.actions);
    this.element = make("article", { className: "message answer-message", "aria-label": "Answer" }, this.thinking, this.text, this.pending, this.warning, this.error, this.about);
  }

  /** Show the present state of the message. `waiting`: why it has no text yet; empty if it is not being written. */
  update(waiting = "") {
    const { content, kinds, reasoning, error, json, finish, unverified } = this.message;
    this.markdown.update(content, kinds ?? "", json ? "json" : "");
    this.thinking.hidden = !reasoning;
    if (reasoning) this.thought.textContent = reasoning;
    this.element.toggleAttribute("data-writing", Boolean(waiting));
    this.pending.hidden = !waiting;
    this.pending.textContent = waiting;
    this.warning.hidden = !unverified || Boolean(waiting);
    this.warning.textContent = `The last ${count(unverified ?? 0, "token")} of this answer: ${WORDS.tokens.unverified}. Regenerate it when the verifier is back.`;
    this.error.hidden = !error;
    if (error && this.error.dataset.message !== error.message) {
      this.error.dataset.message = error.message;
      const way = error.code === "context_length_exceeded" ? button("new", "New chat") : button("again", "Try again");
      const message = error.status === 401 ? WORDS.key : capitalize(error.message);
      this.error.replaceChildren(make("p", {}, make("b", {}, message)), make("p", {}, remedyFor(error)), way);
    }
    this.about.hidden = Boolean(waiting) || !(finish && (content || finish !== "cancelled")) || Boolean(error && !content);
    if (!this.about.hidden) this.describe();
  }

  describe() {
    const { version, counts = {}, finish, timings, unverified = 0, withdrawn } = this.message;
    const origins = ORIGINS.filter((kind) => counts[kind]);
    drawBar(this.bar, origins.map((kind) => [kind, counts[kind]]));
    const words = origins.map((kind) => `${counts[kind]} ${WORDS.tokens[kind]}`);
    if (withdrawn) words.push(`${withdrawn} ${WORDS.tokens.withdrawn}`);
    this.bar.hidden = !origins.length;
    this.bar.setAttribute("aria-label", `Tokens: ${words.join(", ")}`);
    this.bar.title = words.join(", ");
    const facts = [
      timings && count(timings.predicted_n + unverified, "token"),
      timings?.predicted_n && `${timings.predicted_per_second.toFixed(1)} per second`,
      finish !== "stop" && (WORDS.outcomes[finish] ?? finish),
    ].filter(Boolean);
    this.note.replaceChildren(
      [facts.join(", "), words.join(", ")].filter(Boolean).join(": "), make("br"),
      make("code", { title: "Exact version of the target model" }, version || "no verifier"),
    );
  }
}

export const makeView = (message) => new (message.role === "user" ? UserView : AnswerView)(message);
