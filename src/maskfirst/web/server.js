/* Requests: with the key, again while the server is busy, and with errors that say what the server said. */

const TRIES = 5;
const LONGEST_WAIT = 60; // s, of what Retry-After may ask for
const KEY = "maskfirst-key";

export class ServerError extends Error {
  constructor(message, { status = 0, code = "", id = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.id = id;
  }
}

let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // Storage is switched off: the key is asked for again after a reload.
}

/** Kept for this tab only. */
export function setKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // As above.
  }
}

export function hasKey() {
  return Boolean(key);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, 1000 * seconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function errorOf(response) {
  const said = await response.json().catch(() => null);
  return new ServerError(said?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: said?.error?.code,
    id: said?.request_id ?? response.headers.get("X-Request-ID") ?? "",
  });
}

/** The JSON that a route answers. `waiting(seconds, again, most)` is told of every wait for a busy server; what it
    returns is called when the wait is over. */
export async function ask(route, { body, signal, waiting } = {}) {
  for (let again = 1; ; again++) {
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/octet-stream"; // what a file's own type says may be wrong
    let response;
    try {
      response = await fetch(route, { method: body ? "POST" : "GET", body, headers, signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("The server cannot be reached");
    }
    if (response.ok) {
      try {
        return await response.json();
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new ServerError("The server's answer broke off", { id: response.headers.get("X-Request-ID") ?? "" });
      }
    }
    const error = await errorOf(response);
    if (response.status !== 429 || again === TRIES) throw error;
    const asked = Number.parseFloat(response.headers.get("Retry-After"));
    const seconds = Math.min(LONGEST_WAIT, asked >= 0 ? asked : 1);
    const waited = waiting?.(seconds, again, TRIES - 1);
    await pause(seconds, signal);
    waited?.();
  }
}
