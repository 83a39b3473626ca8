// From the sound card's rate to another, as the sound comes: a windowed sinc (Kaiser), so that nothing folds back.

const LOBES = 24; // zero crossings on each side; at 48 → 24 kHz: flat to 10 kHz, 80 dB down from 13 kHz
const BETA = 8; // of the Kaiser window: 80 dB
const ROLLOFF = 0.945; // where the pass band ends, of the lower rate's half
const STEPS = 256; // places in the table between two zero crossings; values in between are interpolated

function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-12 * sum; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

// sinc(x) times the window at x = index / STEPS zero crossings, one side.
const TABLE = Float64Array.from({ length: LOBES * STEPS + 2 }, (_, index) => {
  const x = index / STEPS, inside = Math.max(0, 1 - (x / LOBES) ** 2);
  const sinc = x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
  return x > LOBES ? 0 : sinc * bessel(BETA * Math.sqrt(inside)) / bessel(BETA);
});

export class Resampler {
  #held; // samples whose time has not passed, the first `reach` of silence before the beginning
  #at; // the next output's place in them

  constructor(from, to) {
    this.step = from / to;
    this.cutoff = ROLLOFF * Math.min(1, to / from);
    this.reach = Math.ceil(LOBES / this.cutoff);
    this.#held = new Float32Array(this.reach);
    this.#at = this.reach;
  }

  // Samples in, all those out that need no more samples to be known.
  feed(samples) {
    const held = new Float32Array(this.#held.length + samples.length);
    held.set(this.#held);
    held.set(samples, this.#held.length);
    const found = [];
    for (; this.#at + this.reach < held.length; this.#at += this.step) found.push(this.#value(held, this.#at));
    const passed = Math.max(0, Math.floor(this.#at) - this.reach);
    this.#held = held.slice(passed);
    this.#at -= passed;
    return Float32Array.from(found);
  }

  // The last of them, as if silence followed.
  finish() {
    return this.feed(new Float32Array(this.reach));
  }

  #value(held, at) {
    let sum = 0;
    for (let i = Math.ceil(at - this.reach); i <= at + this.reach; i++) {
      const place = Math.abs(i - at) * this.cutoff * STEPS;
      const index = Math.floor(place);
      if (index >= LOBES * STEPS) continue;
      sum += held[i] * (TABLE[index] + (place - index) * (TABLE[index + 1] - TABLE[index]));
    }
    return sum * this.cutoff;
  }
}
