// The page's texts in English and Chinese, and their places: elements with data-t, data-t-label and data-t-hint.

const ENGLISH = {
  connecting: "Connecting…", ready: "Ready", locked: "Key needed", away: "Server away",
  key: "API key", keyLabel: "API key of this server", keyUse: "Use key",
  keyNote: "Kept in this tab alone and forgotten when it closes. Leave empty where the server asks for none.",
  otherLanguage: "中文",
  tabs: "What to do", tabLive: "Live captions", tabFile: "Recording",
  language: "Spoken language", languageAuto: "Detected",
  instruction: "Instruction", instructTranscribe: "Transcribe", instructDescribe: "Describe", instructOwn: "My own…",
  context: "Context", contextHint: "Names, topics",
  ownLabel: "Your instruction", ownHint: "What the model shall do with the audio",
  captions: "Captions", captionsEmpty: "Press the microphone and speak.",
  legend: "Grey words are still being heard: the finished sentence takes their place.",
  microphoneStart: "Start captions", microphoneStop: "Stop captions", microphoneEnd: "End without waiting",
  liveIdle: "Microphone is off", liveAsking: "Waiting for the microphone…", liveConnecting: "Connecting…",
  liveListening: "Listening", liveHearing: "Hearing you", liveFinishing: "Finishing the last words…",
  liveAway: "No connection. What you say is kept; trying again in {0} s",
  lost: "[{0} s were not heard: the connection was away too long]",
  failed: "[this part could not be transcribed: {0}]",
  dropTitle: "Drop a recording here", choose: "Choose a file", dropOver: "Let go to transcribe",
  dropNote: "Audio or video of any length: wav, mp3, m4a, flac, ogg, mp4, webm, mkv",
  urlLabel: "or paste its address", urlUse: "Fetch",
  cancel: "Cancel", again: "Run again",
  uploading: "Sending: {0} of {1} MB", fetching: "The server is fetching the recording…", reading: "The server is reading the recording…",
  transcribing: "Transcribed up to {0}", transcribingOf: "Transcribed {0} of {1}", describing: "The model is listening…",
  doneAudio: "Done: {0} of audio in {1} s", done: "Done in {0} s", cancelled: "Cancelled",
  nothing: "No speech was found in this recording.",
  segments: "Transcript: choose a time to play from there", playFrom: "Play from {0}",
  playerBroken: "This browser cannot play the recording; the text and its times stand.",
  doubts: "The server is not sure of this text: {0}",
  copy: "Copy", copied: "Copied", download: "Download as {0}", clear: "Clear",
  close: "Close this message",
  footer: "· speech stays between this page and its server",
  errorMicrophoneDenied: "The microphone was refused. Allow it for this page in the browser's address bar, then press the microphone again.",
  errorMicrophoneMissing: "No microphone was found. Plug one in and press the microphone again.",
  errorMicrophoneBusy: "The microphone cannot be read: another program may be using it.",
  errorMicrophoneInsecure: "Browsers give the microphone only to pages over https or on localhost. Open this page one of those ways.",
  errorMicrophoneEnded: "The microphone was unplugged or taken away. What was said until then has been kept.",
  errorKeyNeeded: "This server asks for an API key. Enter it above.",
  errorKeyWrong: "The server does not accept this API key. Check it and enter it again.",
  errorAway: "The server does not answer. The page keeps trying and goes on by itself when it is back.",
  errorBroken: "The connection broke before the answer was complete. Run it again.",
  errorFull: "The server is full at the moment. Try again in a little while.",
  errorTooLarge: "The file is too large: it has {0} MB, and up to {1} MB are taken for this.",
  errorTooLargeServer: "The recording is too large for this server.",
  errorEmpty: "The file is empty.",
  errorUnreadable: "The server cannot use this recording. It may not be audio, or be damaged.",
  errorServer: "The server failed on this request.",
  errorLive: "The server takes no live connection at the moment; it may be full. The page keeps trying.",
  errorLiveKey: "Browsers cannot send this API key on a live connection: it may hold letters, digits and -._~ but no spaces.",
  errorLiveEvent: "The server reports a problem with the live session.",
};

