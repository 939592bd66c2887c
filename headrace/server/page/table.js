// Tables in Markdown: lines of cells between upright bars.

import { element } from "./elements.js";
import { fill } from "./inline.js";

const MOST_COLUMNS = 100;

/** The cells of a line. */
export function cellsOf(line) {
  const cells = [""];
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") cells[cells.length - 1] += line[++i];
    else if (line[i] === "|") cells.push("");
    else cells[cells.length - 1] += line[i];
  }
  if (!cells[0].trim()) cells.shift();
  if (cells.length && !cells.at(-1).trim()) cells.pop();
  return cells.map((cell) => cell.trim());
}

/** How the columns are aligned, of the line below the heads; null where it is no such line. */
export function alignmentsOf(line) {
  if (!line.includes("|") || !/^[|:\- \t]+$/.test(line)) return null;
  const cells = cellsOf(line);
  if (!cells.length || cells.length > MOST_COLUMNS || !cells.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return cells.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
}

/** A table with its heads, and the element its rows go into. */
export function tableOf(heads, alignments) {
  const body = element("tbody");
  const head = element("thead", {}, row("th", heads, alignments));
  const table = element("table", {}, head, body);
  return { node: element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table), body };
}

/** A row of as many cells as there are columns. */
export function row(tag, cells, alignments) {
  const made = element("tr");
  alignments.forEach((alignment, i) => {
    const cell = element(tag, { class: alignment, scope: tag === "th" ? "col" : null });
    fill(cell, cells[i] ?? "");
    made.append(cell);
  });
  return made;
}
