"""The embedded corpus: its German is right, its sets are apart, and it is the same everywhere."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parent.parent / "data"
FINGERPRINT = "a981a811be63100be4d369d86ed7b87a423b9a85cd2db6013da62078f9f40084"


@pytest.fixture(scope="module")
def phrasebook() -> Iterator[ModuleType]:
    """The generator, imported the way it is when it runs as a script: with its own folder on the path."""
    sys.path.insert(0, str(DATA))
    try:
        yield importlib.import_module("phrasebook")
    finally:
        sys.path.remove(str(DATA))


@pytest.fixture(scope="module")
def grammar(phrasebook: ModuleType) -> ModuleType:
    return sys.modules["phrasebook_grammar"]


@pytest.fixture(scope="module")
def sets(phrasebook: ModuleType) -> dict[str, list[tuple[str, str]]]:
    return phrasebook.generate(1)


def fingerprint(sets: dict[str, list[tuple[str, str]]]) -> str:
    lines = [f"{name}\t{en}\t{de}\n" for name, pairs in sets.items() for en, de in pairs]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ----------------------------------------------------------------------------------- the sets


def test_the_corpus_is_the_same_everywhere(sets: dict[str, list[tuple[str, str]]]) -> None:
    # A change of words or templates changes this on purpose; a machine or a Python must not.
    assert fingerprint(sets) == FINGERPRINT


def test_another_seed_is_another_corpus(
    phrasebook: ModuleType, sets: dict[str, list[tuple[str, str]]]
) -> None:
    other = phrasebook.generate(2)
    assert fingerprint(other) != fingerprint(sets)
    assert {name: len(pairs) for name, pairs in other.items()}["test"] == len(sets["test"])


def test_sizes(sets: dict[str, list[tuple[str, str]]]) -> None:
    assert len(sets["train"]) >= 30_000
    assert (len(sets["dev"]), len(sets["test"])) == (500, 1000)


def test_one_answer_for_each_source_and_no_pair_twice(sets: dict[str, list[tuple[str, str]]]) -> None:
    pairs = [pair for chosen in sets.values() for pair in chosen]
    # Over all sets together, so this is also: no dev or test sentence of either side is in training.
    assert len({en for en, _ in pairs}) == len(pairs)
    assert len({de for _, de in pairs}) == len(pairs)


@pytest.mark.parametrize("name", ["dev", "test"])
def test_held_out_words_were_all_seen(sets: dict[str, list[tuple[str, str]]], name: str) -> None:
    for side in (0, 1):
        seen = {word.strip(".,?") for pair in sets["train"] for word in pair[side].split()}
        unseen = {word for pair in sets[name] for word in pair[side].split() if word.strip(".,?") not in seen}
        assert not unseen


def test_held_out_pairs_combine_a_template_and_fillers_as_training_never_does(
    phrasebook: ModuleType, sets: dict[str, list[tuple[str, str]]]
) -> None:
    found: dict[str, set[tuple[int, tuple[object, ...]]]] = {name: set() for name in sets}
    pairs = {name: set(chosen) for name, chosen in sets.items()}
    for index, template in enumerate(phrasebook.templates()):
        drawn = phrasebook.combinations(template, 1)
        for name, combinations in drawn.items():
            for words in combinations:
                if phrasebook.render(template, words) in pairs[name]:
                    pairs[name].remove(phrasebook.render(template, words))
                    found[name].add((index, phrasebook.cell(words)))
        assert any(cell[0] == index for cell in found["train"]), f"not in training: {template.en}"
    assert not any(pairs.values()), "sentences that no template accounts for"
    assert found["test"] and not found["test"] & found["train"]
    assert found["dev"] and not found["dev"] & (found["train"] | found["test"])


def test_most_templates_are_tested(phrasebook: ModuleType, sets: dict[str, list[tuple[str, str]]]) -> None:
    every = phrasebook.templates()
    test = set(sets["test"])
    tested = [
        template
        for template in every
        if any(
            phrasebook.render(template, words) in test
            for words in phrasebook.combinations(template, 1)["test"]
        )
    ]
    assert len(tested) > 0.9 * len(every)


def test_sentences_are_clean_text(sets: dict[str, list[tuple[str, str]]]) -> None:
    for pair in (pair for chosen in sets.values() for pair in chosen):
        for sentence in pair:
            assert sentence == " ".join(sentence.split()), sentence
            assert sentence[-1] in ".?" and (sentence[0].isupper() or not sentence[0].isalpha())
            assert not set("{}[]|=+_") & set(sentence), sentence
            assert " ." not in sentence and " ," not in sentence


def test_the_script_writes_the_same_whatever_the_hash_seed(
    tmp_path: Path, sets: dict[str, list[tuple[str, str]]]
) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "99", "PYTHONDONTWRITEBYTECODE": "1"}
    script = [sys.executable, str(DATA / "phrasebook.py"), str(tmp_path)]
    run = subprocess.run(script, env=environment, capture_output=True, check=True)
    assert run.stdout == b"" and f"train {len(sets['train']):,}".encode() in run.stderr
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = {
        f"{name}.{language}": "".join(pair[side] + "\n" for pair in pairs).encode()
        for name, pairs in sets.items()
        for side, language in enumerate(("en", "de"))
    }
    assert written == expected


# ------------------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("n", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (67, "sixty-seven", "siebenundsechzig"),
        (76, "seventy-six", "sechsundsiebzig"),
        (99, "ninety-nine", "neunundneunzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (342, "three hundred and forty-two", "dreihundertzweiundvierzig"),
        (1000, "one thousand", "eintausend"),
        (2031, "two thousand and thirty-one", "zweitausendeinunddreißig"),
        (9916, "nine thousand nine hundred and sixteen", "neuntausendneunhundertsechzehn"),
    ],
)
def test_numbers(grammar: ModuleType, n: int, english: str, german: str) -> None:
    assert (grammar.english_number(n), grammar.german_number(n)) == (english, german)


def read_german(word: str) -> int:
    """German number words back to digits, written the other way round: by cutting them at their joints."""
    ones = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn"
    values = {
        name: n for n, name in enumerate([*ones.split(), "sechzehn", "siebzehn", "achtzehn", "neunzehn"])
    }
    tens = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
    values |= {name: 10 * n for n, name in enumerate(tens, 2)} | {"": 0, "ein": 1}
    thousands, joint, rest = word.rpartition("tausend")
    hundreds, joint_too, rest = rest.rpartition("hundert")
    before, und, after = rest.partition("und")
    below = values[before] + values[after] if und else values[rest]
    assert not joint or thousands
    assert not joint_too or hundreds
    return 1000 * values[thousands] + 100 * values[hundreds] + below


def test_every_number_up_to_9999_reads_back(grammar: ModuleType) -> None:
    assert [read_german(grammar.german_number(n)) for n in range(10_000)] == list(range(10_000))
    assert len({grammar.english_number(n) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize(
    ("hour", "minute", "english", "german"),
    [
        (1, 0, "one o'clock", "ein Uhr"),
        (12, 0, "twelve o'clock", "zwölf Uhr"),
        (3, 5, "five past three", "fünf nach drei"),
        (3, 15, "quarter past three", "Viertel nach drei"),
        (3, 20, "twenty past three", "zwanzig nach drei"),
        (3, 25, "twenty-five past three", "fünf vor halb vier"),
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (3, 35, "twenty-five to four", "fünf nach halb vier"),
        (3, 45, "quarter to four", "Viertel vor vier"),
        (12, 45, "quarter to one", "Viertel vor eins"),
        (11, 50, "ten to twelve", "zehn vor zwölf"),
    ],
)
def test_clock(grammar: ModuleType, hour: int, minute: int, english: str, german: str) -> None:
    word = grammar.clock(hour, minute)
    assert (word.en[""], word.de[""]) == (english, german)


@pytest.mark.parametrize(
    ("day", "english", "plain", "am"),
    [
        (1, "the first of May", "der erste Mai", "am ersten Mai"),
        (3, "the third of May", "der dritte Mai", "am dritten Mai"),
        (7, "the seventh of May", "der siebte Mai", "am siebten Mai"),
        (8, "the eighth of May", "der achte Mai", "am achten Mai"),
        (12, "the twelfth of May", "der zwölfte Mai", "am zwölften Mai"),
        (19, "the nineteenth of May", "der neunzehnte Mai", "am neunzehnten Mai"),
        (20, "the twentieth of May", "der zwanzigste Mai", "am zwanzigsten Mai"),
        (21, "the twenty-first of May", "der einundzwanzigste Mai", "am einundzwanzigsten Mai"),
        (30, "the thirtieth of May", "der dreißigste Mai", "am dreißigsten Mai"),
    ],
)
def test_dates(grammar: ModuleType, day: int, english: str, plain: str, am: str) -> None:
    word = grammar.date_in_words(day, grammar.Month("May", "Mai"))
    assert (word.en[""], word.de[""], word.de["am"]) == (english, plain, am)


def test_prices_and_short_dates(grammar: ModuleType) -> None:
    def both(word: object) -> tuple[str, str]:
        return word.en[""], word.de[""]  # type: ignore[attr-defined]

    assert both(grammar.price_in_words(3, 50)) == ("three euros fifty", "drei Euro fünfzig")
    assert both(grammar.price_in_words(1, 20)) == ("one euro twenty", "ein Euro zwanzig")
    assert both(grammar.price_in_words(21, 0)) == ("twenty-one euros", "einundzwanzig Euro")
    assert both(grammar.price_in_digits(3, 50)) == ("€3.50", "3,50 €")
    assert both(grammar.price_in_digits(12, 5)) == ("€12.05", "12,05 €")
    assert both(grammar.date_in_digits(3, grammar.Month("May", "Mai"))) == ("May 3", "3. Mai")


PHRASES = [
    # determiner, adjective, masculine (Hut), feminine (Jacke), neuter (Hemd)
    ("der", "rot", "der rote Hut", "die rote Jacke", "das rote Hemd"),
    ("den", "rot", "den roten Hut", "die rote Jacke", "das rote Hemd"),
    ("dem", "rot", "dem roten Hut", "der roten Jacke", "dem roten Hemd"),
    ("des", "rot", "des roten Huts", "der roten Jacke", "des roten Hemds"),
    ("ein", "rot", "ein roter Hut", "eine rote Jacke", "ein rotes Hemd"),
    ("einen", "rot", "einen roten Hut", "eine rote Jacke", "ein rotes Hemd"),
    ("einem", "teuer", "einem teuren Hut", "einer teuren Jacke", "einem teuren Hemd"),
    ("keinen", "rot", "keinen roten Hut", "keine rote Jacke", "kein rotes Hemd"),
    ("mein", "alt", "mein alter Hut", "meine alte Jacke", "mein altes Hemd"),
    ("Ihren", "alt", "Ihren alten Hut", "Ihre alte Jacke", "Ihr altes Hemd"),
    ("dieser", "neu", "dieser neue Hut", "diese neue Jacke", "dieses neue Hemd"),
    ("diesem", "neu", "diesem neuen Hut", "dieser neuen Jacke", "diesem neuen Hemd"),
    ("welchen", "neu", "welchen neuen Hut", "welche neue Jacke", "welches neue Hemd"),
    ("-er", "weiß", "weißer Hut", "weiße Jacke", "weißes Hemd"),
    ("-en", "weiß", "weißen Hut", "weiße Jacke", "weißes Hemd"),
    ("-em", "weiß", "weißem Hut", "weißer Jacke", "weißem Hemd"),
    ("zum", "", "zum Hut", "zur Jacke", "zum Hemd"),
    ("im", "", "im Hut", "in der Jacke", "im Hemd"),
    ("ins", "", "in den Hut", "in die Jacke", "ins Hemd"),
    ("am", "zweit", "am zweiten Hut", "an der zweiten Jacke", "am zweiten Hemd"),
    ("vom", "", "vom Hut", "von der Jacke", "vom Hemd"),
]


@pytest.mark.parametrize(("determiner", "adjective", "m", "f", "n"), PHRASES)
def test_cases_genders_and_adjective_endings(
    grammar: ModuleType, determiner: str, adjective: str, m: str, f: str, n: str
) -> None:
    words = grammar.nouns("hat | der Hut, Hüte\n jacket | die Jacke, Jacken\n shirt | das Hemd, Hemden")
    adjectives = [adjective] if adjective else []
    assert [grammar.german_noun_phrase(determiner, adjectives, word) for word in words] == [m, f, n]


@pytest.mark.parametrize(
    ("determiner", "adjective", "phrase"),
    [
        ("der", "rot", "die roten Hüte"),
        ("den", "rot", "die roten Hüte"),
        ("dem", "rot", "den roten Hüten"),
        ("keinen", "rot", "keine roten Hüte"),
        ("meinem", "teuer", "meinen teuren Hüten"),
        ("-en", "rot", "rote Hüte"),
        ("-em", "rot", "roten Hüten"),
    ],
)
def test_plurals(grammar: ModuleType, determiner: str, adjective: str, phrase: str) -> None:
    (hat,) = grammar.nouns("hat | der Hut, Hüte")
    assert grammar.german_noun_phrase(determiner, [adjective], hat, plural=True) == phrase


def test_english_articles_plurals_and_verbs(grammar: ModuleType) -> None:
    apple, university = grammar.nouns("apple | der Apfel, Äpfel\n university | die Universität")
    assert grammar.english_noun_phrase("a", [], apple) == "an apple"
    assert grammar.english_noun_phrase("a", ["red"], apple) == "a red apple"
    assert grammar.english_noun_phrase("a", [], university) == "a university"
    assert [grammar.english_plural(word) for word in ("box", "potato", "lady", "day")] == [
        "boxes",
        "potatoes",
        "ladies",
        "days",
    ]
    assert [grammar.third_person(verb) for verb in ("go out", "tidy up", "watch it", "call")] == [
        "goes out",
        "tidies up",
        "watches it",
        "calls",
    ]


# Whole sentences, each checked by hand: a template by its English; below it its fillers = the one answer.
SENTENCES = """
I would like {a drink}, please.
    tea = Ich hätte gern einen Tee, bitte.
