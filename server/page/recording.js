// The recording panel: a dropped or chosen file, or an address, to a transcript with times or to the model's answer.

import { offer } from "./downloads.js";
import { Player } from "./player.js";
import { Refusal, model, stream } from "./server.js";
import { clock } from "./transcript.js";
import { put } from "./words.js";

const $ = id => document.getElementById(id);
const MB = 2 ** 20;
const DESCRIBE = "Please describe this audio."; // the model was trained on this wording, whatever the page's language
const { maxFileBytes, maxClipBytes } = document.documentElement.dataset; // the server's limits for transcripts and in chat

function megabytes(bytes) {
  return (bytes / MB).toFixed(bytes < 10 * MB ? 1 : 0);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(`data:application/octet-stream;base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export class Recording {
  #source = null; // a File or an address
  #cancel = null;
  #player = new Player();

  constructor({ options, notify, show }) {
    Object.assign(this, { options, notify, show });
    $("file").addEventListener("change", ({ target }) => {
      if (target.files.length) this.run(target.files[0]);
      target.value = ""; // so that the same file can be chosen again
    });
    $("url-form").addEventListener("submit", event => {
      event.preventDefault();
      this.run($("url").value.trim());
    });
    $("again").addEventListener("click", () => this.run(this.#source));
    $("cancel").addEventListener("click", () => this.#cancel.abort());
    this.#takeDrops();
  }

  #takeDrops() {
    const over = event => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      $("drop-over").hidden = false;
    };
    document.addEventListener("dragenter", over);
    document.addEventListener("dragover", over);
    document.addEventListener("dragleave", ({ relatedTarget }) => { if (!relatedTarget) $("drop-over").hidden = true; });
    document.addEventListener("drop", event => {
      $("drop-over").hidden = true;
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.show();
      this.run(event.dataTransfer.files[0]);
    });
  }

  async run(source) {
    this.#cancel?.abort();
    const cancel = this.#cancel = new AbortController();
    this.#source = source;
    this.notify(null);
    this.#prepare(source);
    const began = performance.now(), took = () => ((performance.now() - began) / 1000).toFixed(1);
    try {
      const asked = this.options();
      this.#check(source, asked.instruction ? Number(maxClipBytes) : Number(maxFileBytes));
      if (asked.instruction) await this.#ask(source, asked, cancel.signal, took);
      else await this.#transcribe(source, asked, cancel.signal, took);
    } catch (error) {
      if (cancel !== this.#cancel) return; // another recording has taken this one's place
      if (error instanceof Refusal) this.notify(error);
      else if (error.name !== "AbortError") throw error;
      put($("work-state"), "cancelled");
      $("work-state").hidden = error instanceof Refusal;
    } finally {
      if (cancel === this.#cancel) this.#rest();
    }
  }

  #prepare(source) {
    $("work-name").textContent = source.name ?? source;
    $("work").hidden = $("progress").hidden = $("cancel").hidden = $("work-state").hidden = false;
    $("again").hidden = $("result").hidden = $("answer").hidden = $("warnings").hidden = $("file-actions").hidden = true;
    $("answer").textContent = "";
    this.#player.load(source);
    this.#say(source instanceof File ? "uploading" : "fetching", ...(source instanceof File ? [0, megabytes(source.size)] : []));
  }

  #rest() {
    $("progress").hidden = $("cancel").hidden = true;
    $("again").hidden = false;
  }

  #check(source, most) {
    if (!(source instanceof File)) return;
    if (!source.size) throw new Refusal("errorEmpty");
    if (source.size > most) throw new Refusal("errorTooLarge", "", megabytes(source.size), megabytes(most));
  }

  // The bar without a value runs to and fro.
  #say(key, ...values) {
    put($("work-state"), key, ...values);
    $("progress").removeAttribute("value");
  }

  #uploaded(source, sent, total, next) {
    if (!(source instanceof File)) return;
    if (sent >= total) return this.#say(next);
    this.#say("uploading", megabytes(sent), megabytes(total));
    $("progress").value = sent / total;
  }

  async #transcribe(source, { language, context }, signal, took) {
    const form = new FormData(), segments = [];
    const fields = { response_format: "verbose_json", stream: "true", language, prompt: context };
    for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
    form.append(source instanceof File ? "file" : "url", source);
    let whole = null;
    await stream("v1/audio/transcriptions", form, {
      signal,
      onUpload: (sent, total) => this.#uploaded(source, sent, total, "reading"),
      onEvent: event => {
        if (event.type === "transcript.text.segment") this.#segment(event, segments);
        else if (event.type === "transcript.text.done") whole = event;
      },
    });
    if (!whole) throw new Refusal("errorBroken");
    const { text, language: spoken, duration, warnings } = whole;
    const transcript = { text, language: spoken, duration, segments, warnings };
    if (segments.length) offer($("file-actions"), () => this.#name(), () => transcript);
    if (warnings.length) put($("warnings"), "doubts", warnings.join("; "));
    $("warnings").hidden = !warnings.length;
    if (segments.length) put($("work-state"), "doneAudio", clock(duration), took());
    else put($("work-state"), "nothing");
  }

  #segment({ type, ...segment }, segments) {
    segments.push(segment);
    this.#player.add(segment);
    $("result").hidden = false;
    const { duration } = this.#player;
    if (!(duration > 0 && duration < Infinity)) return this.#say("transcribing", clock(segment.end));
    put($("work-state"), "transcribingOf", clock(segment.end), clock(duration));
    $("progress").value = segment.end / duration;
  }

  async #ask(source, { instruction }, signal, took) {
    const content = [
      { type: "audio_url", audio_url: { url: source instanceof File ? await dataUrl(source) : source } },
      { type: "text", text: instruction === "describe" ? DESCRIBE : instruction },
    ];
    const body = { model: await model(), temperature: 0, stream: true, messages: [{ role: "user", content }] };
    let text = "";
    await stream("v1/chat/completions", JSON.stringify(body), {
      signal,
      onUpload: (sent, total) => this.#uploaded(source, sent, total, "describing"),
      onEvent: ({ choices }) => {
        text += choices[0]?.delta.content ?? "";
        $("answer").textContent = text;
        $("result").hidden = $("answer").hidden = false;
      },
    });
    put($("work-state"), "done", took());
    if (text) offer($("file-actions"), () => this.#name(), () => ({ text }), ["txt"]);
  }

  // The recording's name without what stands behind its last point.
  #name() {
    const name = this.#source.name ?? decodeURIComponent(new URL(this.#source).pathname.split("/").pop());
    return name.replace(/\.[^.]+$/, "") || "transcript";
  }
}
