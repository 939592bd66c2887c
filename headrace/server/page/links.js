// Which addresses of a model's become links, and what such a link is.

import { element } from "./elements.js";

const SAFE = ["http:", "https:", "mailto:"];

/** The address in full if a click on it can do no harm here; null otherwise. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return SAFE.includes(address.protocol) ? address.href : null;
  } catch {
    return null; // nothing of ours is linked, so what is no full address leads nowhere
  }
}

/** A link that tells where it leads, and tells nobody where it was. */
export function linkTo(address) {
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** A bare address without the punctuation that ends the sentence around it. */
export function withoutPunctuation(address) {
  let open = 0;
  for (const letter of address) open += letter === "(" ? 1 : letter === ")" ? -1 : 0;
  let end = address.length;
  for (; end > 0; end--) {
    const last = address[end - 1];
    if (last === ")" && open < 0) open++;
    else if (!".,;:!?'*_~]}".includes(last)) break;
  }
  return address.slice(0, end);
}
