// How fast an answer comes, in words and as a bar: tokens per second beside what the machine's memory allows.

const count = (value) => value.toLocaleString("en");
const rate = (value) => (value < 10 ? value.toFixed(1) : count(Math.round(value)));

/** "287 tokens/s, 82 % of the roof", of what the server tells with include_speed. */
export function rateOf(speed) {
  if (!(speed?.tokens_per_s > 0)) return "";
  const share = speed.roof_fraction === null || speed.roof_fraction === undefined ? null : Math.round(100 * speed.roof_fraction);
  return `${rate(speed.tokens_per_s)} tokens/s` + (share === null ? "" : `, ${share} % of the roof`);
}

/** What is left to say of an answer: {speed, usage, model}. */
export function summaryOf({ speed, usage }) {
  const parts = [rateOf(speed)];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const known = cached ? `, ${count(cached)} of them known before` : "";
    parts.unshift(`${count(usage.completion_tokens)} tokens`);
    parts.push(`${count(usage.prompt_tokens)} tokens read${known}`);
  }
  if (speed?.time_to_first_token_s > 0) parts.push(`first after ${speed.time_to_first_token_s.toFixed(2)} s`);
  return parts.filter(Boolean).join(" · ");
}

/** The line below the message box. */
export class SpeedLine {
  constructor(line, rate, share) {
    Object.assign(this, { line, rate, share });
    this.clear();
  }

  clear() {
    this.say("");
  }

  say(words, fraction = null) {
    this.rate.textContent = words;
    this.line.classList.toggle("measured", fraction !== null);
    this.share.style.width = `${100 * Math.min(1, fraction ?? 0)}%`;
  }

  show(speed) {
    const words = rateOf(speed);
    if (words) this.say(words, speed.roof_fraction ?? null);
  }
}
