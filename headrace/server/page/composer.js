// The message box: Enter sends, Shift and Enter begins a line; a sent message may be edited and sent again.

import { byId } from "./elements.js";

const TOUCH = window.matchMedia("(hover: none) and (pointer: coarse)"); // its Enter key is for new lines

export class Composer {
  /** send: called with a text and, when it takes the place of an earlier message, that message's number. */
  constructor(send) {
    this.send = send;
    this.prompt = byId("prompt");
    this.edited = null;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.prompt.addEventListener("keydown", (event) => this.#key(event));
    this.prompt.addEventListener("input", () => this.#fit());
    byId("cancel-edit").addEventListener("click", () => this.cancelEdit());
  }

  submit() {
    const text = this.prompt.value;
    if (!text.trim() || !this.send(text, this.edited ?? undefined)) return;
    this.#set(null, "");
  }

  /** Has an earlier message changed. */
  edit(index, text) {
    this.#set(index, text);
    this.prompt.focus();
  }

  /** Whether there was anything to cancel. */
  cancelEdit() {
    const wasEditing = this.edited !== null;
    if (wasEditing) {
      this.#set(null, "");
      this.prompt.focus();
    }
    return wasEditing;
  }

  /** Puts the cursor there, but brings up no keyboard on a screen. */
  focus() {
    if (!TOUCH.matches) this.prompt.focus();
  }

  #set(edited, text) {
    this.edited = edited;
    this.prompt.value = text;
    byId("editing").hidden = edited === null;
    this.#fit();
  }

  #key(event) {
    const isEnter = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
    if (!isEnter || TOUCH.matches) return;
    event.preventDefault();
    this.submit();
  }

  #fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }
}
