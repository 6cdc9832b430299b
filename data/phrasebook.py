"""Make the embedded corpus: a closed little English-German phrasebook.

    python data/phrasebook.py [FOLDER] [--seed N]

writes train, dev and test, each as .en and .de, to FOLDER (data/phrasebook). Only the standard library
is needed. A line of `TEMPLATES` holds the same sentence in both languages, with slots in braces:

    {city}            a word of that kind (see phrasebook_words.py); {city2} is a second one
    {einen kind item} a noun phrase; its German determiner, in the masculine, names the case
    {-en kind items}  the same without a determiner, and in the plural
    {meet.infinitive} another form of the word
    [am|is|are]       agrees with {who} or {person}: I, she, we; of two forms the second is for "she"

Dev and test hold combinations of a template with the fillers of its first two slots (its cells) that
training never shows, while each template and each word is in training.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from phrasebook_grammar import Word, english_noun_phrase, german_noun_phrase
from phrasebook_words import SLOTS

Pair = tuple[str, str]

TEMPLATES = """
# In the café and the restaurant
I would like {a drink}, please. = Ich hätte gern {einen drink}, bitte.
I would like {a hot} with {extra}, please. = Ich hätte gern {einen hot} mit {extra}, bitte.
I would like {a cake} and {a drink}, please. = Ich hätte gern {einen cake} und {einen drink}, bitte.
{a dish} and {a drink}, please. = {einen dish} und {einen drink}, bitte.
{a hot} without {extra}, please. = {einen hot} ohne {extra}, bitte.
Could you bring us {a dish} and {a drink}? = Könnten Sie uns {einen dish} und {einen drink} bringen?
{who} [order|orders] {a dish} with {side}. = {who} [bestelle|bestellt|bestellen] {einen dish} mit {side}.
{who} [eat|eats] {a cake} and [drink|drinks] {a drink}. =
    {who} [esse|isst|essen] {einen cake} und [trinke|trinkt|trinken] {einen drink}.
Would you like {the dish} with {side} or with {side2}? = Möchten Sie {den dish} mit {side} oder mit {side2}?
{the dish} with {side} costs {price}. = {der dish} mit {side} kostet {price}.
{the cake} costs {tag}. = {der cake} kostet {tag}.
{the dish} with {side} is too {taste}. = {der dish} mit {side} ist zu {taste}.
Unfortunately we have no {dish} with {side} today. = Leider haben wir heute {keinen dish} mit {side}.
{who} [do|does] not eat {stuff}. = {who} [esse|isst|essen] {keinen stuff}.
{who} [buy|buys] {grade stuff}. = {who} [kaufe|kauft|kaufen] {-en grade stuff}.
I am eating {the dish} with {grade topping}. = Ich esse {den dish} mit {-em grade topping}.
{the grade stuff} costs {tag}. = {der grade stuff} kostet {tag}.
{small} {vessels} of {liquid}, please. = {small} {-en vessels} {liquid}, bitte.
{small} cups of {hot} with {extra}, please. = {small} Tassen {hot} mit {extra}, bitte.
{who} [drink|drinks] {small} {vessels} of {liquid}. =
    {who} [trinke|trinkt|trinken] {small} {-en vessels} {liquid}.
We need a table for {small} people at {clock}. =
    Wir brauchen um {clock} einen Tisch für {small} Personen.
{who} would like to pay {pay}. = {who} [möchte|möchte|möchten] {pay} bezahlen.

# At the market
{measure} of {fruits}, please. = {measure} {-en fruits}, bitte.
I need {measure} of {fruits} and {measure2} of {fruit2s}. =
    Ich brauche {measure} {-en fruits} und {measure2} {-en fruit2s}.
How much does a kilo of {ripeness fruits} cost? = Was kostet ein Kilo {-er ripeness fruits}?
{the fruits} cost {tag} a kilo. = {der fruits} kosten {tag} das Kilo.
{small} {ripeness fruits}, please. = {small} {-en ripeness fruits}, bitte.
Do you have {ripeness fruits} too? = Haben Sie auch {-en ripeness fruits}?
{who} [make|makes] a salad with {ripeness fruits}. =
    {who} [mache|macht|machen] einen Salat mit {-em ripeness fruits}.
We do not have any {ripeness fruits}. = Wir haben {keinen ripeness fruits}.

