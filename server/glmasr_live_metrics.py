"""Figures of live transcription at /metrics, beside vLLM's; with several API processes they are added up as vLLM's are."""

from prometheus_client import Counter, Gauge, Histogram

WORD_BUCKETS_S = (*(tenth / 10 for tenth in range(1, 31)), 4, 5, 10, 30)
LATENCY_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 30)


class Metrics:
    """A `Meter`. To be made once in a process, after vLLM has chosen how processes share their figures."""

    def __init__(self):
        self.sessions = Gauge("glmasr_live_sessions", "Open sessions", multiprocess_mode="livesum")
        self.tasks = Gauge("glmasr_live_decodings", "Decodings in flight", multiprocess_mode="livesum")
        self._held = Gauge("glmasr_live_buffered_bytes", "Audio held by open sessions", multiprocess_mode="livesum")
        self._audio = Counter("glmasr_live_audio_seconds", "Seconds of audio received")
        self._partials = Histogram("glmasr_live_partial_seconds", "From asking for a partial text to having it", buckets=LATENCY_BUCKETS_S)
        self._finals = Histogram("glmasr_live_final_seconds", "From the end of a turn to its text", buckets=LATENCY_BUCKETS_S)
        self._words = Histogram("glmasr_live_word_seconds", "From audio's arrival to when two answers or the final have heard it", buckets=WORD_BUCKETS_S)
        self._drops = Counter("glmasr_live_drops", "What was refused, given up or ended, by reason", ["reason"])

    def heard(self, seconds: float) -> None:
        self._audio.inc(seconds)

    def held(self, more_bytes: int) -> None:
        self._held.inc(more_bytes)

    def word(self, seconds: float) -> None:
        self._words.observe(seconds)

    def partial(self, seconds: float) -> None:
        self._partials.observe(seconds)

    def final(self, seconds: float) -> None:
        self._finals.observe(seconds)

    def dropped(self, reason: str) -> None:
        self._drops.labels(reason).inc()
