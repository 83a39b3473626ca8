"""Where turns begin and end, from a detector's probabilities, chunk by chunk; and where a long one may be cut."""

from collections import deque

if __package__:
    from .glmasr_segments import END_SHARE, LAG
    from .glmasr_vad import CHUNK, SAMPLING_RATE
else:
    from glmasr_segments import END_SHARE, LAG
    from glmasr_vad import CHUNK, SAMPLING_RATE

START_CHUNKS = 2  # over the threshold in a row: 64 ms
WINDOW = 15 * SAMPLING_RATE  # audio that is decoded at a time while somebody speaks, at most
CUT_WITHIN = 4 * SAMPLING_RATE  # a longer turn is cut in the last so much of it
RECENT = CUT_WITHIN // CHUNK


class Turns:
    """One stream's turns. All places are samples at 16 kHz from the stream's beginning, multiples of `CHUNK`.

    Attributes:
        place: the end of what was heard
        speaking: whether a turn is open
        start: where its speech began
        last: where the last chunk with speech ended
        spoken: samples of all chunks with speech, ever
    """

    def __init__(self, threshold: float, silence_ms: int | None):
        """`silence_ms`: a pause of so long ends a turn; None: only the client does."""
        self.configure(threshold, silence_ms)
        self.place = self.start = self.last = self.spoken = 0
        self.speaking = False
        self._over = 0  # chunks over the threshold, in a row
        self._recent: deque[float] = deque(maxlen=RECENT)

    def configure(self, threshold: float, silence_ms: int | None) -> None:
        """Between turns."""
        self._threshold = threshold
        self._silence = None if silence_ms is None else silence_ms * SAMPLING_RATE // 1000

    def step(self, probability: float) -> str | None:
        """The next chunk: "start" where a turn begins with it or just before, "stop" where it ends one."""
        self.place += CHUNK
        self._recent.append(probability)
        self._over = self._over + 1 if probability >= self._threshold else 0
        if probability >= END_SHARE * self._threshold:
            self.last, self.spoken = self.place, self.spoken + CHUNK
        if self._silence is None:
            return None
        if not self.speaking:
            if self._over < START_CHUNKS:
                return None
            self.speaking, self.start = True, self.place - START_CHUNKS * CHUNK
            return "start"
        if self.place - (self.last - LAG) >= self._silence and self.place > self.last:
            self.speaking = False
            return "stop"
        return None

    def end(self) -> None:
        """The client has ended the turn."""
        self.speaking, self._over = False, -LAG // CHUNK  # for so long the probability may be that of what has ended

    def cut(self) -> int:
        """Where to cut a turn that has become too long: where speech was least likely of late, the last of equals."""
        lowest = min(self._recent)
        behind = next(i for i, probability in enumerate(reversed(self._recent)) if probability == lowest)
        return self.place - behind * CHUNK - CHUNK // 2
