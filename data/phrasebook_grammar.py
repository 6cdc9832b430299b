"""The grammar behind the phrasebook: numbers, clock, dates, prices, cases, agreement.

It knows nothing of which words or sentences there are. In German, a determiner in its masculine form
names the case of a whole noun phrase: `einen` asks for an accusative, and with a feminine noun becomes
`eine`. The same spelling is used by the templates in phrasebook.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Forms = Mapping[str, str | tuple[str, str, str]]  # a tuple is (I, she, we): it agrees with the subject

# ---------------------------------------------------------------------------------------- words


@dataclass(frozen=True, eq=False)
class Word:
    """What fills a slot: its forms in both languages, "" being the plain one."""

    en: Forms
    de: Forms
    gender: str = ""  # m, f, n for nouns; m or f for people whose profession follows it
    person: int = 1  # of a subject: 0 I, 1 she, 2 we

    @property
    def english(self) -> str:
        """The plain English, of a verb as after `I`."""
        plain = self.en[""]
        return plain if isinstance(plain, str) else plain[0]

    @property
    def head(self) -> str:
        """The English word that must not come twice in a sentence; empty where it may."""
        return self.english.rsplit(" ", 1)[-1] if self.gender else ""


def _rows(table: str) -> list[list[str]]:
    lines = [line.strip() for line in table.splitlines()]
    return [[cell.strip() for cell in line.split("|")] for line in lines if line]


def phrases(table: str) -> list[Word]:
    """Rows `english | german`: words that never change."""
    return [Word(en={"": en}, de={"": de}) for en, de in _rows(table)]


def nouns(table: str) -> list[Word]:
    """Rows `english[, irregular plural] | article noun[, plural]`."""
    found = []
    for english, german in _rows(table):
        en, _, irregular = english.partition(", ")
        article, _, rest = german.partition(" ")
        singular, _, plural = rest.partition(", ")
        gender = {"der": "m", "die": "f", "das": "n"}[article]
        forms = {"": singular, "plural": plural, "pronoun": {"m": "er", "f": "sie", "n": "es"}[gender]}
        forms["relative"] = article
        found.append(Word(en={"": en, "plural": irregular or english_plural(en)}, de=forms, gender=gender))
    return found


def people(table: str) -> list[Word]:
    """Rows `english | german | person[gender]`."""
    rows = _rows(table)
    return [Word(en={"": en}, de={"": de}, person=int(who[0]), gender=who[1:]) for en, de, who in rows]


def professions(table: str) -> list[Word]:
    """Rows `english | masculine | feminine`."""
    return [Word(en={"": en}, de={"m": m, "f": f}) for en, m, f in _rows(table)]


def verbs(table: str) -> list[Word]:
    """Rows `english | ich-form er-form wir-form | particle`; the particle may be empty."""
    found = []
    for en, finite, particle in _rows(table):
        first, third, plural = finite.split(" ")
        german: Forms = {
            "": (first, third, plural),
            "particle": particle,
            "infinitive": particle + plural,
            "last": (particle + first, particle + third, particle + plural),
        }
        found.append(Word(en={"": (en, third_person(en), en), "infinitive": en}, de=german))
    return found


def modals(table: str) -> list[Word]:
    """Like `verbs`, but English says `he can` as it says `I can`."""
    return [Word(en={"": word.en["infinitive"]}, de=word.de) for word in verbs(table)]


# ------------------------------------------------------------------------------ German cases

DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das", "p": "die"},
    "acc": {"m": "den", "f": "die", "n": "das", "p": "die"},
    "dat": {"m": "dem", "f": "der", "n": "dem", "p": "den"},
    "gen": {"m": "des", "f": "der", "n": "des", "p": "der"},
}
EIN = {
    "nom": {"m": "", "f": "e", "n": "", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "p": "en"},
    "gen": {"m": "es", "f": "er", "n": "es", "p": "er"},
}
STRONG = {  # also the endings of dieser
    "nom": {"m": "er", "f": "e", "n": "es", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "es", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "p": "en"},
}
CONTRACTED = {
    "zu dem": "zum",
    "zu der": "zur",
    "in dem": "im",
    "in das": "ins",
    "an dem": "am",
    "von dem": "vom",
}
IRREGULAR_STEMS = {"teuer": "teur", "dunkel": "dunkl"}

# The masculine form of a determiner -> (kind, stem or preposition, case).
DETERMINERS: dict[str, tuple[str, str, str]] = {
    **{DEFINITE[case]["m"]: ("der", "", case) for case in DEFINITE},
    **{
        stem + ending["m"]: ("ein", stem, case)
        for stem in ("ein", "kein", "mein", "Ihr", "unser")
        for case, ending in EIN.items()
    },
    **{stem + STRONG[case]["m"]: ("dieser", stem, case) for stem in ("dies", "welch") for case in STRONG},
    **{"-" + STRONG[case]["m"]: ("", "", case) for case in STRONG},
    "zum": ("der", "zu", "dat"),
    "im": ("der", "in", "dat"),
    "am": ("der", "an", "dat"),
    "vom": ("der", "von", "dat"),
    "ins": ("der", "in", "acc"),
}


def german_noun_phrase(determiner: str, adjectives: list[str], noun: Word, *, plural: bool = False) -> str:
    """The declined phrase, such as `einen roten Hut`; `determiner` is in its masculine form."""
    kind, stem, case = DETERMINERS[determiner]
    gender = "p" if plural else noun.gender
    words = [_article(kind, stem, case, gender)]
    words += [decline(adjective, _adjective_ending(kind, case, gender)) for adjective in adjectives]
    words.append(_declined_noun(noun, case, plural))
    return " ".join(word for word in words if word)


def _article(kind: str, stem: str, case: str, gender: str) -> str:
    if kind == "der":
        both = f"{stem} {DEFINITE[case][gender]}".strip()
        return CONTRACTED.get(both, both)
    if kind == "ein":
        return stem + EIN[case][gender]
    return stem + STRONG[case][gender] if kind else ""


def _adjective_ending(kind: str, case: str, gender: str) -> str:
    strong = STRONG.get(case, {}).get(gender, "en")
    if not kind or (kind == "ein" and gender != "p" and EIN[case][gender] == ""):
        return strong
    if gender != "p" and case in ("nom", "acc"):
        return "en" if (case, gender) == ("acc", "m") else "e"
    return "en"


def decline(adjective: str, ending: str) -> str:
    """An adjective with its ending; `teuer` gives `teure`."""
    return IRREGULAR_STEMS.get(adjective, adjective) + ending


def _declined_noun(noun: Word, case: str, plural: bool) -> str:
    word = str(noun.de["plural" if plural else ""])
    if plural:
        assert word, f"{noun.en['']} has no plural"
        return word + "n" if case == "dat" and word[-1] not in "ns" else word
    if case == "gen" and noun.gender in "mn":
        return word + ("es" if word.endswith(("s", "ß", "z", "x")) else "s")
    return word


# ------------------------------------------------------------------------------------ English


def english_plural(noun: str) -> str:
    """The regular plural."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "ato")) else "s")


