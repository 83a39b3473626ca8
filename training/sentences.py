"""Random sentences, English and Mandarin, for synthesizing the speech a tiny recogniser is trained on.

The grammar (word lists and templates) is data: words_en.txt and words_zh.txt, format in `Grammar`.
Numbers, dates, times and phone numbers are drawn uniformly and spelled out here.
"""

import functools
import random
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path

LANGUAGES = ("en", "zh")
HELD_OUT_ONE_IN = 20
MAX_INTEGER_DIGITS = 6
JUMBLED = 0.1  # share of what training speaks

Spell = Callable[[random.Random], str]


# ---- English numbers and inflection ----

EN_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
EN_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
EN_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip


def english_number(n: int) -> str:
    """0 <= n < 1,000,000 in words: 405 -> 'four hundred and five'."""
    if n < 20:
        return EN_SMALL[n]
    if n < 100:
        return EN_TENS[n // 10] + (" " + EN_SMALL[n % 10] if n % 10 else "")
    unit, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = divmod(n, unit)
    joint = "" if not rest else " and " if rest < 100 else " "
    return f"{english_number(head)} {word}{joint}{english_number(rest) if rest else ''}"


def english_ordinal(n: int) -> str:
    """1 <= n < 100 as an ordinal: 22 -> 'twenty second'."""
    *head, last = english_number(n).split()
    return " ".join([*head, EN_ORDINALS.get(last, last + "th")])


def english_year(year: int) -> str:
    """1100 <= year < 2100: 1905 -> 'nineteen oh five', 2007 -> 'two thousand and seven'."""
    century, rest = divmod(year, 100)
    if year // 10 == 200:
        return english_number(year)
    tail = "hundred" if rest == 0 else f"oh {EN_SMALL[rest]}" if rest < 10 else english_number(rest)
    return f"{english_number(century)} {tail}"


def english_clock(rng: random.Random) -> str:
    """A time of day with its minutes: 'four oh five', 'eleven forty two'."""
    hour, minute = rng.randrange(1, 13), rng.randrange(1, 60)
    return f"{EN_SMALL[hour]} {'oh ' if minute < 10 else ''}{english_number(minute)}"


def add_s(word: str) -> str:
    """Plural of a regular noun, third person of a verb."""
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return re.sub(r"(?<![aeiou])y$", "ie", word) + "s"


def add_suffix(word: str, suffix: str) -> str:
    """`word` with 'ed' or 'ing': drops a silent e, doubles a final consonant after one short vowel."""
    if re.search(r"[^aeiou]e$|ue$", word):
        return word[:-1] + suffix
    if suffix == "ed" and re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ied"
    if re.search(r"^[^aeiou]*[aeiou][^aeiouwxy]$", word):
        return word + word[-1] + suffix
    return word + suffix


# Each form of an entry `base:second:third`: noun:plural, verb:past:participle, forms by rule left out.
FORMS: dict[str, Callable[[list[str]], str]] = {
    "base": lambda entry: entry[0],
    "plural": lambda entry: entry[1] if len(entry) > 1 else add_s(entry[0]),
    "s": lambda entry: add_s(entry[0]),
    "ing": lambda entry: add_suffix(entry[0], "ing"),
    "past": lambda entry: entry[1] if len(entry) > 1 else add_suffix(entry[0], "ed"),
    "done": lambda entry: entry[-1] if len(entry) > 1 else add_suffix(entry[0], "ed"),
}

AN = re.compile(r"\b([Aa]) (?=(?!use|uni|one\b)[aeiou]|hour|honest)")


def finish_english(text: str) -> str:
    """Capital first letter; 'a' becomes 'an' before a vowel sound."""
    text = AN.sub(r"\1n ", text)
    return text[0].upper() + text[1:]


# ---- Mandarin numbers ----

ZH_DIGITS = "零一二三四五六七八九"


def mandarin_number(n: int) -> str:
    """0 <= n < 1,000,000 in characters: 235 -> '二百三十五', 20010 -> '两万零一十'."""
    if n < 10:
        return ZH_DIGITS[n]
    if n < 20:
        return "十" + (ZH_DIGITS[n % 10] if n % 10 else "")
    for unit, name in ((10000, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= unit:
            break
    head, rest = divmod(n, unit)
    text = ("两" if head == 2 and unit >= 1000 else mandarin_number(head)) + name
    if not rest:
        return text
    gap = "零" if rest < unit // 10 else ""
    one = "一" if 10 <= rest < 20 else ""
    return text + gap + one + mandarin_number(rest)


def mandarin_digits(text: str) -> str:
    """A string of decimal digits read one by one."""
    return "".join(ZH_DIGITS[int(digit)] for digit in text)


def mandarin_clock(rng: random.Random) -> str:
    """A time of day: '四点', '四点半', '四点零五分', '四点三十二分'."""
    hour, minute = rng.randrange(1, 13), rng.randrange(60)
    head = mandarin_count(hour) + "点"
    if rng.random() < 0.4:
        return head + rng.choice(("", "半", "一刻"))
    if minute == 0:
        return head
    return f"{head}{'零' if minute < 10 else ''}{mandarin_number(minute)}分"


def mandarin_count(n: int) -> str:
    """`n` before a measure word: '两', '十二', '四十'."""
    return "两" if n == 2 else mandarin_number(n)


# ---- Both ----


def random_integer(rng: random.Random, smallest: int) -> int:
    """Uniform in the number of digits, then in the value; `smallest` (below 10) bounds one digit."""
    digits = rng.randrange(1, MAX_INTEGER_DIGITS + 1)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else smallest, 10**digits)


def digit_string(rng: random.Random, shortest: int, longest: int) -> str:
    """Decimal digits, each uniform."""
    return "".join(rng.choices("0123456789", k=rng.randrange(shortest, longest + 1)))


# What a template may name beside the categories of its file.
SPELLED: dict[str, dict[str, Spell]] = {
    "en": {
        "integer": lambda rng: english_number(random_integer(rng, smallest=0)),
        "amount": lambda rng: english_number(random_integer(rng, smallest=2)),
        "count": lambda rng: english_number(rng.randrange(2, 100)),
        "few": lambda rng: english_number(rng.randrange(2, 13)),
        "hundreds": lambda rng: english_number(rng.randrange(100, 1000)),
        "hour": lambda rng: EN_SMALL[rng.randrange(1, 13)],
        "clock": english_clock,
        "day": lambda rng: english_ordinal(rng.randrange(1, 32)),
        "ordinal": lambda rng: english_ordinal(rng.randrange(1, 100)),
        "year": lambda rng: english_year(rng.randrange(1700, 2100)),
        "digits": lambda rng: " ".join(EN_SMALL[int(d)] for d in digit_string(rng, 3, 6)),
        "phone": lambda rng: " ".join(EN_SMALL[int(d)] for d in digit_string(rng, 7, 10)),
    },
    "zh": {
        "integer": lambda rng: mandarin_number(random_integer(rng, smallest=0)),
        "amount": lambda rng: mandarin_count(random_integer(rng, smallest=2)),
        "count": lambda rng: mandarin_count(rng.randrange(2, 100)),
        "few": lambda rng: rng.choice("两三四五六七八九十"),
        "ordinal": lambda rng: mandarin_number(rng.randrange(1, 100)),
        "month": lambda rng: mandarin_number(rng.randrange(1, 13)),
        "day": lambda rng: mandarin_number(rng.randrange(1, 32)),
        "year": lambda rng: mandarin_digits(str(rng.randrange(1700, 2100))),
        "clock": mandarin_clock,
        "digits": lambda rng: mandarin_digits(digit_string(rng, 3, 6)),
        "phone": lambda rng: mandarin_digits("1" + digit_string(rng, 10, 10)),
    },
}
FINISH: dict[str, Callable[[str], str]] = {"en": finish_english, "zh": str}


class Grammar:
    """A context-free grammar read from a file of sections, the start symbol being `sentence`.

    [words NAME]  entries apart by white space, '_' for a space within one, ':' between forms (`FORMS`)
    [union NAME]  names of words sections, whose entries are put together
    [lines NAME]  one template per line; 'N* ' before it gives it weight N

    A template names a category as {NAME} or, for a form of its words, {NAME.FORM}. Lines that begin
    with '#' are comments. Raises ValueError on a line outside a section or an unknown name.
    """

    def __init__(self, text: str, spelled: dict[str, Spell]):
        self.spelled = spelled
        self.words: dict[str, list[list[str]]] = {}
        self.rules: dict[str, list[list[str]]] = {}  # category -> templates: literal, name, literal, ...
        kind, name = "", ""
        for line in filter(None, map(str.strip, text.splitlines())):
            if header := re.fullmatch(r"\[(words|union|lines) (\w+)\]", line):
                kind, name = header.groups()
            elif line.startswith("#"):
                continue
            elif kind == "words":
                entries = [word.replace("_", " ").split(":") for word in line.split()]
                self.words.setdefault(name, []).extend(entries)
            elif kind == "union":
                for part in line.split():
                    self.words.setdefault(name, []).extend(self.words[part])
            elif kind == "lines":
                weight, template = re.fullmatch(r"(?:(\d+)\* )?(.*)", line).groups()
                parts = re.split(r"\{([\w.]+)\}", template)
                self.rules.setdefault(name, []).extend([parts] * int(weight or 1))
            else:
                raise ValueError(f"expected a section header like [words noun] first, got {line!r}")
        for template in [template for rule in self.rules.values() for template in rule]:
            for reference in template[1::2]:
                self._resolve(reference)

    def _resolve(self, reference: str) -> None:
        """Make `reference` (NAME or NAME.FORM) expandable; inflects a words section on first use."""
        if reference in self.rules or reference in self.spelled:
            return
        name, _, form = reference.partition(".")
        if name not in self.words or (form and form not in FORMS):
            raise ValueError(f"expected a category of the grammar, got {{{reference}}}")
        self.rules[reference] = [[FORMS[form or "base"](entry)] for entry in self.words[name]]

    def expand(self, name: str, rng: random.Random) -> str:
        """A random expansion of category `name`."""
        if name in self.spelled:
            return self.spelled[name](rng)
        rule = self.rules[name]
        template = rule[int(rng.random() * len(rule))]
        if len(template) == 1:
            return template[0]
        parts = template.copy()
        for i in range(1, len(parts), 2):
            parts[i] = self.expand(parts[i], rng)
        return "".join(parts)


@functools.cache
def load_grammar(language: str) -> Grammar:
    """The grammar of `language`. Raises ValueError for one that is not in LANGUAGES."""
    if language not in LANGUAGES:
        raise ValueError(f"expected a language of {LANGUAGES}, got {language!r}")
    path = Path(__file__).with_name(f"words_{language}.txt")
    return Grammar(path.read_text(encoding="utf-8"), SPELLED[language])


def sentence(language: str, rng: random.Random) -> str:
    """One random sentence of `language` ('en' or 'zh'), punctuated."""
    return FINISH[language](load_grammar(language).expand("sentence", rng))


def jumble(language: str, rng: random.Random) -> str:
    """Words without sense, so that they are heard and not guessed: of any sentences, held out ones among them."""
    if language == "en":
        words = [word for _ in range(4) for word in re.findall("[A-Za-z]+", sentence(language, rng))[1:]] or ["Yes"]
        return finish_english(" ".join(rng.sample(words, min(len(words), rng.randrange(2, 9)))) + ".")
    words = [entry[0] for entries in load_grammar(language).words.values() for entry in entries]
    return "".join(rng.choices(words, k=rng.randrange(2, 6))) + "。"


def is_held_out(text: str) -> bool:
    """Whether the sentence belongs to the tests; the same on every machine, one sentence in twenty."""
    return zlib.crc32(text.encode("utf-8")) % HELD_OUT_ONE_IN == 0


def training_sentence(language: str, rng: random.Random) -> str:
    """One random sentence that is not held out, or now and then a jumble of words."""
    draw = jumble if rng.random() < JUMBLED else sentence
    while is_held_out(text := draw(language, rng)):
        pass
    return text


def held_out_sentence(language: str, rng: random.Random) -> str:
    """One random sentence that is held out, never seen in training."""
    while not is_held_out(text := sentence(language, rng)):
        pass
    return text


def units(language: str, text: str) -> list[str]:
    """What an error rate counts: lower-case words of English, characters of Mandarin."""
    return re.findall(r"[a-z]+", text.lower()) if language == "en" else re.findall(r"[\u4e00-\u9fff]", text)


def main() -> None:
    """Print samples and the statistics of many sentences of each language."""
    samples, total = 20, 200_000
    for language in LANGUAGES:
        rng = random.Random(0)
        print(*(sentence(language, rng) for _ in range(samples)), sep="\n")
        start = time.perf_counter()
        texts = [sentence(language, rng) for _ in range(total)]
        speed = total / (time.perf_counter() - start)
        counts = [units(language, text) for text in texts]
        lengths = [len(count) for count in counts]
        print(
            f"{language}: {total} sentences, {len(set(texts))} distinct, {speed:.0f} a second; "
            f"{len(set().union(*counts))} distinct {'words' if language == 'en' else 'characters'}; "
            f"length {min(lengths)} to {max(lengths)}, mean {sum(lengths) / total:.1f}\n"
        )


if __name__ == "__main__":
    main()
