// Markdown within a paragraph: emphasis, code, links. HTML is text like any other; pictures are links to them.
//
// One pass over the text makes entries: text, finished nodes {node, depth}, runs of marks {mark, count} and open
// brackets. A closing mark or bracket takes what lies behind its opening one, so each entry moves once per level.

import { element } from "./elements.js";
import { linkTo, safeAddress, withoutPunctuation } from "./links.js";

const DEEPEST = 16; // levels of emphasis: deeper ones stay text
const SPECIAL = /[\\`*_~[\]!<&\n]|https?:\/\//g;
const TARGET = /\(\s*(?:<([^<>\n]{0,2000})>|((?:[^\s()<>]|\([^\s()<>]{0,200}\)){0,2000}))(?:\s+(?:"[^"\n]{0,300}"|'[^'\n]{0,300}'))?\s*\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>`"]{1,2000}/y;
const BREAK = /<br *\/?>/iy;
const ENTITY = /&(?:amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": "\u00a0", "&#39;": "'" };
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const PUNCTUATION = /[\p{P}\p{S}]/u;

/** Puts the nodes of a text into an element. */
export function fill(parent, text) {
  for (const entry of emphasized(new Scanner(text).run())) parent.append(nodeOf(entry));
}

function nodeOf(entry) {
  if (typeof entry === "string") return document.createTextNode(entry);
  return entry.node ?? document.createTextNode(entry.text ?? entry.mark.repeat(entry.count));
}

/** An element around entries, as an entry. */
function around(node, entries, depth) {
  for (const entry of entries) node.append(nodeOf(entry));
  return { node, depth };
}

const deepest = (entries) => entries.reduce((most, entry) => Math.max(most, entry.depth ?? 0), 0);

class Scanner {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.entries = [];
    this.brackets = []; // where open ones are in entries
    this.ticks = null; // runs of backticks by length, in order
  }

  run() {
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const start = SPECIAL.exec(this.text)?.index ?? this.text.length;
      if (start > this.at) this.entries.push(this.text.slice(this.at, start));
      this.at = start;
      if (start < this.text.length) this.take(this.text[start]);
    }
    return this.entries;
  }

  take(letter) {
    if (letter === "\n") this.push({ node: element("br"), depth: 0 }, 1);
    else if (letter === "\\") this.escape();
    else if (letter === "`") this.code();
    else if ("*_~".includes(letter)) this.mark(letter);
    else if (letter === "[") this.bracket("[");
    else if (letter === "]") this.closeBracket();
    else if (letter === "!" && this.text[this.at + 1] === "[") this.bracket("![");
    else if (letter === "<") this.angle();
    else if (letter === "&") this.entity();
    else if (letter === "h") this.bare();
    else this.push(letter, 1);
  }

  /** An entry for the next so many characters. */
  push(entry, length) {
    this.entries.push(entry);
    this.at += length;
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  runLength(letter) {
    let end = this.at;
    while (this.text[end] === letter) end++;
    return end - this.at;
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") this.at += 1;
    else if (ESCAPABLE.test(next)) this.push(next, 2);
    else this.push("\\", 1);
  }

  code() {
    const length = this.runLength("`");
    const close = this.closingTicks(length);
    if (close < 0) return this.push("`".repeat(length), length);
    let inside = this.text.slice(this.at + length, close).replaceAll("\n", " ");
    if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
    return this.push({ node: element("code", {}, inside), depth: 1 }, close + length - this.at);
  }

  /** Where the next run of as many backticks is. Runs are found once: unclosed ones must not be searched for again. */
  closingTicks(length) {
    if (this.ticks === null) {
      this.ticks = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        const places = this.ticks.get(run[0].length) ?? [];
        if (!places.length) this.ticks.set(run[0].length, places);
        places.push(run.index);
      }
      for (const places of this.ticks.values()) places.reverse();
    }
    const places = this.ticks.get(length) ?? [];
    while (places.length && places.at(-1) <= this.at) places.pop();
    return places.at(-1) ?? -1;
  }

  mark(letter) {
    const count = this.runLength(letter);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + count] ?? " ";
    const isSpace = (character) => /\s/.test(character);
    const left = !isSpace(after) && (!PUNCTUATION.test(after) || isSpace(before) || PUNCTUATION.test(before));
    const right = !isSpace(before) && (!PUNCTUATION.test(before) || isSpace(after) || PUNCTUATION.test(after));
    const inWord = letter === "_" && left && right;
    const opens = left && (!inWord || PUNCTUATION.test(before));
    const closes = right && (!inWord || PUNCTUATION.test(after));
    const isMark = (opens || closes) && (letter !== "~" || count === 2);
    this.push(isMark ? { mark: letter, count, total: count, opens, closes } : letter.repeat(count), count);
  }

  bracket(text) {
    this.brackets.push(this.entries.length);
    this.push({ text, depth: 0 }, text.length);
  }

  closeBracket() {
    const open = this.brackets.pop();
    this.at += 1;
    const target = open === undefined ? null : this.match(TARGET);
    const address = target && safeAddress(target[1] ?? target[2]);
    if (!address) return this.entries.push("]"); // what was no link is shown as it was written
    const inside = emphasized(this.entries.splice(open + 1));
    const isPicture = this.entries.pop().text === "![";
    const isInside = isPicture && this.brackets.length > 0; // no links within links
    if (isPicture) inside.unshift("picture: ");
    else this.brackets = [];
    const node = isInside ? element("span") : linkTo(address);
    return this.push(around(node, inside.length ? inside : [address], deepest(inside) + 1), target[0].length);
  }

  angle() {
    const link = this.match(AUTOLINK);
    const address = link && safeAddress(link[1]);
    if (address && !this.brackets.length) this.push(around(linkTo(address), [link[1]], 1), link[0].length);
    else if (this.match(BREAK)) this.push({ node: element("br"), depth: 0 }, this.match(BREAK)[0].length);
    else this.push("<", 1);
  }

  entity() {
    const found = this.match(ENTITY);
    this.push(found ? ENTITIES[found[0]] : "&", found ? found[0].length : 1);
  }

  bare() {
    const isInWord = /\w/.test(this.text[this.at - 1] ?? " ");
    const found = isInWord || this.brackets.length ? null : this.match(BARE);
    const written = found ? withoutPunctuation(found[0]) : "";
    const address = safeAddress(written);
    if (address) this.push(around(linkTo(address), [written], 1), written.length);
    else this.push("h", 1);
  }
}

