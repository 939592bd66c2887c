// A conversation being held: what is asked, the answer as it comes, what of it is kept.

import { fresh, keep } from "./conversations.js";
import { button } from "./elements.js";
import { told } from "./server.js";

const KEEP_MS = 1000; // an answer that is still coming is kept so often

export class Chat {
  /** shows: what the rest of the page does about it: changed(), announce(words), failed(error). */
  constructor({ server, thread, settings, speed }, shows) {
    Object.assign(this, { server, thread, settings, speed, shows });
    this.conversation = fresh();
    this.stopping = null; // the AbortController of the answer that is coming
    this.running = null; // a promise of its end
    this.keptMs = 0;
    this.hasRoom = true;
  }

  get isRunning() {
    return this.stopping !== null;
  }

  /** Shows another conversation, once what still comes for this one has been stopped. */
  async open(conversation) {
    this.stop();
    await this.running;
    this.conversation = conversation;
    this.thread.show(conversation);
    this.speed.clear();
    this.shows.changed();
  }

  /** Asks something. Messages from number `from` on are replaced. */
  ask(content, from = this.conversation.messages.length) {
    const { messages } = this.conversation;
    messages.length = from;
    this.thread.cut(from);
    const message = { role: "user", content: content.toWellFormed?.() ?? content };
    messages.push(message);
    this.thread.add(message);
    this.thread.toTheEnd();
    this.again();
  }

  /** Has the last question answered, anew if it was answered before. */
  again() {
    const { messages } = this.conversation;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    this.thread.cut(messages.length);
    const message = { role: "assistant", content: "" };
    messages.push(message);
    this.running = this.#run(message, this.thread.add(message, true));
  }

  /** Has the last answer written on. */
  goOn() {
    this.running = this.#run(this.conversation.messages.at(-1), this.thread.reopen());
  }

  stop() {
    this.stopping?.abort();
  }

  /** Keeps the conversation in the browser, if that has room. */
  keep() {
    this.keptMs = performance.now();
    this.conversation.updated = Date.now();
    this.hasRoom = keep(this.conversation);
  }

  async #run(message, turn) {
    const body = this.#body(message);
    this.stopping = new AbortController();
    this.#begin(message);
    let failure = null;
    try {
      await this.#read(message, turn, body, this.stopping.signal);
    } catch (error) {
      failure = error;
    }
    this.stopping = null;
    this.#end(message, turn, failure);
  }

  #body(message) {
    const { messages, system, model } = this.conversation;
    const said = messages.filter((each) => each.content).map(({ role, content }) => ({ role, content }));
    if (system.trim()) said.unshift({ role: "system", content: system });
    const goesOn = message.content === "" ? {} : { continue_final_message: true };
    const stream = { stream: true, stream_options: { include_usage: true, include_speed: true } };
    return { model, messages: said, ...stream, ...goesOn, ...this.settings.sampling };
  }

  #begin(message) {
    delete message.reason;
    this.keep();
    this.thread.refresh(true);
    this.thread.follow();
    this.speed.say("reading …");
    this.shows.announce("Answering.");
    this.shows.changed();
  }

  async #read(message, turn, body, signal) {
    for await (const chunk of this.server.chat(body, signal)) {
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        message.content += choice.delta.content;
        turn.view.grow(choice.delta.content);
      }
      if (choice?.finish_reason) message.reason = choice.finish_reason;
      if (chunk.usage) message.usage = chunk.usage;
      if (chunk.headrace) {
        message.speed = chunk.headrace;
        this.speed.show(chunk.headrace);
      }
      if (performance.now() - this.keptMs > KEEP_MS) this.keep();
    }
  }

  #end(message, turn, failure) {
    const isStopped = failure?.name === "AbortError";
    turn.finish();
    if (failure) message.reason = isStopped ? "stopped" : "lost";
    if (failure && !message.content) this.#withdraw(turn, isStopped);
    if (!(message.speed?.tokens_per_s > 0)) this.speed.clear();
    this.keep();
    this.thread.refresh(false);
    if (isStopped) this.shows.announce("Stopped.");
    else if (failure) this.#explain(message, turn, failure);
    else this.shows.announce(`Answer: ${turn.words}`);
    this.thread.follow();
    this.shows.changed();
  }

  /** An answer that never began is no part of the conversation; its place is kept for what went wrong. */
  #withdraw(turn, isStopped) {
    this.conversation.messages.pop();
    if (isStopped) this.thread.cut(this.conversation.messages.length);
  }

  #explain(message, turn, failure) {
    const ways = message.content ? [] : [button("Try again", () => this.again())];
    turn.fail(told(failure), ...ways);
    this.shows.failed(failure);
  }
}
