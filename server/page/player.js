// A recording's segments beside its player: choose a time to play from there, and see where it plays.

import { clock } from "./transcript.js";
import { label } from "./words.js";

const $ = id => document.getElementById(id);

export class Player {
  #media = null;
  #rows = []; // {start, row, button}
  #current = -1;
  #url = "";

  constructor() {
    $("segments").addEventListener("click", event => {
      const index = this.#rows.findIndex(({ row }) => row.contains(event.target));
      if (index >= 0 && (event.target.closest("button") || getSelection().isCollapsed)) this.#play(index);
    });
    $("segments").addEventListener("keydown", event => {
      const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!way || !this.#rows[this.#focused() + way]) return;
      event.preventDefault();
      this.#focus(this.#focused() + way);
    });
  }

  // Length in seconds, NaN where the browser does not know it.
  get duration() {
    return this.#media.duration;
  }

  // Empties the list and loads a File, or what is at an address.
  load(source) {
    URL.revokeObjectURL(this.#url);
    this.#rows = [];
    this.#current = -1;
    $("segments").replaceChildren();
    const isFile = source instanceof File;
    this.#media = document.createElement(isFile && source.type.startsWith("video/") ? "video" : "audio");
    this.#url = isFile ? URL.createObjectURL(source) : "";
    $("player-broken").hidden = true;
    this.#media.addEventListener("timeupdate", () => this.#follow());
    this.#media.addEventListener("error", () => { $("player-broken").hidden = false; this.#media.hidden = true; });
    this.#media.controls = true;
    this.#media.preload = "metadata";
    this.#media.src = this.#url || source;
    $("player-place").replaceChildren(this.#media);
  }

  add({ start, text }) {
    const row = document.createElement("li"), button = document.createElement("button"), words = document.createElement("span");
    button.textContent = clock(start);
    button.tabIndex = this.#rows.length ? -1 : 0; // one stop of the Tab key; the arrows go on from it
    label(button, "playFrom", clock(start));
    words.textContent = text;
    row.append(button, words);
    $("segments").append(row);
    this.#rows.push({ start, row, button });
  }

  #focused() {
    return this.#rows.findIndex(({ button }) => button === document.activeElement);
  }

  #focus(index) {
    this.#rows.forEach(({ button }, i) => { button.tabIndex = i === index ? 0 : -1; });
    this.#rows[index].button.focus();
  }

  #play(index) {
    this.#media.currentTime = this.#rows[index].start;
    this.#focus(index);
    this.#mark(index);
    this.#media.play().catch(error => {
      if (!(error instanceof DOMException)) throw error; // it cannot be played: the "error" event says so
    });
  }

  // The last segment that has begun: between two, the one before stays marked.
  #follow() {
    const index = this.#rows.findLastIndex(({ start }) => start <= this.#media.currentTime + 0.01);
    if (index !== this.#current) this.#mark(index);
  }

  #mark(index) {
    this.#rows[this.#current]?.row.removeAttribute("aria-current");
    this.#current = index;
    const row = this.#rows[index]?.row;
    row?.setAttribute("aria-current", "true");
    if (!this.#media.paused) row?.scrollIntoView({ block: "nearest" });
  }
}