const CHINESE = {
  connecting: "正在连接…", ready: "就绪", locked: "需要密钥", away: "服务器无响应",
  key: "API 密钥", keyLabel: "此服务器的 API 密钥", keyUse: "使用",
  keyNote: "只保存在此标签页，关闭即忘。服务器不要求密钥时请留空。",
  otherLanguage: "English",
  tabs: "功能", tabLive: "实时字幕", tabFile: "录音文件",
  language: "语言", languageAuto: "自动识别",
  instruction: "指令", instructTranscribe: "转写", instructDescribe: "描述", instructOwn: "自定义…",
  context: "上下文", contextHint: "人名、话题",
  ownLabel: "您的指令", ownHint: "让模型对这段音频做什么",
  captions: "字幕", captionsEmpty: "按下麦克风，开始说话。",
  legend: "灰色文字仍在聆听中：说完后会换成定稿的句子。",
  microphoneStart: "开始字幕", microphoneStop: "停止字幕", microphoneEnd: "不等待，直接结束",
  liveIdle: "麦克风已关闭", liveAsking: "正在等待麦克风…", liveConnecting: "正在连接…",
  liveListening: "正在聆听", liveHearing: "听到您在说话", liveFinishing: "正在完成最后几个字…",
  liveAway: "没有连接。您说的话会保留，{0} 秒后重试",
  lost: "［连接中断太久，有 {0} 秒未能听到］",
  failed: "［这一段未能转写：{0}］",
  dropTitle: "将录音拖放到这里", choose: "选择文件", dropOver: "松开即开始转写",
  dropNote: "任意长度的音频或视频：wav、mp3、m4a、flac、ogg、mp4、webm、mkv",
  urlLabel: "或粘贴其网址", urlUse: "获取",
  cancel: "取消", again: "再次运行",
  uploading: "正在上传：{0} / {1} MB", fetching: "服务器正在获取录音…", reading: "服务器正在读取录音…",
  transcribing: "已转写至 {0}", transcribingOf: "已转写 {0} / {1}", describing: "模型正在听…",
  doneAudio: "完成：{0} 的音频，用时 {1} 秒", done: "完成，用时 {0} 秒", cancelled: "已取消",
  nothing: "这段录音中没有发现语音。",
  segments: "文字稿：选择一个时间即从该处播放", playFrom: "从 {0} 播放",
  playerBroken: "此浏览器无法播放该录音；文字和时间仍然有效。",
  doubts: "服务器对这段文字没有把握：{0}",
  copy: "复制", copied: "已复制", download: "下载 {0}", clear: "清空",
  close: "关闭此消息",
  footer: "· 语音只在本页与其服务器之间传送",
  errorMicrophoneDenied: "麦克风被拒绝。请在浏览器地址栏允许本页使用麦克风，然后再按一次麦克风按钮。",
  errorMicrophoneMissing: "没有找到麦克风。请插入后再按一次麦克风按钮。",
  errorMicrophoneBusy: "无法读取麦克风：可能正被其他程序使用。",
  errorMicrophoneInsecure: "浏览器只允许 https 或 localhost 的网页使用麦克风。请用其中一种方式打开本页。",
  errorMicrophoneEnded: "麦克风被拔出或收回。此前说的话已保留。",
  errorKeyNeeded: "此服务器需要 API 密钥，请在上方输入。",
  errorKeyWrong: "服务器不接受此 API 密钥。请检查后重新输入。",
  errorAway: "服务器没有响应。本页会持续重试，恢复后自动继续。",
  errorBroken: "连接在答复完成前中断。请再次运行。",
  errorFull: "服务器目前已满，请稍后再试。",
  errorTooLarge: "文件太大：共 {0} MB，此项最多接受 {1} MB。",
  errorTooLargeServer: "这段录音对此服务器来说太大。",
  errorEmpty: "文件是空的。",
  errorUnreadable: "服务器无法使用这段录音：它可能不是音频，或已损坏。",
  errorServer: "服务器处理此请求时出错。",
  errorLive: "服务器暂不接受实时连接，可能已满。本页会持续重试。",
  errorLiveKey: "浏览器无法在实时连接上发送此 API 密钥：它可以包含字母、数字和 -._~，但不能有空格。",
  errorLiveEvent: "服务器报告实时会话有问题。",
};

let words = ENGLISH;

// The text of a key in the page's language, {0} and {1} filled in.
export function text(key, ...values) {
  return words[key].replace(/\{(\d)\}/g, (_, index) => values[index]);
}

// Gives an element a text that follows the page's language.
export function put(element, key, ...values) {
  element.dataset.t = key;
  element.dataset.tValues = JSON.stringify(values);
  element.textContent = text(key, ...values);
}

export function label(element, key, ...values) {
  element.dataset.tLabel = key;
  element.dataset.tValues = JSON.stringify(values);
  element.setAttribute("aria-label", text(key, ...values));
}

export function chinese() {
  return words === CHINESE;
}

export function setLanguage(code) {
  words = code === "zh" ? CHINESE : ENGLISH;
  document.documentElement.lang = chinese() ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-t], [data-t-label], [data-t-hint]")) {
    const { t, tLabel, tHint, tValues } = element.dataset;
    const values = JSON.parse(tValues ?? "[]");
    if (t) element.textContent = text(t, ...values);
    if (tLabel) element.setAttribute("aria-label", text(tLabel, ...values));
    if (tHint) element.placeholder = text(tHint);
  }
}
