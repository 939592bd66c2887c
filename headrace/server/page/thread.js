// The messages of a conversation on the page, and what can be done with each.

import { AnswerView } from "./answer_view.js";
import { sayDone } from "./code_block.js";
import { button, copyText, element } from "./elements.js";
import { summaryOf } from "./speed.js";

const NEAR = 48; // pixels from the end that still count as being there
const ENDS = {
  length: "Cut off: as many tokens as were allowed.",
  stopped: "Stopped by you.",
  lost: "The connection was lost here.",
};

/** One message. grows: more of the answer is to come. */
class Turn {
  constructor(message, onDrawn, grows) {
    this.message = message;
    this.body = element("div", { class: "text" });
    this.foot = element("div", { class: "foot" });
    const isUser = message.role === "user";
    const who = element("h2", { class: "hidden" }, isUser ? "You" : "Answer");
    this.node = element("li", { class: `turn ${message.role}` }, who, this.body, this.foot);
    if (isUser) this.body.textContent = message.content;
    else this.#open(onDrawn, grows);
  }

  #open(onDrawn, grows) {
    this.view = new AnswerView(this.body);
    this.view.grow(this.message.content);
    if (grows) this.view.draw();
    else this.view.finish();
    this.view.onDrawn = onDrawn;
    this.node.setAttribute("aria-busy", String(grows));
  }

  /** Nothing follows. */
  finish() {
    this.view.finish();
    this.node.setAttribute("aria-busy", "false");
  }

  /** Says what went wrong, with a way on. */
  fail(words, ...buttons) {
    this.node.append(element("div", { class: "problem", role: "alert" }, element("p", {}, words), ...buttons));
  }

  /** What can be read of it, without its buttons. */
  get words() {
    const blocks = this.body.querySelectorAll(".answer :is(p, pre, h3, h4, h5, h6, th, td)");
    return Array.from(blocks, (block) => block.textContent).join("\n");
  }

  /** Shows what is known of the message and what can be done with it. */
  tell(...buttons) {
    const { content, reason } = this.message;
    if (!content && reason !== "stop") return; // it never began: what went wrong is said there
    const copy = button("Copy", async () => sayDone(copy, await copyText(content)), { "aria-label": "Copy message" });
    const actions = element("div", { class: "actions" }, copy, ...buttons);
    this.foot.replaceChildren(...this.#notes().map((note) => element("p", { class: "note" }, note)), actions);
  }

  #notes() {
    const { role, content, reason } = this.message;
    if (role === "user" || this.node.ariaBusy === "true") return [];
    const end = content ? ENDS[reason ?? "lost"] : "The model ended without a word.";
    return [end, summaryOf(this.message)].filter(Boolean);
  }
}

/** All of them. actions: edit, again and goOn, called from the buttons of the last messages. */
export class Thread {
  constructor({ list, scroller, toEnd }, actions) {
    Object.assign(this, { list, scroller, toEnd, actions });
    this.turns = [];
    this.isAtEnd = true;
    this.followed = { top: 0, height: 0 }; // where following the end has last scrolled to, and how much there was
    scroller.addEventListener("scroll", () => this.#look(), { passive: true });
    toEnd.addEventListener("click", () => this.toTheEnd());
  }

  /** Shows a conversation. */
  show(conversation) {
    this.turns = conversation.messages.map((message) => new Turn(message, () => {}, false));
    this.list.replaceChildren(...this.turns.map((turn) => turn.node));
    this.refresh(false);
    this.toTheEnd();
  }

  /** Shows one more message. */
  add(message, grows = false) {
    const turn = new Turn(message, () => this.follow(), grows);
    this.turns.push(turn);
    this.list.append(turn.node);
    return turn;
  }

  /** Shows the last answer anew, for more of it is to come. */
  reopen() {
    const before = this.turns.pop();
    const turn = this.add(before.message, true);
    before.node.remove();
    return turn;
  }

  /** Takes away all messages but the first so many. */
  cut(count) {
    for (const turn of this.turns.splice(count)) turn.node.remove();
  }

  /** Gives each message its buttons. */
  refresh(isRunning) {
    this.turns.forEach((turn, i) => turn.tell(...(isRunning ? [] : this.#buttons(turn, i))));
  }

  #buttons({ message }, index) {
    const isLast = index === this.turns.length - 1;
    const isLastUser = message.role === "user" && index >= this.turns.length - 2;
    const found = [];
    if (isLastUser) found.push(button("Edit", () => this.actions.edit(index), { "aria-label": "Edit message" }));
    if (isLast && message.role === "user") found.push(button("Ask again", () => this.actions.again()));
    if (isLast && message.role === "assistant") {
      found.push(button("Regenerate", () => this.actions.again()));
      if (message.content && message.reason !== "stop") found.push(button("Continue", () => this.actions.goOn()));
    }
    return found;
  }

  /** Keeps the end in view, unless the reader has gone elsewhere. */
  follow() {
    const { scrollTop, scrollHeight } = this.scroller;
    const hasShrunk = scrollHeight < this.followed.height; // then it is no reader who has gone up
    if (scrollTop < this.followed.top - NEAR && !hasShrunk) this.isAtEnd = false; // the event that tells of it comes later
    this.toEnd.hidden = this.isAtEnd;
    if (!this.isAtEnd) return;
    this.scroller.scrollTop = scrollHeight;
    this.followed = { top: this.scroller.scrollTop, height: scrollHeight };
  }

  toTheEnd() {
    this.isAtEnd = true;
    this.followed = { top: 0, height: 0 };
    this.follow();
  }

  #look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.isAtEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    if (this.isAtEnd) this.toEnd.hidden = true;
  }
}