# Shopping
I am looking for {a colour item}. = Ich suche {einen colour item}.
{who} [need|needs] {a kind item}. = {who} [brauche|braucht|brauchen] {einen kind item}.
How much does {the colour item} cost? = Was kostet {der colour item}?
{the kind item} costs {price}. = {der kind item} kostet {price}.
{the item} costs {hundred} euros. = {der item} kostet {hundred} Euro.
I will take {the colour wear} and {the kind item}. = Ich nehme {den colour wear} und {den kind item}.
Do you have {a more item}? = Haben Sie {einen more item}?
{the item} is {more} than {the item2}. = {der item} ist {more} als {der item2}.
{the item} is {colour}, but {the item2} is {colour2}. =
    {der item} ist {colour}, aber {der item2} ist {colour2}.
{this item} is {kind}. Is it {kind2} too? = {dieser item} ist {kind}. Ist {item.pronoun} auch {kind2}?
I like {the colour item}. = {der colour item} gefällt mir.
{which colour wear} do you like? = {welcher colour wear} gefällt Ihnen?
May I try on {the colour wear}? = Darf ich {den colour wear} anprobieren?
{the colour wear} is too {fit} for me. = {der colour wear} ist mir zu {fit}.
{who} bought {a colour item} {past}. = {who} [habe|hat|haben] {past} {einen colour item} gekauft.
I have lost {my colour item}. = Ich habe {meinen colour item} verloren.
Have you seen {my kind item}? = Haben Sie {meinen kind item} gesehen?
Is this {your kind item}? = Ist das {Ihr kind item}?
{who} [sell|sells] {kind items}. = {who} [verkaufe|verkauft|verkaufen] {-en kind items}.
{the colour items} cost {tag}. = {der colour items} kosten {tag}.
We do not have any {colour items}. = Wir haben {keinen colour items}.
{small} {colour items} cost {hundred} euros. = {small} {-er colour items} kosten {hundred} Euro.
I am giving {my relative} {a kind item}. = Ich schenke {meinem relative} {einen kind item}.
{this colour item} belongs to {my relative}. = {dieser colour item} gehört {meinem relative}.
This {item} is for {my relative}. = {dieser item} ist für {meinen relative}.
I am looking for {a item} that is not too {kind}. =
    Ich suche {einen item}, {item.relative} nicht zu {kind} ist.
Do you know the man with {the colour wear}? = Kennen Sie den Mann mit {dem colour wear}?
{my wear} is {spot} {the furniture}. = {mein wear} ist {spot} {dem furniture}.
Is {the colour wear} {spot} {the furniture}? = Ist {der colour wear} {spot} {dem furniture}?

# The time, the date, appointments
It is {clock}. = Es ist {clock}.
{the event} begins at {clock}. = {der event} fängt um {clock} an.
{the event} takes place on {date}. = {der event} findet {date.am} statt.
{the event} is on {weekday} at {clock}. = {der event} ist am {weekday} um {clock}.
I believe that {the event} begins at {clock}. = Ich glaube, dass {der event} um {clock} anfängt.
{the event} is on {day} at {time}. = {der event} ist am {day} um {time}.
A ticket for {the show} costs {price}. = Eine Karte für {den show} kostet {price}.
Today is {date}. = Heute ist {date}.
{person} has a birthday on {date}. = {person} hat {date.am} Geburtstag.
{person} was born on {day}. = {person} ist am {day} geboren.
{person} was born in {year}. = {person} ist {year} geboren.
{who} [stay|stays] in {city} until {day}. = {who} [bleibe|bleibt|bleiben] bis zum {day} in {city}.
{who} [have|has] lived in {city} since {date}. =
    {who} [wohne|wohnt|wohnen] seit dem {date.oblique} in {city}.
{who} [have|has] lived in {city} since {year}. = {who} [wohne|wohnt|wohnen] seit {year} in {city}.

# Every day
{who} {routine} at {clock}. = {who} {routine} um {clock} {routine.particle}.
{weekdays} {who} {routine} at {clock}. = {weekdays} {routine} {who} um {clock} {routine.particle}.
When [do|does] {who} {routine.infinitive}? = Wann {routine} {who} {routine.particle}?
{who} {modal} {routine.infinitive} at {clock}. = {who} {modal} um {clock} {routine.infinitive}.
I know when {who} {routine}. = Ich weiß, wann {who} {routine.last}.
I am waiting because {who} {routine} at {clock}. = Ich warte, weil {who} um {clock} {routine.last}.
{who} {modal} {act} {when}. = {who} {modal} {when} {act}.
{when} {who} {modal} {act}. = {when} {modal} {who} {act}.
{who} [want|wants] to {act} {when}. = {who} [will|will|wollen] {when} {act}.
{who} [do|does] not want to {act} because {reason}. =
    {who} [will|will|wollen] nicht {act}, weil {reason}.
