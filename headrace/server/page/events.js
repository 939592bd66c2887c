// Server-sent events out of a response's body.

/** The data of each event. Ends with the body; leaving early closes the connection. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let start = 0;
      for (let end = held.indexOf("\n"); end >= 0; end = held.indexOf("\n", start)) {
        const line = held.slice(start, held[end - 1] === "\r" ? end - 1 : end);
        start = end + 1;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      held = held.slice(start);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
