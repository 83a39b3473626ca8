// A transcript's segments as text files. Times are in seconds; a segment's `cues` are the server's cut of it for subtitles.

// "1:02:03" or "2:03", for people.
export function clock(seconds) {
  const whole = Math.floor(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

function stamp(milliseconds, point) {
  const part = (divisor, modulus, width = 2) => String(Math.floor(milliseconds / divisor) % modulus).padStart(width, "0");
  return `${part(3_600_000, Infinity)}:${part(60_000, 60)}:${part(1000, 60)}${point}${part(1, 1000, 3)}`;
}

// [start, end, text] in milliseconds: none overlaps the one before it, each lasts 1 ms at least.
function timed(segments) {
  let previous = 0;
  return segments.flatMap(segment => segment.cues ?? [segment]).map(({ start, end, text }) => {
    const from = Math.max(Math.round(start * 1000), previous);
    previous = Math.max(Math.round(end * 1000), from + 1);
    return [from, previous, text];
  });
}

function srt({ segments }) {
  return timed(segments).map(([start, end, text], index) =>
    `${index + 1}\n${stamp(start, ",")} --> ${stamp(end, ",")}\n${text.replaceAll("-->", "→")}\n`).join("\n");
}

function vtt({ segments }) {
  const quoted = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return ["WEBVTT\n", ...timed(segments).map(([start, end, text]) =>
    `${stamp(start, ".")} --> ${stamp(end, ".")}\n${quoted(text)}\n`)].join("\n");
}

// Each format's writer and media type. A transcript is {text, segments, …}.
export const FORMATS = {
  txt: [transcript => `${transcript.text}\n`, "text/plain"],
  srt: [srt, "application/x-subrip"],
  vtt: [vtt, "text/vtt"],
  json: [transcript => `${JSON.stringify(transcript, null, 2)}\n`, "application/json"],
};

// One text from many, with a space where neither side is Chinese, Japanese or Korean.
export function joined(texts) {
  const cjk = "[\\u2e80-\\u9fff\\uac00-\\ud7af\\uf900-\\ufaff\\uff00-\\uffef]";
  return texts.filter(Boolean).reduce((before, text) =>
    before && !new RegExp(`${cjk}$`).test(before) && !new RegExp(`^${cjk}`).test(text) ? `${before} ${text}` : before + text, "");
}