def third_person(verb: str) -> str:
    """The he-form of a verb phrase: `go out` gives `goes out`."""
    first, space, rest = verb.partition(" ")
    if first.endswith("y") and first[-2] not in "aeiou":
        return first[:-1] + "ies" + space + rest
    return first + ("es" if first.endswith(("o", "s", "x", "ch", "sh")) else "s") + space + rest


def english_noun_phrase(determiner: str, adjectives: list[str], noun: Word, *, plural: bool = False) -> str:
    """The phrase with `a` or `an` as the sound wants."""
    words = [*adjectives, str(noun.en["plural" if plural else ""])]
    if determiner == "a" and words[0][0] in "aeiouAEIOU" and not words[0].startswith(("uni", "euro")):
        determiner = "an"
    return " ".join(word for word in (determiner, *words) if word)


# ------------------------------------------------------------------------------------ numbers

ENGLISH_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN_SMALL = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn"
).split()
GERMAN_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english_number(n: int) -> str:
    """0 to 9999 in words: `two hundred and fifty-one`."""
    if n < 20:
        return ENGLISH_SMALL[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return ENGLISH_TENS[tens] + (f"-{ENGLISH_SMALL[ones]}" if ones else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    big, rest = divmod(n, size)
    joint = " and " if rest < 100 else " "
    return f"{ENGLISH_SMALL[big]} {name}" + (joint + english_number(rest) if rest else "")


def german_number(n: int) -> str:
    """0 to 9999 in words: `zweihunderteinundfünfzig`."""
    if n < 20:
        return GERMAN_SMALL[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return (_before_und(ones) + "und" if ones else "") + GERMAN_TENS[tens]
    size, name = (1000, "tausend") if n >= 1000 else (100, "hundert")
    big, rest = divmod(n, size)
    return _before_und(big) + name + (german_number(rest) if rest else "")


def _before_und(digit: int) -> str:
    return "ein" if digit == 1 else GERMAN_SMALL[digit]


ENGLISH_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"}
ENGLISH_ORDINALS |= {"nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}
GERMAN_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def english_ordinal(n: int) -> str:
    """1 to 99: `twenty-first`."""
    tens, dash, last = english_number(n).rpartition("-")
    return tens + dash + ENGLISH_ORDINALS.get(last, last + "th")


def german_ordinal(n: int) -> str:
    """1 to 99 without its ending, like any adjective: `dritt`, `einundzwanzigst`."""
    return GERMAN_ORDINALS.get(n) or german_number(n) + ("t" if n < 20 else "st")


# ---------------------------------------------------------------------- clock, dates, prices


def clock(hour: int, minute: int) -> Word:
    """A time as people say it, `hour` 1 to 12 and `minute` in steps of five: half past three is halb vier."""
    following = hour % 12 + 1
    past, to = minute <= 30, 60 - minute
    minutes = {15: "quarter", 30: "half"}.get(minute if past else to)
    english = minutes or english_number(minute if past else to)
    en = f"{english} past {english_number(hour)}" if past else f"{english} to {english_number(following)}"
    after, before = german_number(hour), german_number(following)
    de = {
        0: f"{_before_und(hour) if hour == 1 else after} Uhr",
        15: f"Viertel nach {after}",
        25: f"fünf vor halb {before}",
        30: f"halb {before}",
        35: f"fünf nach halb {before}",
        45: f"Viertel vor {before}",
    }.get(minute) or (
        f"{german_number(minute)} nach {after}" if past else f"{german_number(to)} vor {before}"
    )
    return Word(en={"": en if minute else f"{english_number(hour)} o'clock"}, de={"": de})


@dataclass(frozen=True)
class Month:
    """A month by its names and length."""

    en: str
    de: str
    days: int = 31


def date_in_words(day: int, month: Month) -> Word:
    """`the third of May`: plain `der dritte Mai`, `am` is `am dritten Mai`, `oblique` lacks the article."""
    ordinal = german_ordinal(day)
    forms = {
        "": f"der {ordinal}e {month.de}",
        "am": f"am {ordinal}en {month.de}",
        "oblique": f"{ordinal}en {month.de}",
    }
    return Word(en={"": f"the {english_ordinal(day)} of {month.en}"}, de=forms)


def date_in_digits(day: int, month: Month) -> Word:
    """`May 3` and `3. Mai`."""
    return Word(en={"": f"{month.en} {day}"}, de={"": f"{day}. {month.de}"})


def price_in_words(euros: int, cents: int) -> Word:
    """`three euros fifty` and `drei Euro fünfzig`."""
    en = f"{english_number(euros)} euro{'s' if euros != 1 else ''}"
    de = f"{_before_und(euros) if euros == 1 else german_number(euros)} Euro"
    if cents:
        en, de = f"{en} {english_number(cents)}", f"{de} {german_number(cents)}"
    return Word(en={"": en}, de={"": de})


def price_in_digits(euros: int, cents: int) -> Word:
    """`€3.50` and `3,50 €`."""
    return Word(en={"": f"€{euros}.{cents:02d}"}, de={"": f"{euros},{cents:02d} €"})
