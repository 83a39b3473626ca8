// Requests to the server: the key, what it answers, what its refusals mean, and whether it is there at all.

const KEY = "glmasr-key"; // in sessionStorage: gone when the tab is
const CHECK_MS = 10_000; // between looks at a server that answers
const FIRST_WAIT_MS = 1_000, LONGEST_WAIT_MS = 15_000; // between looks at one that does not

// What went wrong, as a key of words.js with its values, and the server's own words.
export class Refusal extends Error {
  constructor(key, detail = "", ...values) {
    super(`${key}: ${detail}`);
    Object.assign(this, { key, detail, values });
  }
}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key); else sessionStorage.removeItem(KEY);
}

// Wait before the attempt after `failures` of them: doubled each time, and spread, so that pages do not come back at once.
export function backoff(failures) {
  return Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** (failures - 1)) * (0.75 + Math.random() / 4);
}

function refusal(status, body) {
  if (status === 0) return new Refusal("errorAway");
  if (status === 401) return new Refusal(apiKey() ? "errorKeyWrong" : "errorKeyNeeded");
  let detail = "";
  try {
    detail = JSON.parse(body).error?.message ?? "";
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // a proxy in between answers in HTML
  }
  if (status === 413) return new Refusal("errorTooLargeServer", detail);
  if (status === 503 || status === 429) return new Refusal("errorFull", detail);
  return new Refusal(status < 500 ? "errorUnreadable" : "errorServer", detail || `${status}`);
}

// The served model's name. Throws a Refusal.
export async function model() {
  let response;
  try {
    const headers = apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {};
    response = await fetch("v1/models", { headers, cache: "no-store", signal: AbortSignal.timeout(CHECK_MS) });
  } catch (error) {
    if (!(error instanceof TypeError) && !(error instanceof DOMException)) throw error;
    throw new Refusal("errorAway");
  }
  if (!response.ok) throw refusal([502, 504].includes(response.status) ? 0 : response.status, await response.text());
  return (await response.json()).data[0].id;
}

// Sends a body and hands on its events as they come: onUpload(sent, total) in bytes, onEvent(object).
// Resolves when the stream has ended; throws a Refusal, or an AbortError after `signal`.
export function stream(path, body, { signal, onUpload, onEvent }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch cannot tell how much is sent
    let read = 0, failed = null;

    function events() {
      for (let end; (end = request.responseText.indexOf("\n\n", read)) >= 0; read = end + 2) {
        const line = request.responseText.slice(read, end);
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice("data: ".length));
        if (event.error) failed ??= refusal(event.error.code ?? 500, JSON.stringify(event));
        else onEvent(event);
      }
    }

    request.open("POST", path);
    if (apiKey()) request.setRequestHeader("Authorization", `Bearer ${apiKey()}`);
    if (typeof body === "string") request.setRequestHeader("Content-Type", "application/json");
    request.upload.onprogress = ({ loaded, total }) => onUpload(loaded, total);
    request.upload.onload = ({ loaded }) => onUpload(loaded, loaded);
    request.onprogress = () => { if (request.status === 200) events(); };
    request.onload = () => {
      if (request.status !== 200) return reject(refusal(request.status, request.responseText));
      events();
      if (failed) reject(failed); else resolve();
    };
    request.onerror = () => reject(read ? new Refusal("errorBroken") : refusal(0, ""));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => request.abort(), { once: true });
    request.send(body);
  });
}

// Looks whether the server is there: onState("ready", model), ("locked", Refusal) or ("away", Refusal), at each look.
export class Watch {
  #failures = 0;
  #timer = 0;

  constructor(onState) {
    this.onState = onState;
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
    addEventListener("online", () => this.look());
  }

  async look() {
    clearTimeout(this.#timer);
    let wait = CHECK_MS;
    try {
      const name = await model();
      this.#failures = 0;
      this.onState("ready", name);
    } catch (refused) {
      if (!(refused instanceof Refusal)) throw refused;
      const locked = refused.key.startsWith("errorKey");
      wait = locked ? CHECK_MS : backoff(++this.#failures);
      this.onState(locked ? "locked" : "away", refused);
    }
    clearTimeout(this.#timer); // looks may overlap
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), wait);
  }
}
