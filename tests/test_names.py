"""server/glmasr_names.py: a hotword takes the place of words that were not sure, and of no others."""

import pytest
from glmasr_names import WORD, with_hotwords

SURE, UNSURE = -0.01, -2.0
HOTWORDS = ["Okonkwo", "Guerrero", "New York", "诸葛", "Zhipu"]


def changed(text: str, biased: str, unsure: str = "", hotwords: list[str] = HOTWORDS) -> str:
    """Each word is a token, those within `unsure` of low probability."""
    at = text.find(unsure) if unsure else len(text)
    tokens = [
        (word.start(), word.end(), UNSURE if at <= word.start() < at + len(unsure) else SURE) for word in WORD.finditer(text)
    ]
    return with_hotwords(text, tokens, biased, hotwords)


@pytest.mark.parametrize(
    ("text", "unsure", "biased", "expected"),
    [
        ("My name is Geography.", "Geography", "My name is Guerrero.", "My name is Guerrero."),
        ("Doctor a can call is thirsty.", "a can call", "Doctor Okonkwo is thirsty.", "Doctor Okonkwo is thirsty."),
        ("I like new oak.", "new oak", "I like New York.", "I like New York."),
        ("我前天见过五个。", "五个", "我前天见过诸葛。", "我前天见过诸葛。"),
    ],
)
def test_a_hotword_that_the_bias_offers_takes_the_place_of_unsure_words(text, unsure, biased, expected):
    assert changed(text, biased, unsure) == expected
    assert changed(text, biased) == text


def test_what_the_bias_harms_is_not_taken():
    assert changed("Szymon has had a cough.", "Sh York York a cough.", "Szymon has had") == "Szymon has had a cough."
    assert changed("Turn it off.", "Turn Okonkwo Guerrero.", "it off") == "Turn it off."
    assert changed("I am read.", "I York.", "am read") == "I am read."


def test_the_text_after_a_hotword_stays():
    text = "Call Geography in nine days."
    assert changed(text, "Call Guerrero. I I I", "Geography") == "Call Guerrero in nine days."


def test_unsure_words_that_sound_like_a_hotword_become_it_though_the_bias_offers_none():
    assert changed("Gararo works in Cairo.", "Gararo works in Cairo.", "Gararo") == "Guerrero works in Cairo."
    assert changed("Gararo works in Cairo.", "Gararo works in Cairo.") == "Gararo works in Cairo."
    assert changed("Emily works in Cairo.", "Emily works in Cairo.", "Emily") == "Emily works in Cairo."


def test_nothing_changes_without_words():
    assert changed("", "Okonkwo") == "" and changed("。", "诸葛") == "。"
