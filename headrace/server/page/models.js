// Which models there are, as a choice; and waiting for the server until it has one.

import { element } from "./elements.js";
import { told } from "./server.js";

const PERIOD_MS = 1000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Models {
  constructor(server, select, notice, wantsKey) {
    Object.assign(this, { server, select, notice, wantsKey });
    this.connecting = null;
  }

  /** The chosen one's name; empty while none is known. */
  get name() {
    return this.select.value;
  }

  /** Chooses one, if it is there. */
  choose(name) {
    if ([...this.select.options].some((option) => option.value === name)) this.select.value = name;
  }

  /** Asks the server until it is ready, and what it has. */
  connect(wanted) {
    this.connecting ??= this.#connect(wanted).finally(() => {
      this.connecting = null;
    });
    return this.connecting;
  }

  async #connect(wanted) {
    try {
      this.#list(await this.server.models());
      this.choose(wanted);
      while (!(await this.server.isReady())) {
        this.notice.say("The model is being loaded …");
        await pause(PERIOD_MS);
      }
      this.notice.clear();
    } catch (error) {
      if (error.status === 401) this.wantsKey();
      this.notice.say(told(error), "Try again", () => this.connect(wanted));
    }
  }

  #list(models) {
    const chosen = this.name;
    this.select.replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    this.choose(chosen);
  }
}
