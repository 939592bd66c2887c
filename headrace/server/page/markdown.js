// Markdown as it comes: a whole line is made into elements once and for all.
//
// Only the open paragraph and the line that is still being written are drawn again, so a long answer costs what a short
// one costs, letter for letter. The unfinished line is drawn as if it were whole, and taken back when more of it comes:
// what it added are the last children of elements that were open before.

import { codeBlock } from "./code_block.js";
import { element } from "./elements.js";
import { fill } from "./inline.js";
import { alignmentsOf, cellsOf, row, tableOf } from "./table.js";

const DEEPEST = 12; // lists and quotes within each other
const LONGEST = 2000; // characters that are drawn again; a longer paragraph or line is drawn in parts
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,3}[.)])( +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const BLOCKS = [QUOTE, ITEM, FENCE, HEADING, RULE];

export class Markdown {
  constructor(root) {
    this.stack = [{ node: root }]; // the element of the text, then open quotes and items, the innermost last
    this.leaf = null; // what lines go into: {kind: "text", node, text}, {kind: "code", ...}, {kind: "table", ...}
    this.partial = ""; // the unfinished line
    this.joins = false; // whether the next line goes on with a long one that was cut
    this.isPreview = false;
    this.before = null; // what was open before the unfinished line was drawn
  }

  /** Takes more text. */
  append(text) {
    this.takeBack();
    const lines = (this.partial + text).split("\n");
    this.partial = lines.pop();
    for (const line of lines) this.line(line);
    while (this.partial.length > LONGEST) this.cut();
    this.preview();
  }

  /** Nothing follows. */
  finish() {
    this.takeBack();
    if (this.partial) this.line(this.partial);
    this.partial = "";
    this.closeLeaf();
  }

  // The unfinished line

  preview() {
    const open = this.stack.flatMap(({ node }) => (isList(node.lastElementChild) ? [node, node.lastElementChild] : [node]));
    if (this.leaf && this.leaf.kind !== "text") open.push(this.leaf.node);
    const ends = open.map((node) => [node, node.lastChild]);
    this.before = { stack: [...this.stack], leaf: this.leaf, joins: this.joins, ends };
    this.isPreview = true;
    if (this.partial) this.line(this.partial);
    this.draw();
    this.isPreview = false;
  }

  takeBack() {
    if (!this.before) return;
    const { ends, ...state } = this.before;
    for (const [node, end] of ends) while (node.lastChild !== end) node.lastChild.remove();
    Object.assign(this, state);
    this.before = null;
  }

  /** Draws the beginning of a long line, which the rest then joins. */
  cut() {
    const space = this.partial.lastIndexOf(" ", LONGEST - 1) + 1;
    const isPair = /[\ud800-\udbff]/.test(this.partial[LONGEST - 1]);
    const end = space || LONGEST - (isPair ? 1 : 0);
    this.line(this.partial.slice(0, end));
    this.partial = this.partial.slice(end);
    this.joins = true;
  }

  // Lines

  line(text) {
    if (text.endsWith("\r")) text = text.slice(0, -1);
    if (this.joins) return this.join(text);
    let rest = text.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
    const isCode = this.leaf?.kind === "code";
    let depth = 1;
    for (; depth < this.stack.length; depth++) {
      const inside = within(this.stack[depth], rest, isCode);
      if (inside === null) break;
      rest = inside;
    }
    if (depth < this.stack.length) {
      const goesOn = this.leaf?.kind === "text" && rest.trim() && !BLOCKS.some((block) => block.test(rest));
      if (goesOn) return this.addText(rest);
      this.closeLeaf();
      this.stack.length = depth;
    } else if (isCode) {
      return this.addCode(rest);
    }
    return this.addBlock(this.openContainers(rest));
  }

  join(text) {
    this.joins = false;
    if (this.leaf?.kind === "code") this.leaf.node.append(text);
    else if (this.leaf?.kind === "text") this.setText(this.leaf.text + text);
    else this.addText(text);
  }

  openContainers(rest) {
    while (this.stack.length < DEEPEST) {
      const quote = QUOTE.exec(rest);
      const item = quote || RULE.test(rest) ? null : ITEM.exec(rest);
      if (!quote && !item) break;
      this.closeLeaf();
      if (quote) this.open({ kind: "quote", node: element("blockquote") }, this.stack.at(-1).node);
      else this.openItem(item);
      rest = rest.slice((quote ?? item)[0].length);
      if (item) rest = rest.replace(/^\[([ xX])\](?= )/, (_, mark) => (mark === " " ? "☐" : "☑"));
    }
    return rest;
  }

  open(container, parent) {
    parent.append(container.node);
    this.stack.push(container);
  }

  openItem([whole, lead, mark]) {
    const tag = mark.length > 1 ? "ol" : "ul";
    const parent = this.stack.at(-1).node;
    let list = parent.lastElementChild;
    if (list?.localName !== tag) {
      const start = tag === "ol" ? parseInt(mark, 10) : 1;
      list = element(tag, { start: start === 1 ? null : start });
      parent.append(list);
    }
    this.open({ kind: "item", node: element("li"), lead: lead.length, indent: whole.length }, list);
  }

  addBlock(rest) {
    if (!rest.trim()) return this.closeLeaf();
    const fence = FENCE.exec(rest);
    const heading = HEADING.exec(rest);
    if (fence) return this.openCode(fence);
    if (heading) return this.addHeading(heading);
    if (RULE.test(rest)) return this.addNode(element("hr"));
    if (this.leaf?.kind === "table" && rest.includes("|")) return this.addRow(rest);
    if (this.leaf?.kind === "text" && !this.isPreview && this.openTable(rest)) return undefined;
    return this.addText(rest);
  }

  /** A block of its own. */
  addNode(node) {
    this.closeLeaf();
    this.stack.at(-1).node.append(node);
  }

  addHeading([, marks, words]) {
    const text = (words ?? "").trim();
    let end = text.length;
    while (text[end - 1] === "#") end--;
    const node = element(`h${Math.min(6, marks.length + 2)}`); // the page itself has the first two
    fill(node, text.slice(0, end).trim());
    this.addNode(node);
  }

  openCode([, fence, info]) {
    const { node, code } = codeBlock(info);
    this.addNode(node);
    this.leaf = { kind: "code", node: code, fence, isBegun: false };
  }

  addCode(rest) {
    const { fence, node, isBegun } = this.leaf;
    const closing = FENCE.exec(rest);
    const isEnd = closing?.[1].startsWith(fence) && !closing[2].trim();
    if (!isEnd) node.append(isBegun ? "\n" + rest : rest);
    this.leaf = isEnd ? null : { ...this.leaf, isBegun: true };
  }

  /** Makes the last line of the paragraph a table's heads, if this is the line that goes below them. */
  openTable(line) {
    const alignments = alignmentsOf(line);
    if (!alignments) return false;
    const lines = this.leaf.text.split("\n");
    if (alignments.length !== cellsOf(lines.at(-1)).length) return false;
    const heads = cellsOf(lines.pop());
    if (lines.length) this.setText(lines.join("\n"));
    else this.leaf.node.remove();
    if (!lines.length) this.leaf = null;
    const { node, body } = tableOf(heads, alignments);
    this.addNode(node);
    this.leaf = { kind: "table", node: body, alignments };
    return true;
  }

  addRow(line) {
    this.leaf.node.append(row("td", cellsOf(line), this.leaf.alignments));
  }

  addText(rest) {
    const text = rest.trimStart();
    if (this.leaf?.kind === "text") return this.setText(this.leaf.text + "\n" + text);
    const node = element("p");
    this.addNode(node);
    this.leaf = { kind: "text", node, paragraph: node, text: "" };
    return this.setText(text);
  }

  setText(text) {
    this.leaf = { ...this.leaf, text };
    if (this.isPreview || text.length <= LONGEST) return;
    this.draw();
    const node = element("span");
    this.leaf.paragraph.append(node);
    this.leaf = { ...this.leaf, node, text: "" };
  }

  draw() {
    if (this.leaf?.kind !== "text") return;
    this.leaf.node.replaceChildren();
    fill(this.leaf.node, this.leaf.text);
  }

  closeLeaf() {
    this.draw();
    this.leaf = null;
  }
}

const isList = (node) => node?.localName === "ul" || node?.localName === "ol";

/** What a line says within an open container; null where the container has ended before it. */
function within(container, rest, isCode) {
  if (container.kind === "quote") return QUOTE.test(rest) ? rest.replace(QUOTE, "") : null;
  const indent = rest.length - rest.trimStart().length;
  // Models indent by two what belongs to an item, whatever its number's width is.
  const isInside = isCode || !rest.trim() || indent >= Math.min(container.indent, container.lead + 2);
  return isInside ? rest.slice(Math.min(indent, container.indent)) : null;
}