/** Entries in which marks that belong together have become elements around what was between them. */
function emphasized(entries) {
  const done = [];
  const openers = { "*": [], _: [], "~": [] }; // where marks are in done that may yet be closed
  for (const entry of entries) {
    if (!entry.mark) {
      done.push(entry);
      continue;
    }
    const rest = { ...entry };
    if (rest.closes) close(done, openers, rest);
    if (rest.count === 0) continue;
    if (rest.opens) openers[rest.mark].push(done.length);
    done.push(rest);
  }
  return done;
}

function close(done, openers, closer) {
  const mine = openers[closer.mark];
  while (closer.count && mine.length) {
    const at = mine.at(-1);
    const opener = done[at];
    const isBoth = opener.closes || closer.opens;
    if (isBoth && (opener.total + closer.total) % 3 === 0 && closer.total % 3 !== 0) return; // as CommonMark has it
    const inside = done.splice(at + 1);
    for (const others of Object.values(openers)) while (others.length && others.at(-1) > at) others.pop();
    const depth = deepest(inside) + 1;
    if (depth > DEEPEST) {
      for (const entry of inside) done.push(entry);
      mine.length = 0;
      return;
    }
    const width = closer.count >= 2 && opener.count >= 2 ? 2 : 1;
    opener.count -= width;
    closer.count -= width;
    if (opener.count === 0) {
      done.pop();
      mine.pop();
    }
    const tag = closer.mark === "~" ? "del" : width === 2 ? "strong" : "em";
    done.push(around(element(tag), inside, depth));
  }
}
