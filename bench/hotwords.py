"""What do hotwords gain, and what do they cost elsewhere? Rare names that the bundled checkpoint gets wrong, all of them listed;
and held-out clips without them. One list of names was tuned on, the other was kept apart. In percent; float32.
"""

import sys
from dataclasses import replace

import names
from names import NAMES, has
from question import Answer, parser
from rapidfuzz.distance import Levenshtein  # jiwer brings it
from recordings import units
from servers import BUNDLED, Server, running
from transcripts import held_out, transcribed

IN_FLIGHT = 16
SEEDS = {"tuned on": 11, "kept apart": 12}


def error_rate(spoken: list[str], texts: list[str]) -> float:
    """Wrong, missing and added words and Chinese characters, in percent of those spoken."""
    pairs = [(units(said), units(text)) for said, text in zip(spoken, texts, strict=True)]
    return 100 * sum(Levenshtein.distance(*pair) for pair in pairs) / sum(len(said) for said, _ in pairs)


def measure(server: Server, which: str, times: int, clips: int) -> dict:
    """A row for one list of names."""
    listed = ",".join(names.names(which))
    named, others = names.clips(which, times, SEEDS[which]), held_out.speech_clips(clips, seed=100 + SEEDS[which])
    waveforms = [clip.waveform for _, clip in named] + [clip.waveform for clip in others]
    plain = transcribed(server.url, waveforms, IN_FLIGHT)
    helped = transcribed(server.url, waveforms, IN_FLIGHT, hotwords=listed)
    wrong = [i for i, (name, _) in enumerate(named) if not has(plain[i], name)]
    found = [i for i in wrong if has(helped[i], named[i][0])]
    spoken, said = [named[i][1].text for i in wrong], [clip.text for clip in others]
    before, after = (error_rate(said, texts[len(named) :]) for texts in (plain, helped))
    return {
        "names": which, "sentences with names": len(wrong), "recall": 100 * len(found) / len(wrong),
        "WER of these": error_rate(spoken, [plain[i] for i in wrong]), "with hotwords": error_rate(spoken, [helped[i] for i in wrong]),
        "clips without": len(others), "WER": before, "WER with hotwords": after, "more": after - before,
    }  # fmt: skip


def main() -> int:
    options = parser(__doc__, sized=False)
    options.add_argument("--times", type=int, default=3, help="that each name is spoken")
    options.add_argument("--clips", type=int, default=200, help="without names")
    args = options.parse_args()
    answer = Answer("hotwords", args)
    with answer.attempt(), running(replace(BUNDLED, options=("--dtype", "float32", *args.options)), args.out, args.out) as server:
        for which in NAMES:
            answer.add(measure(server, which, args.times, args.clips))
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
