"""The words of the phrasebook, by the slots they fill; one German answer for each English entry."""

from __future__ import annotations

from phrasebook_grammar import (
    Month,
    Word,
    clock,
    date_in_digits,
    date_in_words,
    english_number,
    english_ordinal,
    german_number,
    german_ordinal,
    modals,
    nouns,
    people,
    phrases,
    price_in_digits,
    price_in_words,
    professions,
    verbs,
)


def _numbers(values: range | list[int]) -> list[Word]:
    return [Word(en={"": english_number(n)}, de={"": german_number(n)}) for n in values]


MONTHS = [
    Month("January", "Januar"),
    Month("February", "Februar", 28),
    Month("March", "März"),
    Month("April", "April", 30),
    Month("May", "Mai"),
    Month("June", "Juni", 30),
    Month("July", "Juli"),
    Month("August", "August"),
    Month("September", "September", 30),
    Month("October", "Oktober"),
    Month("November", "November", 30),
    Month("December", "Dezember"),
]
CENTS = (0, 20, 50, 80, 90)
DAYS = [(day, month) for month in MONTHS for day in range(1, month.days + 1)]
PRICES = [(euros, cents) for euros in range(1, 21) for cents in CENTS]

NUMERALS = {
    "digit": _numbers(range(10)),
    "small": _numbers(range(2, 13)),
    "number": _numbers(range(2, 100)),
    "degree": _numbers(range(2, 36)),
    "hundred": _numbers([100 * n + rest for n in range(1, 10) for rest in (0, 20, 50)]),
    "ordinal": [Word(en={"": english_ordinal(n)}, de={"": german_ordinal(n)}) for n in range(2, 9)],
    "platform": [Word(en={"": str(n)}, de={"": str(n)}) for n in range(1, 25)],
    "year": [Word(en={"": str(n)}, de={"": str(n)}) for n in range(1980, 2030)],
    "clock": [clock(hour, minute) for hour in range(1, 13) for minute in range(0, 60, 5)],
    "time": [
        Word(en={"": f"{hour}:{minute:02d}"}, de={"": f"{hour}:{minute:02d} Uhr"})
        for hour in range(6, 24)
        for minute in range(0, 60, 15)
    ],
    "date": [date_in_words(*day) for day in DAYS],
    "day": [date_in_digits(*day) for day in DAYS],
    "price": [price_in_words(*price) for price in PRICES],
    "tag": [price_in_digits(*price) for price in PRICES],
    "month": [Word(en={"": month.en}, de={"": month.de}) for month in MONTHS],
}

TIMES = {
    "when": phrases("""
        today                  | heute
        tomorrow               | morgen
        the day after tomorrow | übermorgen
        this afternoon         | heute Nachmittag
        tonight                | heute Abend
        tomorrow evening       | morgen Abend
        on Monday              | am Montag
        on Tuesday             | am Dienstag
        on Wednesday           | am Mittwoch
        on Thursday evening    | am Donnerstagabend
        on Friday evening      | am Freitagabend
        on Saturday morning    | am Samstagmorgen
        on Sunday afternoon    | am Sonntagnachmittag
        at the weekend         | am Wochenende
        next week              | nächste Woche
        next month             | nächsten Monat
        in two days            | in zwei Tagen
        in an hour             | in einer Stunde
    """),
    "past": phrases("""
        yesterday                | gestern
        the day before yesterday | vorgestern
        yesterday evening        | gestern Abend
        this morning             | heute Morgen
        last week                | letzte Woche
        last month               | letzten Monat
        last year                | letztes Jahr
        last Friday              | letzten Freitag
        two days ago             | vor zwei Tagen
        three weeks ago          | vor drei Wochen
        a month ago              | vor einem Monat
        in the summer            | im Sommer
        in the winter            | im Winter
    """),
    "weekday": phrases("""
        Monday    | Montag
        Tuesday   | Dienstag
        Wednesday | Mittwoch
        Thursday  | Donnerstag
        Friday    | Freitag
        Saturday  | Samstag
        Sunday    | Sonntag
    """),
    "weekdays": phrases("""
        on Mondays    | montags
        on Tuesdays   | dienstags
        on Wednesdays | mittwochs
        on Thursdays  | donnerstags
        on Fridays    | freitags
        on Saturdays  | samstags
        on Sundays    | sonntags
    """),
    "greeting": phrases("""
        Good morning | Guten Morgen
        Good evening | Guten Abend
        Good night   | Gute Nacht
        Goodbye      | Auf Wiedersehen
        Welcome      | Herzlich willkommen
        Thank you    | Danke
    """),
}

