// What the browser keeps, as JSON by name. A browser that keeps nothing, or has no room left, is no error.

const PREFIX = "headrace.";

/** What was kept under a name; null where there is nothing, or nothing that can be read. */
export function read(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** Keeps a value; whether there was room. */
export function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Forgets it. */
export function remove(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // Nothing was kept.
  }
}

/** The names that begin so. */
export function names(beginning) {
  try {
    const begin = PREFIX + beginning;
    return Object.keys(localStorage).filter((key) => key.startsWith(begin)).map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}
