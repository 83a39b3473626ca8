// Starts the page: its language, tabs and options, the key, messages, and whether the server is there.

import { Captions } from "./captions.js";
import { Recording } from "./recording.js";
import { Watch, apiKey, setApiKey } from "./server.js";
import { chinese, label, put, setLanguage } from "./words.js";

const $ = id => document.getElementById(id);
const LANGUAGE = "glmasr-language"; // in localStorage: what the user last chose

// Shows a Refusal, or takes away what is shown.
function notify(refused) {
  const shown = refused && [refused.key, refused.detail, ...refused.values].join();
  if (shown && shown === $("notice").dataset.shown) return; // said once
  $("notice").dataset.shown = shown ?? "";
  $("notice").dataset.key = refused?.key ?? "";
  $("notice").replaceChildren();
  if (!refused) return;
  const message = document.createElement("p"), close = document.createElement("button");
  put(message, refused.key, ...refused.values);
  $("notice").append(message);
  if (refused.detail) {
    const detail = document.createElement("p");
    detail.lang = "en";
    detail.className = "note";
    detail.textContent = refused.detail;
    $("notice").append(detail);
  }
  close.className = "quiet close";
  close.textContent = "×";
  label(close, "close");
  close.addEventListener("click", () => notify(null));
  $("notice").append(close);
  if (refused.key.startsWith("errorKey")) openKey(true);
}

function openKey(open) {
  if (open === !$("key-form").hidden) return;
  $("key-form").hidden = !open;
  $("key-toggle").setAttribute("aria-expanded", open);
  $("key-input").value = apiKey();
  if (open) $("key-input").focus();
}

function show(tab) {
  for (const name of ["live", "file"]) {
    $(`tab-${name}`).setAttribute("aria-selected", name === tab);
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
    $(`panel-${name}`).hidden = name !== tab;
  }
  showOptions();
}

function showOptions() {
  const live = !$("panel-live").hidden, instruction = $("instruction").value;
  $("instruction-field").hidden = live;
  $("context-field").hidden = !live && instruction !== "transcribe";
  $("speech-language").disabled = !live && instruction !== "transcribe";
  $("own-field").hidden = live || instruction !== "own";
}

// What the fields say; `instruction` is empty for a transcript.
function options() {
  const instruction = { transcribe: "", describe: "describe", own: $("own").value.trim() }[$("instruction").value];
  return { language: $("speech-language").value, context: $("context").value.trim(), instruction };
}

function listen() {
  $("tab-live").addEventListener("click", () => show("live"));
  $("tab-file").addEventListener("click", () => show("file"));
  document.querySelector("[role=tablist]").addEventListener("keydown", event => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = $("panel-live").hidden ? "live" : "file";
    show(other);
    $(`tab-${other}`).focus();
  });
  $("instruction").addEventListener("change", showOptions);
  $("language-toggle").addEventListener("click", () => {
    setLanguage(chinese() ? "en" : "zh");
    localStorage.setItem(LANGUAGE, chinese() ? "zh" : "en");
  });
  $("key-toggle").addEventListener("click", () => openKey($("key-form").hidden));
}

function watch(captions) {
  let said = ""; // of the server's state: said once, so that it can be closed
  const server = new Watch((state, value) => {
    $("status").dataset.state = state;
    put($("status-text"), state);
    if (state === "ready") {
      $("model").textContent = value;
      captions.retry();
      if (/^error(Away|Key)/.test($("notice").dataset.key)) notify(null);
      said = "";
    } else if (said !== value.key) {
      said = value.key;
      notify(value);
    }
  });
  $("key-form").addEventListener("submit", event => {
    event.preventDefault();
    setApiKey($("key-input").value.trim());
    notify(null);
    said = "";
    openKey(false);
    $("key-toggle").focus();
    server.look();
  });
  server.look();
}

const chosen = localStorage.getItem(LANGUAGE) ?? navigator.language;
setLanguage(/^zh/i.test(chosen) ? "zh" : "en");
listen();
show("live");
new Recording({ options, notify, show: () => show("file") });
watch(new Captions({ options, notify }));
