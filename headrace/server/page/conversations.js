// Conversations as the browser keeps them: each under a key of its own, so that two tabs do not lose each other's.

import { names, read, remove, write } from "./storage.js";

const BEGINNING = "conversation.";
const LONGEST_TITLE = 60;

/** A conversation without messages. */
export function fresh(system = "", model = "") {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, created: Date.now(), updated: Date.now(), system, model, messages: [] };
}

/** All that are kept, the last used first. */
export function kept() {
  const found = names(BEGINNING).map((name) => checked(read(name))).filter(Boolean);
  return found.sort((a, b) => b.updated - a.updated);
}

/** Keeps a conversation once there is something in it; false where the browser has no room. */
export function keep(conversation) {
  return conversation.messages.length === 0 || write(BEGINNING + conversation.id, conversation);
}

export const forget = (id) => remove(BEGINNING + id);

/** What to call it: how it begins. */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  const line = first.slice(0, 4 * LONGEST_TITLE).replace(/\s+/g, " ");
  return line.length > LONGEST_TITLE ? line.slice(0, LONGEST_TITLE - 1).trimEnd() + "…" : line || "New conversation";
}

/** The conversation as a file for other programs. */
export function exported(conversation, sampling) {
  const { id, created, updated, model, system, messages } = conversation;
  return JSON.stringify({ format: "headrace conversation", version: 1, id, created, updated, model, system, sampling, messages }, null, 2);
}

/** What was read, if it has the shape of a conversation; null otherwise. */
function checked(value) {
  const isText = (text) => typeof text === "string";
  if (!value || !isText(value.id) || !Array.isArray(value.messages)) return null;
  const messages = value.messages.filter((message) => isText(message?.content) && ["user", "assistant"].includes(message.role));
  const system = isText(value.system) ? value.system : "";
  const model = isText(value.model) ? value.model : "";
  return { id: value.id, created: Number(value.created) || 0, updated: Number(value.updated) || 0, system, model, messages };
}
