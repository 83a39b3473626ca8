"""Cuts a recording of any length into segments of speech that fit the model, as a stream: silence is left out.

All places are in samples at 16 kHz from the recording's beginning, and all decisions are made chunk by chunk of
`VoiceActivity`, so that the segments do not depend on the blocks that the audio comes in.
"""

from dataclasses import dataclass

import numpy as np

if __package__:
    from .glmasr_vad import CHUNK, SAMPLING_RATE, VoiceActivity
else:  # in the tests, with server/ on the path
    from glmasr_vad import CHUNK, SAMPLING_RATE, VoiceActivity

END_SHARE = 0.7  # speech goes on until its probability is below this share of the threshold it began at
LAG = 2 * CHUNK  # so long after speech its probability stays high
END_PADDING = SAMPLING_RATE // 5  # audio handed out after speech, at most
MIN_SPEECH = SAMPLING_RATE // 10  # shorter sounds are not handed out, nor do they end a pause
MIN_REST = SAMPLING_RATE // 2  # what a cut in speech leaves to the next segment, at least
GRID = 1280  # cuts within speech lie on multiples of this from the segment's first sample: 80 ms, an audio token
PAUSE = SAMPLING_RATE * 24 // 100  # such a cut is placed where the mean energy over this span is lowest
MIN_HALF, EDGE_SHARE = SAMPLING_RATE // 2, 6  # shorter ones `halves` does not make, nor less than a sixth

RANGES = {"threshold": (0.01, 0.99), "prefix_padding_ms": (0, 1000), "silence_ms": (100, 10_000), "max_s": (5, 30)}


