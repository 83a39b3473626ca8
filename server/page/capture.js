// The AudioWorklet: the microphone's samples to PCM16 at 24 kHz, channels averaged, in pieces of a tenth of a second.

import { Resampler } from "./resample.js";

const RATE = 24_000;
const PIECE = RATE / 10;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.piece = new Int16Array(PIECE);
    this.filled = 0;
    this.loudest = 0;
    this.running = true;
    this.port.onmessage = () => this.end();
  }

  process([channels]) {
    if (!channels.length || !this.running) return this.running;
    const mono = channels[0].slice();
    for (const other of channels.slice(1)) for (let i = 0; i < mono.length; i++) mono[i] += other[i];
    for (let i = 0; i < mono.length; i++) mono[i] /= channels.length;
    this.add(this.resampler.feed(mono));
    return true;
  }

  add(samples) {
    for (const sample of samples) {
      this.loudest = Math.max(this.loudest, Math.abs(sample));
      this.piece[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32767)));
      if (this.filled === PIECE) this.post();
    }
  }

  post() {
    const pcm = this.piece.slice(0, this.filled);
    this.port.postMessage({ pcm, loudest: this.loudest }, [pcm.buffer]);
    this.filled = this.loudest = 0;
  }

  // All that is left, then the word that this was all.
  end() {
    this.add(this.resampler.finish());
    this.post();
    this.running = false;
    this.port.postMessage({ ended: true });
  }
}

registerProcessor("capture", Capture);
