// The row of buttons under a transcript: copy, and one download for each format.

import { FORMATS } from "./transcript.js";
import { label, put } from "./words.js";

const COPIED_MS = 2000;

function button(key, ...values) {
  const element = document.createElement("button");
  element.className = "quiet";
  put(element, key, ...values);
  return element;
}

function save(name, content, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be asking where to
}

// Fills `place` with the buttons for what `transcript()` gives when they are pressed; `name()` is the files' name.
export function offer(place, name, transcript, formats = Object.keys(FORMATS)) {
  const copy = button("copy");
  copy.addEventListener("click", async () => {
    await copyText(transcript().text);
    put(copy, "copied");
    setTimeout(() => put(copy, "copy"), COPIED_MS);
  });
  const downloads = formats.map(format => {
    const [write, type] = FORMATS[format];
    const element = button("download", format);
    element.dataset.format = format;
    delete element.dataset.t; // the name is short; what it does is said in full to screen readers
    element.textContent = format;
    label(element, "download", format);
    element.addEventListener("click", () => save(`${name()}.${format}`, write(transcript()), type));
    return element;
  });
  place.replaceChildren(copy, ...downloads);
  place.hidden = false;
}

async function copyText(content) {
  if (navigator.clipboard) return navigator.clipboard.writeText(content);
  const area = document.createElement("textarea"); // over plain http there is no clipboard object
  area.value = content;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
