// The list of conversations, which on a narrow screen is a drawer.

import { titleOf } from "./conversations.js";
import { element } from "./elements.js";

const NARROW = window.matchMedia("(max-width: 52rem)");

export class Side {
  constructor({ side, shade, room, menu, list }, actions) {
    Object.assign(this, { side, shade, room, menu, list, actions });
    this.isOpen = false;
    menu.addEventListener("click", () => this.set(!this.isOpen));
    shade.addEventListener("click", () => this.set(false));
    NARROW.addEventListener("change", () => this.set(false));
    this.set(false);
  }

  /** Opens or closes the drawer; on a wide screen the list is always there. */
  set(isOpen) {
    const wasOpen = this.isOpen;
    this.isOpen = isOpen && NARROW.matches;
    this.side.classList.toggle("open", this.isOpen);
    this.side.inert = NARROW.matches && !this.isOpen;
    this.room.inert = this.isOpen;
    this.shade.hidden = !this.isOpen;
    this.menu.setAttribute("aria-expanded", String(this.isOpen));
    if (this.isOpen) this.side.querySelector("button").focus();
    else if (wasOpen) this.menu.focus();
  }

  /** Lists these conversations, one of which is shown. */
  show(conversations, current) {
    this.list.replaceChildren(...conversations.map((conversation) => this.#entry(conversation, conversation.id === current)));
  }

  #entry(conversation, isCurrent) {
    const title = titleOf(conversation);
    const open = element("button", { type: "button", class: "quiet open", "aria-current": isCurrent ? "true" : null }, title);
    open.addEventListener("click", () => {
      this.set(false);
      this.actions.open(conversation);
    });
    const remove = element("button", { type: "button", class: "quiet remove", "aria-label": `Delete “${title}”` }, "×");
    remove.addEventListener("click", () => this.actions.remove(conversation));
    return element("li", {}, open, remove);
  }
}
