// The live panel: the microphone's button, the captions firm and pending, and what can be done with them.

import { offer } from "./downloads.js";
import { Live, RATE } from "./live.js";
import { Microphone } from "./microphone.js";
import { Refusal } from "./server.js";
import { clock, joined } from "./transcript.js";
import { label, put } from "./words.js";

const $ = id => document.getElementById(id);
const NEAR_END_PX = 80; // a reader who has scrolled up further is left there
const QUIET_DB = -60; // the left end of the level

export class Captions {
  #live = null;
  #microphone = null;
  #opening = false;
  #awake = null;
  #earlier = []; // items of the captions before this press of the button, their times already shifted
  #offset = 0; // where this press began, in samples
  #shown = new Map(); // item → its paragraph
  #began = new Date();

  constructor({ options, notify }) {
    Object.assign(this, { options, notify });
    $("microphone").addEventListener("click", () => this.#press());
  }

  // The server is there.
  retry() {
    this.#live?.retry();
  }

  async #press() {
    if (this.#opening) return;
    if (this.#microphone) return this.#close();
    if (this.#live) return this.#live.finish();
    this.notify(null);
    this.#opening = true;
    put($("live-state"), "liveAsking");
    const waiting = []; // the first pieces may come before the session is made
    try {
      this.#microphone = await Microphone.open((pcm, loudest) => {
        this.#level(loudest);
        if (this.#live) this.#live.feed(pcm); else waiting.push(pcm);
      }, () => { this.notify(new Refusal("errorMicrophoneEnded")); this.#close(); });
    } catch (refused) {
      if (!(refused instanceof Refusal)) throw refused;
      put($("live-state"), "liveIdle");
      return this.notify(refused);
    } finally {
      this.#opening = false;
    }
    this.#begin(waiting);
  }

  #begin(waiting) {
    if (!this.#earlier.length) this.#began = new Date();
    $("live-actions").hidden = true;
    this.#live = new Live({ ...this.options(), onItems: () => this.#render(), onState: (...state) => this.#state(...state) });
    for (const pcm of waiting) this.#live.feed(pcm);
    this.#button("microphoneStop");
    this.#stayAwake();
  }

  async #close() {
    const microphone = this.#microphone;
    this.#microphone = null;
    await microphone.close();
    this.#level(0);
    this.#button("microphoneEnd");
    this.#awake?.release();
    this.#live?.finish();
  }

  #button(key) {
    label($("microphone"), key);
    $("microphone").classList.toggle("on", key === "microphoneStop");
    $("microphone").classList.toggle("finishing", key === "microphoneEnd");
  }

  // A phone's screen stays on while captions run, where the browser knows how and allows it.
  async #stayAwake() {
    if (!navigator.wakeLock) return;
    try {
      this.#awake = await navigator.wakeLock.request("screen");
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
  }

  #state(state, value, refused) {
    if (state === "problem") return this.notify(new Refusal("errorLiveEvent", value));
    if (state === "ended") return this.#ended(value);
    document.body.dataset.live = state;
    if (state === "away") {
      put($("live-state"), "liveAway", value);
      return this.notify(refused);
    }
    if (state === "listening") this.notify(null);
    put($("live-state"), { connecting: "liveConnecting", listening: "liveListening", finishing: "liveFinishing" }[state]);
  }

  async #ended(refused) {
    this.#earlier = this.#items().filter(({ state }) => state !== "hearing");
    this.#offset += this.#live.seconds * RATE;
    this.#live = null;
    document.body.dataset.live = "ended";
    if (refused) this.notify(refused);
    if (this.#microphone) await this.#close();
    this.#button("microphoneStart");
    put($("live-state"), "liveIdle");
    this.#render();
    if (this.#earlier.length) this.#offer();
  }

  #items() {
    const shifted = (this.#live?.items ?? []).map(source => {
      const { start, end, text, state } = source;
      return { source, start: this.#offset + start, end: this.#offset + (end ?? start), text, state };
    });
    return [...this.#earlier, ...shifted];
  }

  #render() {
    const box = $("captions"), follow = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
    const items = this.#items(), open = items.findIndex(({ state }) => state === "hearing");
    const known = new Set(items.map(({ source }) => source));
    for (const [source, row] of this.#shown) if (!known.has(source)) { row.remove(); this.#shown.delete(source); }
    items.forEach((item, index) => {
      const firm = open < 0 || index < open; // after an open one, nothing is put into the log that would be out of order
      this.#show(item, firm ? $("firm") : $("pending"));
    });
    $("captions-empty").hidden = items.length > 0;
    if (this.#live) put($("live-state"), this.#listens(open));
    if (follow) box.scrollTop = box.scrollHeight;
  }

  #listens(open) {
    const key = $("live-state").dataset.t;
    return ["liveListening", "liveHearing"].includes(key) ? (open < 0 ? "liveListening" : "liveHearing") : key;
  }

  // A row is put into the log once, whole: screen readers then say it once.
  #show({ source, start, text, state }, place) {
    let row = this.#shown.get(source);
    const same = row?.dataset.state === state && row.parentElement === place;
    if (same && (state !== "hearing" || row.lastChild.textContent === text)) return;
    if (!row) {
      row = document.createElement("p");
      row.append(document.createElement("time"), document.createElement("span"));
      row.firstChild.textContent = clock(start / RATE);
      this.#shown.set(source, row);
    }
    row.dataset.state = state;
    if (state === "lost") put(row.lastChild, "lost", Math.round((source.end - source.start) / RATE));
    else if (state === "failed") put(row.lastChild, "failed", text);
    else row.lastChild.textContent = text;
    if (row.parentElement !== place) place.append(row);
  }

  #level(loudest) {
    const share = loudest > 0 ? Math.max(0, 1 - 20 * Math.log10(loudest) / QUIET_DB) : 0;
    $("level").firstElementChild.setAttribute("width", 100 * share);
    $("clock").textContent = clock(this.#offset / RATE + (this.#live?.seconds ?? 0));
  }

  #transcript() {
    const spoken = this.#earlier.filter(({ state }) => state === "done");
    const segments = spoken.map(({ start, end, text }, id) => ({ id, start: round(start / RATE), end: round(end / RATE), text }));
    return { text: joined(segments.map(({ text }) => text)), began: this.#began.toISOString(), segments };
  }

  #offer() {
    const name = () => `captions ${this.#began.toISOString().slice(0, 19).replace("T", " ").replaceAll(":", ".")}`;
    offer($("live-actions"), name, () => this.#transcript());
    const clear = document.createElement("button");
    clear.className = "quiet";
    put(clear, "clear");
    clear.addEventListener("click", () => this.#clear());
    $("live-actions").append(clear);
  }

  #clear() {
    this.#earlier = [];
    this.#offset = 0;
    this.#render();
    this.#level(0);
    $("live-actions").hidden = true;
    $("microphone").focus();
  }
}

function round(seconds) {
  return Math.round(seconds * 1000) / 1000;
}
