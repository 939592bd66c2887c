// The chat page: puts its parts together.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { exported, forget, fresh, kept, titleOf } from "./conversations.js";
import { byId, download } from "./elements.js";
import { KeyDialog, keptKey } from "./key_dialog.js";
import { Models } from "./models.js";
import { Notice } from "./notice.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { Side } from "./side.js";
import { SpeedLine } from "./speed.js";
import { read, write } from "./storage.js";
import { Thread } from "./thread.js";

const THEMES = ["system", "light", "dark"];

const server = new Server();
const notice = new Notice(byId("notice"));
const keyDialog = new KeyDialog(useKey);
const models = new Models(server, byId("model"), notice, () => keyDialog.open());
const settings = new Settings(
  { dialog: byId("settings"), form: byId("settings-form"), system: byId("system"), fields: byId("sampling"), reset: byId("reset") },
  (text) => {
    chat.conversation.system = text;
    write("system", text);
    chat.keep();
  },
);
const speed = new SpeedLine(byId("speed"), byId("rate"), byId("share"));
const thread = new Thread(
  { list: byId("thread"), scroller: byId("main"), toEnd: byId("to-end") },
  {
    edit: (index) => composer.edit(index, chat.conversation.messages[index].content),
    again: () => chat.again(),
    goOn: () => chat.goOn(),
  },
);
const chat = new Chat({ server, thread, settings, speed }, { changed, announce, failed });
const composer = new Composer(send);
const side = new Side(
  { side: byId("side"), shade: byId("shade"), room: byId("room"), menu: byId("menu"), list: byId("conversations") },
  { open, remove },
);

/** Whether the message was taken. */
function send(text, from) {
  if (chat.isRunning) return false;
  if (!models.name) {
    models.connect(chat.conversation.model);
    return false;
  }
  chat.conversation.model = models.name;
  chat.ask(text, from);
  return true;
}

/** Brings everything around the messages up to date. */
function changed() {
  const { conversation, isRunning } = chat;
  const title = titleOf(conversation);
  byId("title").textContent = title;
  document.title = conversation.messages.length ? `${title} · headrace` : "headrace";
  byId("welcome").hidden = conversation.messages.length > 0;
  byId("export").disabled = conversation.messages.length === 0;
  showStop(isRunning);
  side.show(kept(), conversation.id);
  if (!chat.hasRoom) notice.say("The browser has no room left: this conversation will be gone when the page is closed.");
}

/** Send and Stop have one place; who was on the one is then on the other. */
function showStop(isRunning) {
  const before = document.activeElement;
  const wasHere = before === document.body || before === byId("send") || before === byId("stop");
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (wasHere && isRunning) byId("stop").focus();
  else if (wasHere) composer.focus();
}

function announce(words) {
  byId("said").textContent = words;
}

function failed(error) {
  if (error.status === 401) keyDialog.open();
}

function useKey(key) {
  server.key = key;
  notice.clear();
  models.connect(chat.conversation.model);
}

async function open(conversation) {
  composer.cancelEdit();
  await chat.open(conversation);
  models.choose(conversation.model);
  composer.focus();
}

function begin() {
  side.set(false);
  open(fresh(read("system") ?? "", models.name));
}

async function remove(conversation) {
  if (conversation.id === chat.conversation.id) await open(fresh(read("system") ?? "", models.name));
  forget(conversation.id);
  changed();
  notice.say(`Deleted “${titleOf(conversation)}”.`, "Undo", () => {
    write(`conversation.${conversation.id}`, conversation);
    changed();
  });
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  write("theme", theme);
}

function onKey(event) {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (side.isOpen) side.set(false);
  else if (chat.isRunning) chat.stop();
  else composer.cancelEdit();
}

function listen() {
  byId("new").addEventListener("click", begin);
  byId("stop").addEventListener("click", () => chat.stop());
  byId("open-settings").addEventListener("click", () => settings.open(chat.conversation.system));
  byId("export").addEventListener("click", () => download("conversation.json", exported(chat.conversation, settings.sampling)));
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme ?? "system";
    setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  });
  byId("model").addEventListener("change", () => {
    chat.conversation.model = models.name;
    chat.keep();
  });
  for (const idea of document.querySelectorAll(".idea")) idea.addEventListener("click", () => send(idea.textContent));
  document.addEventListener("keydown", onKey);
  window.addEventListener("storage", () => side.show(kept(), chat.conversation.id));
  window.addEventListener("pagehide", () => chat.isRunning && chat.keep());
}

listen();
server.key = keptKey();
byId("theme").textContent = `Theme: ${document.documentElement.dataset.theme ?? "system"}`;
const [latest] = kept();
open(latest ?? fresh(read("system") ?? "")).then(() => models.connect(chat.conversation.model));