I would like {a hot} with {extra}, please.
    coffee, milk = Ich hätte gern einen Kaffee mit Milch, bitte.
{a dish} and {a drink}, please.
    trout, beer = Eine Forelle und ein Bier, bitte.
{who} [do|does] not eat {stuff}.
    my sister, meat = Meine Schwester isst kein Fleisch.
I am eating {the dish} with {grade topping}.
    salad, fresh, bread = Ich esse den Salat mit frischem Brot.
{small} {vessels} of {liquid}, please.
    two, glass, water = Zwei Gläser Wasser, bitte.
{who} [make|makes] a salad with {ripeness fruits}.
    I, sweet, pear = Ich mache einen Salat mit süßen Birnen.
{the item} is {more} than {the item2}.
    coat, cheaper, dress = Der Mantel ist billiger als das Kleid.
{this item} is {kind}. Is it {kind2} too?
    jacket, new, expensive = Diese Jacke ist neu. Ist sie auch teuer?
I like {the colour item}.
    green, umbrella = Der grüne Regenschirm gefällt mir.
{who} bought {a colour item} {past}.
    we, white, chair, last week = Wir haben letzte Woche einen weißen Stuhl gekauft.
{this colour item} belongs to {my relative}.
    red, bag, grandmother = Diese rote Tasche gehört meiner Großmutter.