PEOPLE = {
    "who": people("""
        I           | ich          | 0
        we          | wir          | 2
        you         | Sie          | 2
        he          | er           | 1m
        she         | sie          | 1f
        Anna        | Anna         | 1f
        Peter       | Peter        | 1m
        my brother  | mein Bruder  | 1m
        my sister   | meine Schwester | 1f
        my mother   | meine Mutter | 1f
        my parents  | meine Eltern | 2
        the children | die Kinder  | 2
    """),
    "person": people("""
        he          | er           | 1m
        she         | sie          | 1f
        Anna        | Anna         | 1f
        Peter       | Peter        | 1m
        my brother  | mein Bruder  | 1m
        my sister   | meine Schwester | 1f
        my father   | mein Vater   | 1m
        my mother   | meine Mutter | 1f
        my uncle    | mein Onkel   | 1m
        my aunt     | meine Tante  | 1f
    """),
    "name": phrases("""
        Mrs Weber   | Frau Weber
        Mr Weber    | Herr Weber
        Mrs Schmidt | Frau Schmidt
        Mr Schmidt  | Herr Schmidt
        Mrs Keller  | Frau Keller
        Mr Keller   | Herr Keller
        Mrs Braun   | Frau Braun
        Mr Braun    | Herr Braun
        Anna        | Anna
        Peter       | Peter
        Lukas       | Lukas
        Julia       | Julia
    """),
    "relative": nouns("""
        brother     | der Bruder
        sister      | die Schwester
        father      | der Vater
        mother      | die Mutter
        husband     | der Mann
        wife        | die Frau
        son         | der Sohn
        daughter    | die Tochter
        uncle       | der Onkel
        aunt        | die Tante
        grandmother | die Großmutter
        grandfather | der Großvater
    """),
    "job": professions("""
        teacher    | Lehrer         | Lehrerin
        doctor     | Arzt           | Ärztin
        cook       | Koch           | Köchin
        baker      | Bäcker         | Bäckerin
        nurse      | Krankenpfleger | Krankenpflegerin
        engineer   | Ingenieur      | Ingenieurin
        student    | Student        | Studentin
        painter    | Maler          | Malerin
        gardener   | Gärtner        | Gärtnerin
        journalist | Journalist     | Journalistin
        lawyer     | Anwalt         | Anwältin
        singer     | Sänger         | Sängerin
    """),
    "body": nouns("""
        head     | der Kopf
        back     | der Rücken
        neck     | der Hals
        stomach  | der Bauch
        arm      | der Arm
        foot     | der Fuß
        hand     | die Hand
        shoulder | die Schulter
        knee     | das Knie
        leg      | das Bein
        ear      | das Ohr
    """),
}

