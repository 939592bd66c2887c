// Asks for the server's API key. It goes into no address, and is kept only if the reader wants that, for this tab.

import { byId } from "./elements.js";

const NAME = "headrace.key";

/** The key that this tab has kept. */
export function keptKey() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return "";
  }
}

function keepKey(key) {
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // It is forgotten when the page is closed.
  }
}

export class KeyDialog {
  /** use: called with the key. */
  constructor(use) {
    this.dialog = byId("key-dialog");
    this.input = byId("key");
    byId("cancel-key").addEventListener("click", () => this.dialog.close());
    this.input.addEventListener("input", () => this.input.setCustomValidity(""));
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(use);
    });
  }

  open() {
    if (this.dialog.open) return;
    this.input.value = "";
    this.dialog.showModal();
  }

  #submit(use) {
    const key = this.input.value.trim();
    if (!/^[ -~]+$/.test(key)) {
      this.input.setCustomValidity("A key is made of letters, digits and signs without accents.");
      this.input.reportValidity();
      return;
    }
    keepKey(byId("keep-key").checked ? key : "");
    this.dialog.close();
    this.input.value = "";
    use(key);
  }
}
