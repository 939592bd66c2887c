// An answer on the page: what the model thought first, folded away, then its Markdown.

import { element } from "./elements.js";
import { Markdown } from "./markdown.js";

const OPEN = "<think>";
const CLOSE = "</think>";
const LEAST_MS = 16;
const REST = 4; // of the time goes to everything else: drawing takes a fifth of it at most

export class AnswerView {
  constructor(root, onDrawn = () => {}) {
    this.root = root;
    this.onDrawn = onDrawn;
    this.markdown = null; // once it has begun
    this.thoughts = null; // while they come
    this.held = ""; // text that may be the beginning of a mark
    this.waiting = ""; // text that has not been drawn
    this.timer = null;
    this.tookMs = 0;
  }

  /** Takes more text, to be drawn soon. */
  grow(text) {
    this.waiting += text;
    this.timer ??= setTimeout(() => this.draw(), Math.max(LEAST_MS, REST * this.tookMs));
  }

  /** Draws what has come. */
  draw() {
    clearTimeout(this.timer);
    this.timer = null;
    const began = performance.now();
    const text = this.waiting;
    this.waiting = "";
    if (text) this.append(text);
    this.onDrawn();
    this.tookMs = performance.now() - began;
  }

  /** Nothing follows. */
  finish() {
    this.draw();
    const rest = this.held;
    this.held = "";
    if (this.thoughts) this.thoughts.append(rest);
    else this.answer(rest);
    this.markdown?.finish();
  }

  append(text) {
    if (this.markdown) return this.markdown.append(text);
    this.held += text;
    if (!this.thoughts && !this.open()) return undefined;
    return this.markdown ? undefined : this.think();
  }

  /** Decides whether there are thoughts at all; false while nobody can know. */
  open() {
    const begin = this.held.trimStart();
    if (begin.length < OPEN.length && OPEN.startsWith(begin)) return false;
    if (!begin.startsWith(OPEN)) {
      this.answer(this.held);
      return true;
    }
    this.held = begin.slice(OPEN.length).trimStart();
    this.thoughts = element("div", { class: "thoughts" });
    this.root.append(element("details", {}, element("summary", {}, "Thoughts"), this.thoughts));
    return true;
  }

  think() {
    const end = this.held.indexOf(CLOSE);
    const kept = end >= 0 ? end : Math.max(0, this.held.length - CLOSE.length + 1);
    this.thoughts.append(this.held.slice(0, kept));
    this.held = this.held.slice(kept);
    if (end < 0) return;
    this.thoughts = null;
    this.answer(this.held.slice(CLOSE.length).trimStart());
  }

  answer(text) {
    this.held = "";
    if (!this.markdown && !text) return;
    if (!this.markdown) {
      const node = element("div", { class: "answer" });
      this.root.append(node);
      this.markdown = new Markdown(node);
    }
    this.markdown.append(text);
  }
}