If it is {sky}, {who} {modal} {act}. = Wenn es {sky} ist, {modal} {who} {act}.
{who} {meet} {my relative} {when}. = {who} {meet} {when} {meinen relative} {meet.particle}.
{when} {who} {meet} {my relative}. = {when} {meet} {who} {meinen relative} {meet.particle}.
{who} {modal} {meet.infinitive} {my relative} {when}. =
    {who} {modal} {when} {meinen relative} {meet.infinitive}.
{who} [have|has] no time because {person} {meet:person} {my relative}. =
    {who} [habe|hat|haben] keine Zeit, weil {person} {meinen relative} {meet.last:person}.

# People
{greeting}, {name}. = {greeting}, {name}.
This is {name} from {city}. = Das ist {name} aus {city}.
{person} is {a job}. = {person} ist {job}.
{person} works as {a job} in {city}. = {person} arbeitet als {job} in {city}.
{person} would like to become {a job}. = {person} möchte {job} werden.
{who} [am|is|are] {number} years old. = {who} [bin|ist|sind] {number} Jahre alt.
{who} [come|comes] from {country}. = {who} [komme|kommt|kommen] aus {country}.
{who} [come|comes] from {country} and [speak|speaks] {language}. =
    {who} [komme|kommt|kommen] aus {country} und [spreche|spricht|sprechen] {language}.
{who} [speak|speaks] {language} very well. = {who} [spreche|spricht|sprechen] sehr gut {language}.
{who} [speak|speaks] {language}, but no {language2}. =
    {who} [spreche|spricht|sprechen] {language}, aber kein {language2}.
{who} [learn|learns] {language} {weekdays}. = {who} [lerne|lernt|lernen] {weekdays} {language}.
{who} [travel|travels] to {country} in {month}. = {who} [reise|reist|reisen] im {month} nach {country}.
{who} went to {city} with {my relative} {past}. =
    {who} [bin|ist|sind] {past} mit {meinem relative} nach {city} gefahren.
My {body} has been hurting for {small} days. = Mir tut seit {small} Tagen {der body} weh.
My {body} has been hurting since {weekday}. = Mir tut seit {weekday} {der body} weh.

# Finding the way
Where is {the place}? = Wo ist {der place}?
Excuse me, where is the nearest {place}? = Entschuldigung, wo ist {der nächst place}?
How do I get from {the place} to {the place2}? = Wie komme ich {vom place} {zum place2}?
{the place} is {where} {the place2}. = {der place} ist {where} {dem place2}.
Is {the place} {where} {the place2}? = Ist {der place} {where} {dem place2}?
{the place} is between {the place2} and {the place3}. =
    {der place} ist zwischen {dem place2} und {dem place3}.
Turn {turn} at {the place}. = Biegen Sie {am place} {turn} ab.
Turn {turn} at {the ordinal crossing}. = Biegen Sie {am ordinal crossing} {turn} ab.
Take {the ordinal road} on the {turn}. = Nehmen Sie {den ordinal road} {turn}.
Go past {the place} and then turn {turn}. = Gehen Sie {am place} vorbei und biegen Sie dann {turn} ab.
It is {hundred} metres to {the place}. = Es sind {hundred} Meter bis {zum place}.
From {the place} to {the place2} it is {number} minutes on foot. =
    {vom place} bis {zum place2} sind es {number} Minuten zu Fuß.
{who} [wait|waits] at {the place}. = {who} [warte|wartet|warten] {am place}.
{who} [get|gets] off at {the place}. = {who} [steige|steigt|steigen] {am place} aus.
{who} [go|goes] into {the inside} {when}. = {who} [gehe|geht|gehen] {when} {ins inside}.
{who} [am|is|are] in {the inside}. = {who} [bin|ist|sind] {im inside}.
{past} {who} [was|was|were] in {the inside}. = {past} [war|war|waren] {who} {im inside}.
{who} visited {the inside} {past}. = {who} [habe|hat|haben] {past} {den inside} besucht.
{who} [go|goes] to {the place} by {vehicle}. = {who} [fahre|fährt|fahren] mit {dem vehicle} {zum place}.
{the shop} opens at {clock}. = {der shop} macht um {clock} auf.
{the shop} is closed {weekdays}. = {der shop} ist {weekdays} geschlossen.
{weekdays} {the shop} closes at {clock}. = {weekdays} macht {der shop} um {clock} zu.
Do you know whether {the shop} opens at {clock}? = Wissen Sie, ob {der shop} um {clock} aufmacht?
I do not know when {the shop} closes {weekdays}. = Ich weiß nicht, wann {der shop} {weekdays} zumacht.
The entrance of {the shop} is {where} {the place}. = Der Eingang {des shop} ist {where} {dem place}.
There are {number} people in {the inside}. = Es sind {number} Leute {im inside}.
{the monument} is {hundred} years old. = {der monument} ist {hundred} Jahre alt.

