"""Does a clip's text depend on what else is in flight, in the server's default precision (bfloat16)?

The bundled checkpoint, the held-out clips of tests/test_accuracy.py: each alone, then many at once.
"""

import time
from dataclasses import replace

from question import Answer, parser
from servers import BUNDLED, running
from transcripts import held_out_clips, scores, transcripts


def main() -> None:
    options = parser(__doc__, sized=False)
    options.add_argument("--in-flight", type=int, nargs="+", default=[1, 256], help="the others are compared with the first")
    options.add_argument("--clips", type=int, default=400)
    args = options.parse_args()
    clips = held_out_clips(args.clips)
    waveforms = [clip.waveform for clip in clips]
    answer, first = Answer("agreement", args), None
    with running(replace(BUNDLED, options=tuple(args.options)), args.out, args.out) as server:
        for in_flight in args.in_flight:
            began = time.monotonic()
            texts = transcripts(server.url, waveforms, in_flight)
            took = time.monotonic() - began
            first = first or texts
            different = [(one, other) for one, other in zip(first, texts, strict=True) if one != other]
            answer.add(
                {"in flight": in_flight, "clips": len(clips), "same text %": 100 * (1 - len(different) / len(clips)),
                 **scores(clips, texts), "took s": took},
                different=different,
            )  # fmt: skip


if __name__ == "__main__":
    main()