@dataclass(frozen=True)
class Cutting:
    """Where segments begin and end.

    Args:
        threshold: probability at which speech begins
        prefix_padding_ms: audio handed out before it, at most
        silence_ms: a pause of so long ends a segment
        max_s: seconds of audio in a segment, at most; longer speech is cut

    Raises:
        ValueError: a value is out of its range in `RANGES`
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_ms: int = 500
    max_s: float = 30

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            if not least <= (value := vars(self)[name]) <= most:
                raise ValueError(f"{name} is {value}; expected {least} to {most}")


@dataclass(frozen=True, eq=False)
class Segment:
    """Speech, and the audio to transcribe for it.

    Attributes:
        start_s, end_s: when the speech begins and ends, in seconds of the recording
        samples: (samples,) float32 at 16 kHz, the speech with some audio before and after it
        speech_s: seconds in which somebody speaks
    """

    start_s: float
    end_s: float
    samples: np.ndarray
    speech_s: float

    @classmethod
    def whole(cls, blocks: list[np.ndarray]) -> "Segment":
        """A recording as it is, from its blocks (samples,), at least one."""
        samples, segmenter = np.concatenate(blocks), Segmenter(Cutting())
        spoken = segmenter.feed(samples) + segmenter.finish()
        return cls(0.0, samples.size / SAMPLING_RATE, samples, sum(segment.speech_s for segment in spoken))


def quietest(samples: np.ndarray, cuts: np.ndarray) -> int:
    """The one of `cuts`, in samples and rising, with the least energy around it in `samples` (samples,); the last of equals."""
    left, right = np.maximum(cuts - PAUSE // 2, 0), np.minimum(cuts + PAUSE // 2, samples.size)
    nearby = samples[left[0] : right[-1]].astype(np.float64)
    energy = np.concatenate([[0.0], np.cumsum(nearby**2)])  # (samples + 1,)
    loudness = (energy[right - left[0]] - energy[left - left[0]]) / (right - left)
    return int(cuts[len(cuts) - 1 - np.argmin(loudness[::-1])])


def halves(samples: np.ndarray) -> list[np.ndarray]:
    """Samples (samples,) cut in two where it is quietest in the middle two thirds; uncut where they are too short for that."""
    least = max(samples.size // EDGE_SHARE, MIN_HALF)
    first, last = -(-least // GRID) * GRID, samples.size - least
    if first > last:
        return [samples]
    return np.split(samples, [quietest(samples, np.arange(first, last + 1, GRID))])


@dataclass
class _Open:
    """A segment that has begun.

    Attributes:
        begin: where its audio begins
        heard: where the first sound in it begins, speech or not
        start, end: where its speech begins and ends so far, leaving out sounds too short for speech; None as long as
            there is nothing else
        run: where the present sound begins, None in a pause
        quiet: where the present pause begins
        continued: whether it follows a cut in speech
    """

    begin: int
    heard: int
    run: int | None
    start: int | None = None
    end: int | None = None
    quiet: int = 0
    continued: bool = False

    def pause(self, at: int, end: int) -> None:
        """The present sound has ended: its probability is low from `at` on, itself it lasted to `end`."""
        if end - self.run >= MIN_SPEECH:
            self.start, self.end = self.run if self.start is None else self.start, end
        self.run, self.quiet = None, at


class Segmenter:
    """Finds the segments of one recording; holds at most `max_s` of it and a second."""

    def __init__(self, cutting: Cutting):
        self._threshold, self._end_threshold = cutting.threshold, END_SHARE * cutting.threshold
        self._prefix = round(cutting.prefix_padding_ms * SAMPLING_RATE / 1000)
        self._silence = round(cutting.silence_ms * SAMPLING_RATE / 1000)
        self._longest = int(cutting.max_s * SAMPLING_RATE)
        self._voice = VoiceActivity()
        self._rest = np.zeros(0, np.float32)  # what there is of the next chunk
        self._total = 0  # samples so far
        # The chunks held, their probabilities, and the number of the first.
        self._chunks: list[np.ndarray] = []
        self._probabilities: list[float] = []
        self._first = 0
        self._next = 0  # the chunk to look at next
        self._floor = 0  # audio before it has been handed out
        self._open: _Open | None = None

    def feed(self, samples: np.ndarray) -> list[Segment]:
        """The segments that are certain with these samples, any number of them, (samples,) float32 at 16 kHz."""
        self._total += samples.size
        return self._listen(samples)

    def finish(self) -> list[Segment]:
        """What is left when the recording has ended. To be called once, after the last `feed`."""
        found = self._listen(np.zeros(-self._rest.size % CHUNK, np.float32))
        if self._open is not None:
            if self._open.run is not None:
                self._open.pause(self._total, self._total)
            found += self._close(self._total)
        return found

    def _listen(self, samples: np.ndarray) -> list[Segment]:
        joined = np.concatenate([self._rest, samples])
        probabilities = self._voice.feed(samples)
        found = []
        for number, probability in enumerate(probabilities.tolist()):
            self._chunks.append(joined[number * CHUNK : (number + 1) * CHUNK].copy())
            self._probabilities.append(probability)
            while self._next < self._first + len(self._chunks):
                found += self._step()
            self._forget()
        self._rest = joined[probabilities.size * CHUNK :].copy()
        return found

    def _step(self) -> list[Segment]:
        """Looks at the next chunk; after a cut, that is one it has seen before."""
        probability, opened = self._probability(self._next), self._open
        begin, end = self._next * CHUNK, min((self._next + 1) * CHUNK, self._total)
        self._next += 1
        if opened is None:
            if probability < self._threshold:
                return []
            opened = self._open = _Open(max(self._floor, begin - self._prefix), begin, begin)
        elif opened.run is None:
            opened.run = begin if probability >= self._threshold else None
        elif probability < self._end_threshold:
            opened.pause(begin, begin - LAG)
        if opened.run is None and end - (opened.quiet - LAG) >= self._silence:
            return self._close(end)
        return self._cut() if end - opened.begin > self._longest else []

    def _probability(self, chunk: int) -> float:
        return self._probabilities[chunk - self._first]

    def _close(self, limit: int) -> list[Segment]:
        """Ends the open segment in its present pause, and its audio at `limit` at the latest."""
        opened, self._open = self._open, None
        start = opened.heard if opened.start is None else opened.start
        end = opened.end
        if end is None:
            end = opened.quiet - LAG if opened.quiet - LAG > start else opened.quiet
            if end - start < MIN_SPEECH and not opened.continued:
                return []
        self._floor = min(max(opened.quiet - LAG, end) + END_PADDING, limit, opened.begin + self._longest)
        return [self._segment(start, end, opened.begin, self._floor)]

    def _cut(self) -> list[Segment]:
        """Divides the open segment, which has become too long: in a pause, else where it is quietest."""
        opened = self._open
        for earliest in (self._longest * 2 // 3, self._longest // 2):
            cuts = np.arange(opened.begin + earliest // GRID * GRID, opened.begin + self._longest + 1, GRID)
            pauses = np.array([cut for cut in cuts if self._probability(cut // CHUNK) < self._end_threshold])
            if pauses.size:
                return self._cut_in_pause(self._quietest(pauses))
        cut = self._quietest(cuts[cuts <= opened.begin + self._longest - MIN_REST])
        start = opened.heard if opened.start is None else opened.start
        self._open = _Open(cut, cut, run=cut, start=cut, continued=True)
        self._floor, self._next = cut, cut // CHUNK + 1
        return [self._segment(start, cut, opened.begin, cut)]

    def _cut_in_pause(self, cut: int) -> list[Segment]:
        """Ends the open segment before `cut`, and looks again at what follows."""
        self._next = quiet = cut // CHUNK
        while self._probability(quiet - 1) < self._end_threshold:
            quiet -= 1
        opened = self._open
        opened.end, opened.quiet = None, quiet * CHUNK
        opened.start = opened.start if opened.start is not None and opened.start < opened.quiet - LAG else None
        return self._close(cut)

    def _quietest(self, cuts: np.ndarray) -> int:
        offset = self._first * CHUNK
        return quietest(np.concatenate(self._chunks), cuts - offset) + offset

    def _segment(self, start: int, end: int, begin: int, stop: int) -> Segment:
        """Speech from `start` to `end` in the audio from `begin` to `stop`."""
        chunks = self._chunks[begin // CHUNK - self._first : -(-stop // CHUNK) - self._first]
        samples = np.concatenate(chunks)[begin % CHUNK :][: stop - begin]
        spoken = self._probabilities[start // CHUNK - self._first : -(-end // CHUNK) - self._first]
        speech = CHUNK * sum(probability >= self._end_threshold for probability in spoken)
        return Segment(start / SAMPLING_RATE, end / SAMPLING_RATE, samples, min(speech, end - start) / SAMPLING_RATE)

    def _forget(self) -> None:
        """Lets go of the audio that no segment will need."""
        needed = self._open.begin if self._open else max(self._floor, self._next * CHUNK - self._prefix)
        number = needed // CHUNK - self._first
        del self._chunks[:number], self._probabilities[:number]
        self._first += number
