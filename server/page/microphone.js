// The microphone as a stream of PCM16 pieces at 24 kHz.

import { Refusal } from "./server.js";

// getUserMedia's errors → what to tell. All others are faults of ours.
const ERRORS = {
  NotAllowedError: "errorMicrophoneDenied", SecurityError: "errorMicrophoneDenied",
  NotFoundError: "errorMicrophoneMissing", OverconstrainedError: "errorMicrophoneMissing",
  NotReadableError: "errorMicrophoneBusy", AbortError: "errorMicrophoneBusy",
};
const WANTED = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true };

export class Microphone {
  #tracks;
  #context;
  #node;
  #ended;

  // onPiece(Int16Array, loudest from 0 to 1); onTaken() when the device goes away. Throws a Refusal.
  static async open(onPiece, onTaken) {
    if (!navigator.mediaDevices) throw new Refusal("errorMicrophoneInsecure");
    const microphone = new Microphone();
    try {
      const media = await navigator.mediaDevices.getUserMedia({ audio: WANTED });
      await microphone.#begin(media, onPiece, onTaken);
    } catch (error) {
      if (!(error instanceof DOMException) || !ERRORS[error.name]) throw error;
      throw new Refusal(ERRORS[error.name]);
    }
    return microphone;
  }

  async #begin(media, onPiece, onTaken) {
    this.#tracks = media.getTracks();
    this.#tracks[0].onended = onTaken;
    this.#context = new AudioContext(); // at the device's own rate: browsers differ in whether they convert it
    await this.#context.audioWorklet.addModule("page/capture.js");
    this.#node = new AudioWorkletNode(this.#context, "capture", { numberOfOutputs: 0 });
    this.#ended = new Promise(resolve => {
      this.#node.port.onmessage = ({ data }) => { if (data.ended) resolve(); else onPiece(data.pcm, data.loudest); };
    });
    this.#context.createMediaStreamSource(media).connect(this.#node);
    await this.#context.resume();
  }

  // Turns the microphone off; all it has heard has gone to onPiece when this resolves.
  async close() {
    this.#tracks[0].onended = null;
    this.#node.port.postMessage("end");
    await this.#ended;
    for (const track of this.#tracks) track.stop();
    await this.#context.close();
  }
}