I am looking for {a item} that is not too {kind}.
    coat, expensive = Ich suche einen Mantel, der nicht zu teuer ist.
{my wear} is {spot} {the furniture}.
    jacket, under, bed = Meine Jacke ist unter dem Bett.
{the event} begins at {clock}.
    lecture, half past three = Der Vortrag fängt um halb vier an.
{the event} takes place on {date}.
    wedding, the third of May = Die Hochzeit findet am dritten Mai statt.
I believe that {the event} begins at {clock}.
    game, quarter to one = Ich glaube, dass das Spiel um Viertel vor eins anfängt.
{who} [have|has] lived in {city} since {date}.
    he, Vienna, the first of June = Er wohnt seit dem ersten Juni in Wien.
{weekdays} {who} {routine} at {clock}.
    on Mondays, I, get up, ten past six = Montags stehe ich um zehn nach sechs auf.
When [do|does] {who} {routine.infinitive}?
    you, arrive = Wann kommen Sie an?
I know when {who} {routine}.
    she, come back = Ich weiß, wann sie zurückkommt.
{when} {who} {modal} {act}.
    tomorrow evening, we, must, cook = Morgen Abend müssen wir kochen.
{who} [do|does] not want to {act} because {reason}.
    Peter, swim, it is too cold = Peter will nicht schwimmen, weil es zu kalt ist.
{who} {meet} {my relative} {when}.
    we, pick up, uncle, on Monday = Wir holen am Montag meinen Onkel ab.
{who} [have|has] no time because {person} {meet:person} {my relative}.
    I, Anna, call, aunt = Ich habe keine Zeit, weil Anna meine Tante anruft.
{person} works as {a job} in {city}.
    my aunt, doctor, Cologne = Meine Tante arbeitet als Ärztin in Köln.
{person} is {a job}.
    he, engineer = Er ist Ingenieur.
{who} [am|is|are] {number} years old.
    my brother, twenty-one = Mein Bruder ist einundzwanzig Jahre alt.
{who} went to {city} with {my relative} {past}.
    I, Munich, daughter, yesterday = Ich bin gestern mit meiner Tochter nach München gefahren.
