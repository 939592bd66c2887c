// The settings: the conversation's system prompt, and how tokens are drawn. A field left empty is not sent, but for
// those with a `sent`: the API draws from all of the distribution, where small models lose the thread.

import { element } from "./elements.js";
import { read, write } from "./storage.js";

const KEY = "sampling";
const FIELDS = [
  { name: "temperature", label: "Temperature", sent: 0.5, hint: "0: always the likeliest token", min: 0, max: 100, step: 0.01 },
  { name: "top_p", label: "Top p", sent: 0.9, hint: "the likeliest that make up this share", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", usual: "all", hint: "so many of the likeliest; 0: all", min: 0 },
  { name: "min_p", label: "Min p", usual: "0", hint: "those with this share of the likeliest one's chance", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", sent: 2048, hint: "the longest answer; Continue goes on", min: 1 },
  { name: "seed", label: "Seed", usual: "random", hint: "the same seed, the same answer", min: 0, max: Number.MAX_SAFE_INTEGER },
  { name: "repetition_penalty", label: "Repetition penalty", usual: "1", hint: "above 1: less of what was said", min: 0.01, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", usual: "0", hint: "once for what the answer has", step: 0.01 },
  { name: "frequency_penalty", label: "Frequency penalty", usual: "0", hint: "each time it has it", step: 0.01 },
  { name: "speculate", label: "Speculate", usual: "0", hint: "tokens guessed ahead: the same answer, often sooner", min: 0 },
];
const SENT = Object.fromEntries(FIELDS.filter(({ sent }) => sent !== undefined).map(({ name, sent }) => [name, sent]));

export class Settings {
  constructor({ dialog, form, system, fields, reset }, onSystem) {
    Object.assign(this, { dialog, form, system });
    this.kept = known(read(KEY));
    this.inputs = FIELDS.map((field) => this.#input(field));
    fields.append(...this.inputs.map((input, i) => rowOf(FIELDS[i], input)), this.#stop());
    system.addEventListener("input", () => onSystem(system.value));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close();
    });
    dialog.addEventListener("close", () => this.#restore());
    reset.addEventListener("click", () => this.#empty());
  }

  /** Shows them, with this system prompt. */
  open(systemPrompt) {
    this.system.value = systemPrompt;
    this.dialog.showModal();
  }

  /** The fields of a request. */
  get sampling() {
    const { stop, ...numbers } = this.kept;
    const stops = (stop ?? "").split("\n").filter(Boolean);
    return { ...SENT, ...numbers, ...(stops.length && { stop: stops }) };
  }

  #input({ name, usual, sent, min, max, step }) {
    const attributes = { id: `set-${name}`, type: "number", inputmode: "decimal", placeholder: usual ?? sent, min, max, step: step ?? 1 };
    const input = element("input", { ...attributes, "aria-describedby": `hint-${name}` });
    input.value = this.kept[name] ?? "";
    input.addEventListener("input", () => this.#take(name, input));
    return input;
  }

  #take(name, input) {
    if (!input.checkValidity()) return; // the browser says why when the form is sent
    if (Number.isNaN(input.valueAsNumber)) delete this.kept[name];
    else this.kept[name] = input.valueAsNumber;
    write(KEY, this.kept);
  }

  #stop() {
    this.stop = element("textarea", { id: "set-stop", rows: "2", "aria-describedby": "hint-stop" });
    this.stop.value = this.kept.stop ?? "";
    this.stop.addEventListener("input", () => {
      this.kept.stop = this.stop.value;
      write(KEY, this.kept);
    });
    return rowOf({ name: "stop", label: "Stop at", hint: "texts that end the answer, one a line" }, this.stop);
  }

  /** What was typed and is no valid value does not count, so it is not left standing. */
  #restore() {
    FIELDS.forEach(({ name }, i) => {
      this.inputs[i].value = this.kept[name] ?? "";
    });
  }

  #empty() {
    this.kept = {};
    write(KEY, this.kept);
    this.stop.value = "";
    this.#restore();
  }
}

function rowOf({ name, label, hint }, input) {
  const words = element("label", { for: input.id }, label);
  return element("div", { class: "row" }, words, input, element("small", { id: `hint-${name}` }, hint));
}

/** Of what was kept, what has a field and the right type. */
function known(kept) {
  const found = {};
  for (const { name } of FIELDS) if (Number.isFinite(kept?.[name])) found[name] = kept[name];
  if (typeof kept?.stop === "string") found.stop = kept.stop;
  return found;
}