FOOD = {
    "drink": nouns("""
        coffee         | der Kaffee
        tea            | der Tee
        apple juice    | der Apfelsaft
        red wine       | der Rotwein
        beer           | das Bier
        mineral water  | das Mineralwasser
        lemonade       | die Limonade
        cola           | die Cola
        espresso       | der Espresso
    """),
    "hot": nouns("""
        coffee         | der Kaffee
        tea            | der Tee
        espresso       | der Espresso
        cocoa          | der Kakao
    """),
    "extra": phrases("""
        milk   | Milch
        sugar  | Zucker
        cream  | Sahne
        honey  | Honig
        cinnamon | Zimt
    """),
    "dish": nouns("""
        salad          | der Salat
        soup           | die Suppe
        pizza          | die Pizza
        omelette       | das Omelett
        schnitzel      | das Schnitzel
        steak          | das Steak
        sausage        | die Wurst
        trout          | die Forelle
        bread roll     | das Brötchen
        pancake        | der Pfannkuchen
    """),
    "side": phrases("""
        rice      | Reis
        potatoes  | Kartoffeln
        mushrooms | Pilzen
        onions    | Zwiebeln
        tomatoes  | Tomaten
        beans     | Bohnen
        ham       | Schinken
        eggs      | Eiern
    """),
    "cake": nouns("""
        apple cake     | der Apfelkuchen
        cheesecake     | der Käsekuchen
        apple strudel  | der Apfelstrudel
        waffle         | die Waffel
        ice cream      | das Eis
        pretzel        | die Brezel
        croissant      | das Croissant
    """),
    "stuff": nouns("""
        bread     | das Brot
        cheese    | der Käse
        fish      | der Fisch
        meat      | das Fleisch
        milk      | die Milch
        butter    | die Butter
        ham       | der Schinken
        fruit     | das Obst
        chocolate | die Schokolade
    """),
    "topping": nouns("""
        bread      | das Brot
        cheese     | der Käse
        ham        | der Schinken
        butter     | die Butter
        cream      | die Sahne
        vegetables | das Gemüse
    """),
    "grade": phrases("""
        fresh   | frisch
        good    | gut
        cheap   | billig
        German  | deutsch
        Italian | italienisch
        French  | französisch
    """),
    "taste": phrases("""
        salty     | salzig
        cold      | kalt
        sweet     | süß
        expensive | teuer
        dry       | trocken
        small     | klein
    """),
    "fruit": nouns("""
        apple      | der Apfel, Äpfel
        pear       | die Birne, Birnen
        orange     | die Orange, Orangen
        lemon      | die Zitrone, Zitronen
        plum       | die Pflaume, Pflaumen
        potato     | die Kartoffel, Kartoffeln
        tomato     | die Tomate, Tomaten
        onion      | die Zwiebel, Zwiebeln
        mushroom   | der Pilz, Pilze
        egg        | das Ei, Eier
    """),
    "ripeness": phrases("""
        fresh     | frisch
        ripe      | reif
        sweet     | süß
        small     | klein
        green     | grün
        expensive | teuer
        cheap     | billig
    """),
    "measure": phrases("""
        a kilo      | ein Kilo
        half a kilo | ein halbes Kilo
        two kilos   | zwei Kilo
        three kilos | drei Kilo
        a bag       | eine Tüte
        two bags    | zwei Tüten
        a box       | eine Kiste
        two boxes   | zwei Kisten
    """),
    "vessel": nouns("""
        bottle | die Flasche, Flaschen
        glass  | das Glas, Gläser
        jug    | der Krug, Krüge
    """),
    "liquid": phrases("""
        water  | Wasser
        milk   | Milch
        tea    | Tee
        wine   | Wein
        orange juice | Orangensaft
        apple juice  | Apfelsaft
    """),
    "pay": phrases("""
        by card    | mit Karte
        in cash    | bar
        together   | zusammen
        separately | getrennt
        later      | später
        now        | jetzt
    """),
}

SHOPPING = {
    "item": nouns("""
        jacket   | die Jacke, Jacken
        coat     | der Mantel, Mäntel
        shirt    | das Hemd, Hemden
        dress    | das Kleid, Kleider
        skirt    | der Rock, Röcke
        hat      | der Hut, Hüte
        scarf, scarves | der Schal, Schals
        sweater  | der Pullover, Pullover
        blouse   | die Bluse, Blusen
        bag      | die Tasche, Taschen
        suitcase | der Koffer, Koffer
        umbrella | der Regenschirm, Regenschirme
        watch    | die Uhr, Uhren
        book     | das Buch, Bücher
        bicycle  | das Fahrrad, Fahrräder
        lamp     | die Lampe, Lampen
        chair    | der Stuhl, Stühle
        table    | der Tisch, Tische
        pillow   | das Kissen, Kissen
        blanket  | die Decke, Decken
    """),
    "wear": nouns("""
        jacket   | die Jacke, Jacken
        coat     | der Mantel, Mäntel
        shirt    | das Hemd, Hemden
        dress    | das Kleid, Kleider
        skirt    | der Rock, Röcke
        hat      | der Hut, Hüte
        sweater  | der Pullover, Pullover
        blouse   | die Bluse, Blusen
    """),
    "colour": phrases("""
        red    | rot
        blue   | blau
        green  | grün
        yellow | gelb
        black  | schwarz
        white  | weiß
        grey   | grau
        brown  | braun
    """),
    "kind": phrases("""
        new       | neu
        old       | alt
        big       | groß
        small     | klein
        expensive | teuer
        cheap     | billig
        beautiful | schön
        light     | leicht
    """),
    "fit": phrases("""
        big       | groß
        small     | klein
        long      | lang
        short     | kurz
        tight     | eng
        warm      | warm
        expensive | teuer
    """),
    "more": phrases("""
        bigger    | größer
        smaller   | kleiner
        cheaper   | billiger
        lighter   | leichter
        newer     | neuer
        older     | älter
    """),
}