My {body} has been hurting for {small} days.
    hand, three = Mir tut seit drei Tagen die Hand weh.
Excuse me, where is the nearest {place}?
    pharmacy = Entschuldigung, wo ist die nächste Apotheke?
How do I get from {the place} to {the place2}?
    station, post office = Wie komme ich vom Bahnhof zur Post?
{the place} is between {the place2} and {the place3}.
    bank, park, school = Die Bank ist zwischen dem Park und der Schule.
Turn {turn} at {the ordinal crossing}.
    left, second, traffic light = Biegen Sie an der zweiten Ampel links ab.
Take {the ordinal road} on the {turn}.
    third, path, right = Nehmen Sie den dritten Weg rechts.
{who} [go|goes] into {the inside} {when}.
    the children, museum, today = Die Kinder gehen heute ins Museum.
{who} [am|is|are] in {the inside}.
    you, library = Sie sind in der Bibliothek.
{who} [go|goes] to {the place} by {vehicle}.
    my sister, airport, tram = Meine Schwester fährt mit der Straßenbahn zum Flughafen.
Do you know whether {the shop} opens at {clock}?
    bakery, seven o'clock = Wissen Sie, ob die Bäckerei um sieben Uhr aufmacht?
The entrance of {the shop} is {where} {the place}.
    castle, behind, bridge = Der Eingang des Schlosses ist hinter der Brücke.
