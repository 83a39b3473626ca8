"""Sentences with rare names in them, which the bundled checkpoint was never taught, for hotwords: two lists, one to tune on."""

import random
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
from held_out import Clip, describe  # noqa: E402
from sentences import held_out_sentence, load_grammar  # noqa: E402
from speech import SAMPLE_RATE, sample_voice, synthesize  # noqa: E402

NAMES = {
    "tuned on": {
        "en": "Okonkwo Zhipu Iglesias Kowalski Nakamura Petrov Fitzgerald Bjornson Castellano Delacroix Eriksen Fernandez Guerrero "
        "Hashimoto Ivanova Jankowski Khalil Lombardi Mbeki Novak Olufemi Papadakis Quintero Rasmussen Szymanski Takahashi Ulrich "
        "Vasquez Wozniak Yamamoto",
        "zh": "诸葛 慕容 宇文 司徒 端木 尉迟 澹台 皇甫 长孙 令狐",
    },
    "kept apart": {
        "en": "Adeyemi Bergstrom Chaudhry Dubrovsky Echeverria Falkenberg Gutierrez Horvath Ishikawa Jorgensen Kuznetsov Lindqvist "
        "Moriarty Nikolaidis Oyelaran Pellegrini Rodriguez Schneider Tanaka Underhill Villanueva Watanabe Xanthos Yilmaz Zielinski "
        "Abernathy Blackwood Cavendish Drummond Ellsworth",
        "zh": "上官 夏侯 东方 独孤 南宫 公孙 欧阳 轩辕 淳于 呼延",
    },
}  # fmt: skip
PADDING_S = 0.2  # of silence around a sentence


def names(which: str) -> list[str]:
    return [name for some in NAMES[which].values() for name in some.split()]


def _sentence(language: str, name: str, rng: random.Random) -> str:
    """A held-out sentence, one of its names in the place of which `name` stands."""
    words = load_grammar(language).words
    known = [entry[0] for kind in ("name", "surname") for entry in words.get(kind, [])]
    pattern = "|".join(known) if language == "zh" else rf"\b(?:{'|'.join(known)})\b"
    while not re.search(pattern, text := held_out_sentence(language, rng)):
        pass
    return re.sub(pattern, name, text, count=1)


def clips(which: str, times: int, seed: int) -> list[tuple[str, Clip]]:
    """Each name of a list in so many sentences, by voices that training never heard."""
    rng, spoken = random.Random(seed), []
    for language, some in NAMES[which].items():
        for name in some.split() * times:
            voice, text = sample_voice(language, rng, held_out=True), _sentence(language, name, rng)
            waveform = np.pad(synthesize(text, voice), round(PADDING_S * SAMPLE_RATE))
            spoken.append((name, Clip(waveform, text, language, describe(voice, "quiet"), False)))
    return spoken


def has(text: str, name: str) -> bool:
    """Whether the name is in the text, as a word of its own."""
    return re.search(name if not name.isascii() else rf"\b{name}\b", text, re.IGNORECASE) is not None