# On the train
The {line} to {city} leaves at {clock}. = {der line} nach {city} fährt um {clock} ab.
The train to {city} leaves at {time} from platform {platform}. =
    Der Zug nach {city} fährt um {time} von Gleis {platform} ab.
The train from {city} arrives at {clock} on platform {platform}. =
    Der Zug aus {city} kommt um {clock} auf Gleis {platform} an.
When does the next {line} to {city} leave? = Wann fährt {der nächst line} nach {city} ab?
The last {line} to {city} leaves at {time}. = {der letzt line} nach {city} fährt um {time} ab.
Can you tell me when the {line} to {city} leaves? =
    Können Sie mir sagen, wann {der line} nach {city} abfährt?
I believe that the {line} to {city} leaves at {clock}. =
    Ich glaube, dass {der line} nach {city} um {clock} abfährt.
{ticket} to {city}, please. = {ticket} nach {city}, bitte.
I would like {ticket} to {city}, {class} class. = Ich möchte {ticket} nach {city}, {class} Klasse.
How much does a ticket from {city} to {city2} cost? = Was kostet eine Fahrkarte von {city} nach {city2}?
The {line} to {city} is {number} minutes late. = {der line} nach {city} hat {number} Minuten Verspätung.
{who} [have|has] to change trains in {city}. = {who} [muss|muss|müssen] in {city} umsteigen.
{who} missed the {line} to {city} {past}. =
    {who} [habe|hat|haben] {past} {den line} nach {city} verpasst.
Is this the {line} to {city}? = Ist das {der line} nach {city}?
The {line} from {city} to {city2} takes {small} hours. =
    {der line} von {city} nach {city2} braucht {small} Stunden.

# In the hotel
I would like {a room} with {feature} for {small} nights. =
    Ich möchte {einen room} mit {feature} für {small} Nächte.
Do you have {a comfort room} with {feature}? = Haben Sie {einen comfort room} mit {feature}?
{who} [have|has] reserved {a room} with {feature}. =
    {who} [habe|hat|haben] {einen room} mit {feature} reserviert.
{the room} with {feature} costs {hundred} euros. = {der room} mit {feature} kostet {hundred} Euro.
My room number is {digit} {digit2} {digit3}. = Meine Zimmernummer ist {digit} {digit2} {digit3}.
{the thing} in room {platform} is broken. = {der thing} in Zimmer {platform} ist kaputt.
{the thing} in {my room} does not work. = {der thing} in {meinem room} funktioniert nicht.
Please switch {switch} {the device} at {clock}. = Bitte schalten Sie {den device} um {clock} {switch}.
There is no {missing} in {my room}. = In {meinem room} ist {kein missing}.
We need {a missing} and {a missing2}. = Wir brauchen {einen missing} und {einen missing2}.
Please bring {my relative} {a missing}. = Bitte bringen Sie {meinem relative} {einen missing}.
Please close {the door} because {reason}. = Bitte machen Sie {den door} zu, weil {reason}.