TOWN = {
    "city": phrases("""
        Berlin    | Berlin
        Hamburg   | Hamburg
        Munich    | München
        Cologne   | Köln
        Vienna    | Wien
        Zurich    | Zürich
        Frankfurt | Frankfurt
        Dresden   | Dresden
        Leipzig   | Leipzig
        Nuremberg | Nürnberg
        Hanover   | Hannover
        Salzburg  | Salzburg
        Bremen    | Bremen
        Prague    | Prag
    """),
    "country": phrases("""
        Germany | Deutschland
        Austria | Österreich
        Italy   | Italien
        Spain   | Spanien
        France  | Frankreich
        England | England
        Poland  | Polen
        Greece  | Griechenland
        Sweden  | Schweden
        Canada  | Kanada
        Japan   | Japan
    """),
    "language": phrases("""
        German   | Deutsch
        English  | Englisch
        French   | Französisch
        Spanish  | Spanisch
        Italian  | Italienisch
        Polish   | Polnisch
        Greek    | Griechisch
        Swedish  | Schwedisch
        Japanese | Japanisch
    """),
    "place": nouns("""
        station       | der Bahnhof
        supermarket   | der Supermarkt
        cathedral     | der Dom
        market        | der Markt
        park          | der Park
        harbour       | der Hafen
        airport       | der Flughafen
        pharmacy      | die Apotheke
        bakery        | die Bäckerei
        bank          | die Bank
        library       | die Bibliothek
        church        | die Kirche
        bridge        | die Brücke
        school        | die Schule
        university    | die Universität
        post office   | die Post
        bus stop      | die Bushaltestelle
        museum        | das Museum
        theatre       | das Theater
        cinema        | das Kino
        hotel         | das Hotel
        restaurant    | das Restaurant
        hospital      | das Krankenhaus
        town hall     | das Rathaus
        castle        | das Schloss
        swimming pool | das Schwimmbad
    """),
    "inside": nouns("""
        supermarket   | der Supermarkt
        park          | der Park
        cathedral     | der Dom
        bakery        | die Bäckerei
        library       | die Bibliothek
        church        | die Kirche
        school        | die Schule
        museum        | das Museum
        theatre       | das Theater
        cinema        | das Kino
        hotel         | das Hotel
        restaurant    | das Restaurant
        castle        | das Schloss
    """),
    "shop": nouns("""
        pharmacy      | die Apotheke
        bakery        | die Bäckerei
        bank          | die Bank
        library       | die Bibliothek
        supermarket   | der Supermarkt
        market        | der Markt
        museum        | das Museum
        cinema        | das Kino
        restaurant    | das Restaurant
        castle        | das Schloss
        swimming pool | das Schwimmbad
    """),
    "monument": nouns("""
        cathedral  | der Dom
        church     | die Kirche
        bridge     | die Brücke
        university | die Universität
        library    | die Bibliothek
        castle     | das Schloss
        town hall  | das Rathaus
        hotel      | das Hotel
    """),
    "where": phrases("""
        behind      | hinter
        in front of | vor
        next to     | neben
        opposite    | gegenüber
    """),
    "turn": phrases("""
        left  | links
        right | rechts
    """),
    "road": nouns("""
        street        | die Straße
        path          | der Weg
        alley         | die Gasse
    """),
    "crossing": nouns("""
        junction      | die Kreuzung
        traffic light | die Ampel
        bridge        | die Brücke
        path          | der Weg
    """),
    "vehicle": nouns("""
        train       | der Zug
        bus         | der Bus
        tram        | die Straßenbahn
        underground | die U-Bahn
        ferry       | die Fähre
        boat        | das Schiff
        taxi        | das Taxi
    """),
    "line": nouns("""
        train          | der Zug
        night train    | der Nachtzug
        bus            | der Bus
        regional train | die Regionalbahn
        suburban train | die S-Bahn
    """),
    "ticket": phrases("""
        a ticket             | eine Fahrkarte
        two tickets          | zwei Fahrkarten
        three tickets        | drei Fahrkarten
        a return ticket      | eine Rückfahrkarte
        two return tickets   | zwei Rückfahrkarten
        three return tickets | drei Rückfahrkarten
    """),
    "class": phrases("""
        first  | erster
        second | zweiter
    """),
}

