// The server this page came from: its models, its health, and answers as they come.

import { events } from "./events.js";

/** What the server said instead of an answer. */
export class Refusal extends Error {
  constructor(status, { message, code } = {}, retryAfter = null) {
    super(message || `The server answered with status ${status}.`);
    this.status = status;
    this.code = code ?? null;
    this.retryAfter = retryAfter;
  }
}

/** The server did not answer, or not to the end. */
export class Lost extends Error {}

export class Server {
  key = "";

  /** Whether the first model is loaded; throws where it never will be. */
  async isReady() {
    try {
      await this.#send("health");
      return true;
    } catch (error) {
      if (error.code === "loading") return false;
      throw error;
    }
  }

  /** The models there are: {id, loaded}. */
  async models() {
    const response = await this.#send("v1/models");
    return (await response.json()).data;
  }

  /** Chunks of an answer. */
  async *chat(body, signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await this.#send("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    try {
      for await (const text of events(response.body)) {
        if (text === "[DONE]") return;
        const chunk = JSON.parse(text);
        if (chunk.error) throw new Refusal(503, chunk.error);
        yield chunk;
      }
    } catch (error) {
      if (error instanceof Refusal || error.name === "AbortError") throw error;
    }
    throw new Lost("The connection was lost in the middle of the answer.");
  }

  async #send(path, options = {}) {
    const key = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    let response;
    try {
      response = await fetch(path, { cache: "no-store", ...options, headers: { ...options.headers, ...key } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("The server does not answer.");
    }
    if (!response.ok) throw await refusalOf(response);
    return response;
  }
}

async function refusalOf(response) {
  const told = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("Retry-After"));
  return new Refusal(response.status, told.error ?? {}, seconds > 0 ? seconds : null);
}

/** What went wrong, in words for people. */
export function told(error) {
  if (error.status === 401) return "The server wants an API key.";
  if (error.status === 429) return `The server is busy. Try again in ${error.retryAfter ?? 5} s.`;
  if (error.code === "loading") return "The model is still being loaded.";
  if (error.code === "shutting_down") return "The server is shutting down.";
  if (error.code === "context_length_exceeded") {
    return `The conversation is too long for this model. Begin a new one, or allow fewer tokens. (${error.message})`;
  }
  return error.message || "Something went wrong.";
}
