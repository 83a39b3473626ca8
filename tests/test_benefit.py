"""Hotwords over real HTTP, with the bundled checkpoint: what they gain, and that they cost nothing elsewhere; and bench/guard.py's counts."""

import sys

from conftest import ROOT, Server

sys.path.insert(0, str(ROOT / "bench"))
import guard  # noqa: E402
import hotwords  # noqa: E402

MIN_RECALL, MAX_HARM = 20.0, 0.2  # percent of names, points of WER


def test_listed_names_are_found_and_other_speech_keeps_its_words(server: Server):
    """Names that nothing was tuned on."""
    found = hotwords.measure(server, "kept apart", times=2, clips=100)
    print(found)
    assert found["recall"] >= MIN_RECALL and found["more"] <= MAX_HARM and found["with hotwords"] < found["WER of these"]


def test_what_is_invented_and_what_is_lost_is_counted():
    assert guard.invented("", "no no!") == 4 and guard.invented("I am", "I am. I am.") == 3 and guard.invented("I am", "I") == 0
    assert guard.lost("it is raining", "it is raining", "it is") == 1 and guard.lost("it is", "it", "it is") == 0
