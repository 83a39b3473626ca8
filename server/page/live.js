// A live transcription over /v1/realtime that outlives its connections: what no finished sentence holds yet is sent again.
//
// All times here are samples at 24 kHz since the microphone was opened. A session's own clock begins at its first sample.

import { apiKey, backoff, model, Refusal } from "./server.js";

export const RATE = 24_000;
const MAX_HELD = 600 * RATE; // while the server is away; the oldest goes first, and it is said
const KEPT_IN_SILENCE = 5 * RATE; // behind what was sent: a beginning of speech is told some time after it was
const MAX_UNSENT_BYTES = 2 ** 18; // in the socket, about 4 s of sound; more waits here
const STUCK_MS = 15_000; // a socket that sends nothing for so long is dead, though nobody has closed it
const PUMP_MS = 50;
const SILENT_MS = 60_000; // while finishing: a server that says nothing for so long has nothing more to say
const PROTOCOL = /^[!#$%&'*+.^_`|~0-9A-Za-z-]*$/; // what a WebSocket's subprotocol, and so a key in it, may consist of

const PREFIX = "input_audio_buffer.", SPOKEN = "conversation.item.input_audio_transcription.";

function base64(pcm) {
  const bytes = new Uint8Array(pcm.buffer, pcm.byteOffset, pcm.byteLength);
  return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
}

// states: "connecting", "listening", "away" (with seconds until the next try and a Refusal), "finishing", "ended".
export class Live {
  items = []; // {id, start, end, text, state: "hearing" | "done" | "failed" | "lost"}, in order of speech
  #held = []; // pieces of PCM16 from #heldFrom to #captured
  #heldFrom = 0;
  #captured = 0;
  #sent = 0;
  #socket = null;
  #ready = false;
  #begin = 0; // of the session, in samples
  #failures = 0;
  #finishing = false;
  #commit = null; // id of the event that closes the last sentence; "" once it is answered
  #stuck = { unsent: 0, since: 0 };
  #timers = {};

  constructor({ language, context, onItems, onState }) {
    Object.assign(this, { language, context, onItems, onState });
    this.#connect();
  }

  get seconds() {
    return this.#captured / RATE;
  }

  feed(pcm) {
    this.#held.push(pcm);
    this.#captured += pcm.length;
    if (this.#captured - this.#heldFrom > MAX_HELD) this.#lose(this.#captured - MAX_HELD);
    this.#pump();
  }

  // No more will come: sends the rest and waits for the last sentence. A second call does not wait.
  finish() {
    if (this.#finishing) return this.#end();
    this.#finishing = true;
    if (this.#ready) this.onState("finishing");
    this.#pump();
  }

  // The server is known to be there: does not wait any longer for the next try.
  retry() {
    if (this.#timers.retry) this.#connect();
  }

  async #connect() {
    let name;
    clearTimeout(this.#timers.retry);
    this.#timers.retry = 0;
    this.onState(this.#finishing ? "finishing" : "connecting");
    try {
      name = await model(); // a WebSocket's refusal cannot be read, this one's can
    } catch (refused) {
      if (!(refused instanceof Refusal)) throw refused;
      return this.#retry(refused);
    }
    if (this.#socket === undefined) return; // ended meanwhile
    const url = new URL("v1/realtime?intent=transcription", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const key = apiKey() ? [`openai-insecure-api-key.${apiKey()}`] : [];
    if (!PROTOCOL.test(key.join(""))) return this.#end(new Refusal("errorLiveKey"));
    const socket = this.#socket = new WebSocket(url, ["realtime", ...key]);
    socket.onmessage = ({ data }) => { if (socket === this.#socket) this.#take(JSON.parse(data), name); };
    socket.onclose = ({ code }) => { if (socket === this.#socket) this.#dropped(code); };
  }

  #dropped(code) {
    const worked = this.#ready;
    this.#ready = false;
    this.#socket = null;
    clearTimeout(this.#timers.silent);
    this.#commit = null;
    if (worked) this.#failures = 0;
    if (worked && [1000, 1001].includes(code)) return this.#connect(); // its time was up
    this.#retry(new Refusal(worked ? "errorAway" : code === 1013 ? "errorFull" : "errorLive"));
  }

  #retry(refused) {
    if (refused.key.startsWith("errorKey")) return this.#end(refused);
    const wait = backoff(++this.#failures);
    this.onState("away", Math.ceil(wait / 1000), refused);
    this.#timers.retry = setTimeout(() => this.#connect(), wait);
  }

  #take(event, name) {
    const item = this.items.findLast(({ id }) => id === event.item_id);
    if (this.#finishing) this.#waitOn();
    switch (event.type) {
      case "session.created": return this.#configure(name);
      case "session.updated": return this.#start();
      case `${PREFIX}speech_started`: this.#heard(event.item_id, event.audio_start_ms); break;
      case `${PREFIX}speech_stopped`: if (item) item.end = this.#samples(event.audio_end_ms); break;
      case `${PREFIX}committed`: this.#committed(event.item_id); break;
      case `${SPOKEN}delta`: if (item) item.text += event.delta; break;
      case `${SPOKEN}completed`: if (item) this.#settle(item, "done", event.transcript); break;
      case `${SPOKEN}failed`: if (item) this.#settle(item, "failed", event.error.message); break;
      case "error": return this.#problem(event.error);
      default: return;
    }
    this.onItems();
    if (this.#finished()) this.#end();
  }

  #configure(name) {
    const transcription = { model: name };
    if (this.language) transcription.language = this.language;
    if (this.context) transcription.prompt = this.context;
    const input = { format: { type: "audio/pcm", rate: RATE }, transcription, turn_detection: { type: "server_vad" } };
    this.#send({ type: "session.update", session: { type: "transcription", audio: { input } } });
  }

  #start() {
    if (this.#ready) return;
    this.#ready = true;
    this.#failures = 0;
    this.items = this.items.filter(({ state }) => state !== "hearing"); // their audio is sent again
    this.#begin = this.#sent = this.#heldFrom;
    this.onItems();
    this.onState(this.#finishing ? "finishing" : "listening");
    this.#pump();
  }

  #samples(milliseconds) {
    return this.#begin + milliseconds * RATE / 1000;
  }

  #heard(id, milliseconds) {
    this.items.push({ id, start: this.#samples(milliseconds), end: null, text: "", state: "hearing" });
  }

  #committed(id) {
    if (this.#commit) this.#commit = "";
    const item = this.items.findLast(item => item.id === id), start = Math.max(this.#begin, this.#sent - KEPT_IN_SILENCE);
    if (item) item.end ??= this.#sent;
    else this.items.push({ id, start, end: this.#sent, text: "", state: "hearing" });
  }

  #settle(item, state, text) {
    Object.assign(item, { state, text: text.trim(), end: item.end ?? this.#sent });
    if (state === "done" && !item.text) this.items.splice(this.items.indexOf(item), 1);
    this.#release();
  }

  #problem({ event_id: id, code, message }) {
    if (this.#commit && id === this.#commit) { // nothing was left to commit
      this.#commit = "";
      if (this.#finished()) this.#end();
    } else if (!this.#ready) this.#end(new Refusal("errorLiveEvent", message)); // it would not take the session as we want it
    else if (code !== "session_expired") this.onState("problem", message);
  }

  // Lets go of audio that a finished sentence holds, or that was silence.
  #release() {
    const open = this.items.find(({ state }) => state === "hearing");
    const last = this.items.findLast(({ state }) => state !== "hearing");
    let to = open ? open.start : this.#sent - KEPT_IN_SILENCE;
    if (last && (!open || last.end <= open.start)) to = Math.max(to, last.end);
    this.#dropUntil(Math.min(to, this.#sent));
  }

  #dropUntil(sample) {
    while (this.#held.length && this.#heldFrom + this.#held[0].length <= sample) this.#heldFrom += this.#held.shift().length;
  }

  #lose(sample) {
    const from = this.#heldFrom;
    this.#dropUntil(sample);
    if (this.#ready && this.#sent >= this.#heldFrom) return; // it was heard, only its sentence is that long
    const before = this.items.at(-1);
    if (before?.state === "lost") before.end = this.#heldFrom;
    else this.items.push({ id: null, start: from, end: this.#heldFrom, text: "", state: "lost" });
    this.#sent = Math.max(this.#sent, this.#heldFrom);
    this.onItems();
  }

  #pump() {
    clearTimeout(this.#timers.pump);
    if (!this.#ready) return;
    let place = this.#heldFrom;
    for (const pcm of this.#held) {
      if (this.#socket.bufferedAmount > MAX_UNSENT_BYTES) return this.#waitForSocket();
      if (place >= this.#sent && pcm.length) {
        this.#send({ type: `${PREFIX}append`, audio: base64(pcm) });
        this.#sent = place + pcm.length;
      }
      place += pcm.length;
    }
    this.#release();
    if (this.#finishing && this.#commit === null) {
      this.#commit = `last_${crypto.getRandomValues(new Uint32Array(1))[0]}`;
      this.#send({ type: `${PREFIX}commit`, event_id: this.#commit });
      this.#waitOn();
    }
  }

  #waitForSocket() {
    const unsent = this.#socket.bufferedAmount;
    if (unsent !== this.#stuck.unsent) this.#stuck = { unsent, since: performance.now() };
    if (performance.now() - this.#stuck.since < STUCK_MS) {
      this.#timers.pump = setTimeout(() => this.#pump(), PUMP_MS);
      return;
    }
    const socket = this.#socket;
    this.#dropped(1006);
    socket.close();
  }

  #send(event) {
    this.#socket.send(JSON.stringify(event));
  }

  #finished() {
    return this.#finishing && this.#commit === "" && !this.items.some(({ state }) => state === "hearing");
  }

  #waitOn() {
    clearTimeout(this.#timers.silent);
    this.#timers.silent = setTimeout(() => this.#end(), SILENT_MS);
  }

  #end(refused = null) {
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    const socket = this.#socket;
    this.#socket = undefined;
    this.#ready = false;
    socket?.close(1000);
    this.onState("ended", refused);
  }
}