# The weather, and why
{when} it will be {sky} in {city}. = {when} wird es in {city} {sky}.
It is {sky} and {sky2} in {city}. = In {city} ist es {sky} und {sky2}.
{past} it was {sky} in {city}. = {past} war es in {city} {sky}.
In {month} it is {sky} in {city}. = Im {month} ist es in {city} {sky}.
Today it is {degree} degrees in {city}. = Heute sind es in {city} {degree} Grad.
If it is {sky} {when}, {who} [go|goes] into {the inside}. =
    Wenn es {when} {sky} ist, [gehe|geht|gehen] {who} {ins inside}.
{who} [stay|stays] at home because {reason}. = {who} [bleibe|bleibt|bleiben] zu Hause, weil {reason}.
{who} [come|comes] later because {reason}. = {who} [komme|kommt|kommen] später, weil {reason}.
{who} [say|says] that {reason}. = {who} [sage|sagt|sagen], dass {reason}.
{who} [believe|believes] that it will be {sky} {when}. =
    {who} [glaube|glaubt|glauben], dass es {when} {sky} wird.
Is {number} more than {number2}? = Ist {number} mehr als {number2}?
"""

QUOTAS = {"train": 350, "dev": 8, "test": 16}  # for each template; one with few combinations gives fewer
DEV, TEST = 500, 1000
HELD_OUT = 0.2  # of a template's cells, shared by dev and test


@dataclass(frozen=True)
class Template:
    """A sentence with slots, in both languages."""

    en: str
    de: str
    slots: tuple[str, ...]  # in the order of the English

    def fillers(self, slot: str) -> list[Word]:
        """The words that can fill a slot; `city2` takes cities."""
        return SLOTS[_kind(slot)]


Combination = tuple[Word, ...]  # one word for each slot of a template


def templates() -> list[Template]:
    """`TEMPLATES`, parsed."""
    found = []
    for line in TEMPLATES.replace(" =\n    ", " = ").splitlines():
        if line and not line.startswith("#"):
            en, de = line.split(" = ")
            names = [name for spec in re.findall(r"{(.*?)}", en) for name in _slot_names(spec)]
            found.append(Template(en, de, tuple(dict.fromkeys(names))))
    return found


def _kind(slot: str) -> str:
    return slot.rstrip("0123456789")


def _slot_names(spec: str) -> list[str]:
    tokens = spec.split(":")[0].split(".")[0].split(" ")
    return [_singular(token)[0] for token in tokens if _kind(_singular(token)[0]) in SLOTS]


def _singular(token: str) -> tuple[str, bool]:
    """The slot a token names, and whether the token is its plural."""
    plural = token.endswith("s") and _kind(token) not in SLOTS
    return (token[:-1], True) if plural else (token, False)


# ---------------------------------------------------------------------------------- rendering


def render(template: Template, words: Combination) -> Pair:
    """The two sentences of a template with its slots filled."""
    filled = dict(zip(template.slots, words, strict=True))
    return _sentence(template.en, filled, "en"), _sentence(template.de, filled, "de")


def _sentence(text: str, filled: dict[str, Word], language: str) -> str:
    subject = filled.get("who") or filled.get("person")
    text = re.sub(r"{(.*?)}", lambda found: _fill(found[1], filled, subject, language), text)
    text = re.sub(r"\[(.*?)\]", lambda found: _agree(found[1].split("|"), subject), text)
    text = re.sub(r" +([ .,?])", r"\1", text)  # an empty particle leaves a space behind
    return text[0].upper() + text[1:]


def _fill(spec: str, filled: dict[str, Word], subject: Word | None, language: str) -> str:
    spec, _, other = spec.partition(":")
    subject = filled[other] if other else subject
    *before, last = spec.split(" ")
    last, _, form = last.partition(".")
    slot, plural = _singular(last)
    word = filled[slot]
    if before or plural:
        determiner = before.pop(0) if before and _kind(before[0]) not in SLOTS else ""
        adjectives = [str(getattr(filled[name], language)[""]) if name in filled else name for name in before]
        phrase = english_noun_phrase if language == "en" else german_noun_phrase
        return phrase(determiner, adjectives, word, plural=plural)
    return _form(word, form, subject, language)


def _form(word: Word, form: str, subject: Word | None, language: str) -> str:
    forms = word.en if language == "en" else word.de
    if form == "" and "" not in forms:  # a profession
        assert subject is not None
        form = subject.gender
    value = forms[form]
    return value if isinstance(value, str) else _agree(value, subject)


def _agree(forms: tuple[str, ...] | list[str], subject: Word | None) -> str:
    assert subject is not None, f"{forms} must agree with something"
    if len(forms) == 2:
        return forms[subject.person == 1]
    return forms[subject.person]


# ---------------------------------------------------------------------------------- choosing


def generate(seed: int = 1) -> dict[str, list[Pair]]:
    """The pairs of `train`, `dev` and `test`; the same for a seed on every machine."""
    drawn: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    for template in templates():
        for name, found in combinations(template, seed).items():
            drawn[name] += [render(template, words) for words in found]
    _check_one_answer([pair for pairs in drawn.values() for pair in pairs])
    known = words_of(drawn["train"])
    rng = random.Random(seed)
    rng.shuffle(drawn["train"])
    for name, size in (("dev", DEV), ("test", TEST)):
        drawn[name] = rng.sample([pair for pair in drawn[name] if words_of([pair]) <= known], size)
    return drawn


def combinations(template: Template, seed: int) -> dict[str, list[Combination]]:
    """The fillers drawn from a template for each set; the test sets are samples of what is drawn for them."""
    # A generator for each template: adding one leaves the combinations of the others as they were.
    rng = random.Random(f"{seed} {template.en}")
    cells = _split_cells(template, rng)
    return {name: _draw(template, cells[name], quota, rng) for name, quota in QUOTAS.items()}


def words_of(pairs: list[Pair]) -> set[str]:
    """The words of both sides, without punctuation."""
    return {word.strip(".,?") for pair in pairs for sentence in pair for word in sentence.split()}


def cell(words: Combination) -> Combination:
    """The part of a combination that is held out: what fills the first two slots."""
    return words[:2]


def _split_cells(template: Template, rng: random.Random) -> dict[str, list[Combination]]:
    """The cells of a template for each set; of two slots, training keeps a cell for each filler of both."""
    choices = [template.fillers(slot) for slot in template.slots[:2]]
    cells = [chosen for chosen in itertools.product(*choices) if _sensible(template, chosen)]
    rng.shuffle(cells)
    share = int(len(cells) * HELD_OUT)
    left = [_count(cells, index) for index in range(len(choices))]
    sets: dict[str, list[Combination]] = {"train": [], "dev": [], "test": []}
    for chosen in cells:
        spare = len(choices) == 1 or all(left[i][id(word)] > 1 for i, word in enumerate(chosen))
        if share and spare:
            sets["dev" if share % 3 == 0 else "test"].append(chosen)
            share -= 1
            for i, word in enumerate(chosen):
                left[i][id(word)] -= 1
        else:
            sets["train"].append(chosen)
    return sets


def _count(cells: list[Combination], index: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for chosen in cells:
        counts[id(chosen[index])] = counts.get(id(chosen[index]), 0) + 1
    return counts


def _sensible(template: Template, words: Combination) -> bool:
    """Whether no word comes twice: no `from Berlin to Berlin`, no `my brother calls my brother`."""
    pairs = zip(template.slots, words, strict=False)  # of a cell only the first two are known
    used = [word.head or (_kind(slot), word.english) for slot, word in pairs]
    return len(set(used)) == len(used)


def _draw(template: Template, cells: list[Combination], quota: int, rng: random.Random) -> list[Combination]:
    """Up to `quota` distinct combinations, taking the cells in turn."""
    others = [template.fillers(slot) for slot in template.slots[2:]]
    found: dict[Combination, None] = {}
    for chosen in itertools.islice(itertools.cycle(cells), 3 * quota):
        words = (*chosen, *(rng.choice(other) for other in others))
        if _sensible(template, words):
            found.setdefault(words)
        if len(found) == quota:
            break
    return list(found)


def _check_one_answer(pairs: list[Pair]) -> None:
    for side in (0, 1):
        sentences = [pair[side] for pair in pairs]
        assert len(set(sentences)) == len(sentences), "two templates make the same sentence"


# ------------------------------------------------------------------------------------ writing


def write(folder: Path, sets: dict[str, list[Pair]]) -> None:
    """Each set as two line-aligned files, which appear complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in sets.items():
        for side, language in enumerate(("en", "de")):
            path = folder / f"{name}.{language}"
            partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
            partial.write_bytes("".join(pair[side] + "\n" for pair in pairs).encode("utf-8"))
            partial.replace(path)


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(description="Make the embedded English-German phrasebook.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "phrasebook")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sets = generate(arguments.seed)
    write(arguments.folder, sets)
    counts = ", ".join(f"{name} {len(pairs):,}" for name, pairs in sets.items())
    print(f"{arguments.folder}: {counts} pairs", file=sys.stderr)


if __name__ == "__main__":
    main()