HOTEL = {
    "room": nouns("""
        single room | das Einzelzimmer, Einzelzimmer
        double room | das Doppelzimmer, Doppelzimmer
        flat        | die Wohnung, Wohnungen
    """),
    "feature": phrases("""
        a balcony   | Balkon
        a bath      | Bad
        a shower    | Dusche
        a sea view  | Meerblick
        breakfast   | Frühstück
        a kitchen   | Küche
    """),
    "thing": nouns("""
        lamp        | die Lampe
        shower      | die Dusche
        heating     | die Heizung
        air conditioning | die Klimaanlage
        television  | der Fernseher
        alarm clock | der Wecker
        hairdryer   | der Föhn
        key         | der Schlüssel
        radio       | das Radio
        telephone   | das Telefon
    """),
    "device": nouns("""
        lamp        | die Lampe
        heating     | die Heizung
        air conditioning | die Klimaanlage
        television  | der Fernseher
        alarm clock | der Wecker
        radio       | das Radio
    """),
    "comfort": phrases("""
        big       | groß
        small     | klein
        cheap     | billig
        quiet     | ruhig
        beautiful | schön
        modern    | modern
    """),
    "switch": phrases("""
        on  | ein
        off | aus
    """),
    "furniture": nouns("""
        table    | der Tisch
        chair    | der Stuhl
        cupboard | der Schrank
        shelf    | das Regal
        bed      | das Bett
        sofa     | das Sofa
        suitcase | der Koffer
    """),
    "spot": phrases("""
        behind      | hinter
        in front of | vor
        next to     | neben
        under       | unter
        on          | auf
    """),
    "missing": nouns("""
        towel       | das Handtuch
        pillow      | das Kissen
        blanket     | die Decke
        bottle opener | der Flaschenöffner
        mirror      | der Spiegel
        chair       | der Stuhl
        hairdryer   | der Föhn
        telephone   | das Telefon
        key         | der Schlüssel
    """),
    "door": nouns("""
        door    | die Tür
        window  | das Fenster
        bag     | die Tasche
        suitcase | der Koffer
        book    | das Buch
    """),
}

WEATHER = {
    "sky": phrases("""
        sunny  | sonnig
        cloudy | bewölkt
        windy  | windig
        foggy  | neblig
        cold   | kalt
        warm   | warm
        hot    | heiß
        cool   | kühl
        dry    | trocken
        stormy | stürmisch
    """),
    "reason": phrases("""
        it is raining           | es regnet
        it is snowing           | es schneit
        it is too cold          | es zu kalt ist
        the sun is shining      | die Sonne scheint
        the train is late       | der Zug Verspätung hat
        the shop is closed      | das Geschäft geschlossen ist
        the weather is bad      | das Wetter schlecht ist
        the food is good        | das Essen gut ist
        we are hungry           | wir Hunger haben
        we have no time         | wir keine Zeit haben
        I am tired              | ich müde bin
        I have a headache       | ich Kopfschmerzen habe
        my wife is ill          | meine Frau krank ist
        my son has a birthday   | mein Sohn Geburtstag hat
    """),
}

ACTIVITIES = {
    "act": phrases("""
        swim          | schwimmen
        cook          | kochen
        dance         | tanzen
        sing          | singen
        read          | lesen
        go hiking     | wandern
        go shopping   | einkaufen
        watch television | fernsehen
        ride a bicycle | Fahrrad fahren
        play chess    | Schach spielen
        play football | Fußball spielen
        play the piano | Klavier spielen
        learn German  | Deutsch lernen
        listen to music | Musik hören
        work in the garden | im Garten arbeiten
        sleep         | schlafen
    """),
    "modal": modals("""
        can  | kann kann können      |
        must | muss muss müssen      |
        should | sollte sollte sollten |
        may  | darf darf dürfen      |
        would like to | möchte möchte möchten |
    """),
    "routine": verbs("""
        get up      | stehe steht stehen    | auf
        wake up     | wache wacht wachen    | auf
        go shopping | kaufe kauft kaufen    | ein
        tidy up     | räume räumt räumen    | auf
        watch television | sehe sieht sehen | fern
        go out      | gehe geht gehen       | aus
        come back   | komme kommt kommen    | zurück
        fall asleep | schlafe schläft schlafen | ein
        set off     | fahre fährt fahren    | los
        arrive      | komme kommt kommen    | an
    """),
    "meet": verbs("""
        pick up  | hole holt holen          | ab
        call     | rufe ruft rufen          | an
        invite   | lade lädt laden          | ein
        visit    | besuche besucht besuchen |
        meet     | treffe trifft treffen    |
        see      | sehe sieht sehen         |
    """),
    "show": nouns("""
        concert     | das Konzert
        exhibition  | die Ausstellung
        festival    | das Fest
        game        | das Spiel
        guided tour | die Führung
        lecture     | der Vortrag
    """),
    "event": nouns("""
        concert     | das Konzert
        course      | der Kurs
        lecture     | der Vortrag
        party       | die Feier
        wedding     | die Hochzeit
        meeting     | die Besprechung
        exhibition  | die Ausstellung
        festival    | das Fest
        game        | das Spiel
        guided tour | die Führung
    """),
}
SLOTS: dict[str, list[Word]] = (
    NUMERALS | TIMES | PEOPLE | FOOD | SHOPPING | TOWN | HOTEL | WEATHER | ACTIVITIES
)
