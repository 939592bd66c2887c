// A block of code, with its language and a button that copies it.

import { copyText, element } from "./elements.js";

const SAID_MS = 1500;

/** The block, and the element its text goes into. */
export function codeBlock(info) {
  const language = info.trim().split(/\s/)[0].slice(0, 30);
  const code = element("code");
  const copy = element("button", { type: "button", class: "quiet copy", "aria-label": "Copy code" }, "Copy");
  const head = element("div", { class: "code-head" }, element("span", {}, language), copy);
  const about = language ? `Code, ${language}` : "Code";
  const pre = element("pre", { tabindex: "0", role: "group", "aria-label": about }, code);
  copy.addEventListener("click", async () => sayDone(copy, await copyText(code.textContent)));
  return { node: element("div", { class: "code" }, head, pre), code };
}

/** Says on a button for a moment whether its work was done. */
export function sayDone(button, isDone) {
  const words = button.dataset.words ?? button.textContent;
  button.dataset.words = words;
  button.textContent = isDone ? "Copied" : "Not possible";
  setTimeout(() => { button.textContent = words; }, SAID_MS);
}