The {line} to {city} leaves at {clock}.
    train, Zurich, one o'clock = Der Zug nach Zürich fährt um ein Uhr ab.
When does the next {line} to {city} leave?
    suburban train, Nuremberg = Wann fährt die nächste S-Bahn nach Nürnberg ab?
I would like {a room} with {feature} for {small} nights.
    double room, a balcony, four = Ich möchte ein Doppelzimmer mit Balkon für vier Nächte.
{when} it will be {sky} in {city}.
    tomorrow, cloudy, Hamburg = Morgen wird es in Hamburg bewölkt.
If it is {sky} {when}, {who} [go|goes] into {the inside}.
    cold, tonight, we, cinema = Wenn es heute Abend kalt ist, gehen wir ins Kino.
"""


def hand_checked() -> list[tuple[str, str, str]]:
    lines = SENTENCES.strip().split("\n")
    rows = []
    for english, below in zip(lines[::2], lines[1::2], strict=True):
        fillers, german = below.strip().split(" = ")
        rows.append((english, fillers, german))
    return rows


@pytest.mark.parametrize(("english", "fillers", "german"), hand_checked())
def test_sentences_checked_by_hand(phrasebook: ModuleType, english: str, fillers: str, german: str) -> None:
    (template,) = (template for template in phrasebook.templates() if template.en == english)
    chosen = zip(template.slots, fillers.split(", "), strict=True)
    words = [
        next(word for word in template.fillers(slot) if word.english == wanted) for slot, wanted in chosen
    ]
    assert phrasebook.render(template, tuple(words))[1] == german
