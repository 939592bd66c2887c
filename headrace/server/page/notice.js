// A line above the messages: what the reader should know now, and what can be done about it.

import { button, element } from "./elements.js";

export class Notice {
  constructor(node) {
    this.node = node;
    this.words = "";
  }

  /** Says something; an action has a label and is called once. */
  say(words, label = null, action = null) {
    if (words === this.words) return; // said already, and read aloud
    this.clear();
    this.words = words;
    this.node.append(element("p", {}, words));
    if (label) this.node.append(button(label, () => this.#act(action)));
  }

  clear() {
    this.words = "";
    this.node.replaceChildren();
  }

  #act(action) {
    this.clear();
    action();
  }
}
