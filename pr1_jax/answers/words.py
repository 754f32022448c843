"""The words that `prose` knows: numbers, operators, units, and those that change a number.

All in lower case.
"""

import re


def _words(text: str) -> list[str]:
    """The words of a list that is written as text."""
    return text.split()


SMALL = {
    word: value
    for value, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen "
            "fourteen fifteen sixteen seventeen eighteen nineteen"
        )
    )
}
TENS = {
    word: 10 * value
    for value, word in enumerate(
        _words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2
    )
}
SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "lakh": 10**5,
    "crore": 10**7,
    "dozen": 12,
}
_ORDINALS = _words("third fourth fifth sixth seventh eighth ninth tenth")
PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
PARTS |= {word: value for value, word in enumerate(_ORDINALS, start=3)}
PARTS |= {f"{word}s": value for value, word in enumerate(_ORDINALS, start=3)}
_TEENTHS = _words("thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_PARTS = {"eleventh": 11, "twelfth": 12, "twentieth": 20, "hundredth": 100}
_PARTS |= {f"{word}th": SMALL[word] for word in _TEENTHS}
_PARTS |= {f"{word[:-1]}ieth": value for word, value in TENS.items()}
_PARTS |= {f"{word}th": value for word, value in SCALES.items() if word != "dozen"}
SCALES |= {f"{word}s": value for word, value in SCALES.items()}
PARTS |= _PARTS | {f"{word}s": value for word, value in _PARTS.items()}

# What a sentence may say before its one number without a word about the number itself.
COPULAS = frozenset(
    _words(
        "is are was were be been being equals equal makes make gives give yields "
        "costs cost becomes become remains gets get"
    )
)
ABOUT = frozenset(_words("about approximately around roughly exactly only just simply"))

# One of these anywhere in a sentence, and it does not just state its number.
NEGATIONS = frozenset(
    _words(
        "not no never none nor neither cannot nothing nobody without except but "
        "unless if whether however instead rather false wrong incorrect unknown "
        "undefined impossible undetermined unsure maybe perhaps or either isnt arent "
        "wasnt werent dont doesnt didnt cant couldnt wont wouldnt shouldnt hasnt "
        "havent hadnt fails failed fail invalid rejected reject rejects excluded "
        "exclude excludes excluding incorrectly wrongly rule ruled too aint avoid "
        "avoids differ differs besides bar cease ceases refuse refuses pretend "
        "suppose supposing assume assuming unlikely doubt doubts doubtful untrue "
        "mistake mistaken inaccurate inaccurately erroneous erroneously guess bad "
        "outnumber outnumbers anything falsely hardly barely scarcely absurd "
        "contradiction discard discarded"
    )
)
# One of these beside the number, and it is another number.
CHANGES = frozenset(
    _words(
        "than less fewer below under above over between within beyond past up upwards "
        "exceeding exceeds exceed almost nearly half double doubled twice triple "
        "tripled thrice quadruple negative minus plus times divided multiplied "
        "subtracted added multiply divide subtract add halved tripling doubling "
        "halving quadrupled inverted negated repeating recurring imaginary onward "
        "onwards upward downward downwards mille followed absolute exclusive "
        "inclusive rooted greater more fraction portion share conjugate zillion "
        "googol thou hundredweight crore grand gross score tens ones couple max min "
        "most least bound bounded bounds capped limit limited surpass surpasses "
        "surpassed near point sine cosine tangent square decreased increased reduced "
        "sum product difference quotient ratio remainder factorial squared cubed root "
        "roots power powers mod modulo log logarithm base complement supplement basis "
        "multiple multiples factor factors divisor divisors divisible divides "
        "reciprocal inverse opposite some any every all to through until minimum "
        "maximum first third fourth fifth sixth seventh eighth ninth tenth nth order "
        "degree cube percentage dividing congruent smaller larger higher lower bigger "
        "of from starting infinity infinite per cent"
    )
)
# But behind it these do not: 12 of them, miles per hour, 12 in all, 12 every day.
HARMLESS = frozenset(
    _words("any of per from to all every square cube most least near min more share")
)
# Before a colon, an equals sign or `is` these are more than the name of a quantity.
ALTERS = frozenset(
    _words(
        "squared cubed halved doubled tripled quadrupled inverted negated minus plus "
        "less divided multiplied times log sine cosine tangent bound bounds limit "
        "inverse reciprocal negative opposite half twice"
    )
)
# Nouns that name a quantity before a colon, though they change a number beside them.
NOUNS = frozenset(
    _words(
        "sum product difference quotient ratio remainder percentage degree order "
        "first third fourth fifth minimum maximum max min of to from all per root "
        "square score power base every any multiple factor tens ones limit share"
    )
)
# A sentence may be one of these and a number.
LEADS = frozenset(
    _words(
        "so thus hence therefore then ans answer answers total altogether overall "
        "finally only about approximately around roughly exactly just simply get "
        "gives equals makes is are be was were it's that's result solution value cost "
        "price the a an all"
    )
)
# `of` may stand between one of these and its number.
QUANTITIES = frozenset(
    _words(
        "total length height width depth sum cost price area perimeter volume value "
        "speed distance average number age weight score amount profit rate diameter "
        "radius probability temperature salary balance remainder maximum minimum"
    )
)
# These words behind a number are about what it counts; nouns in the plural are, too.
BEHIND = frozenset(
    _words(
        "a an remaining together last next this due so during any is are was were has "
        "have had left remain remains in on at by per of each every total altogether "
        "overall more other different such cup day hour minute year people persons "
        "children men women feet mice geese teeth sheep fish deer oxen dice staff sq "
        "cu square cubic way as for with who that which since because when where "
        "times back old long tall wide deep high away later earlier today tomorrow "
        "now here there all percent am pm o'clock cm km mm and can will would could "
        "should may might"
    )
)
# A sentence about quantities may go up with one of these.
RAISED = frozenset(
    _words("picked ended end ends added adding grew came wound used gave")
)
# Short words of English; longer ones need no list.
SHORT = frozenset(
    _words(
        "a an the he she it we i you they his her its our my us them him me so to of "
        "in on at by as is am are was were be has had have do does did get got gets "
        "ran run eat ate buy sold sell pay paid win won now all and or not no yes for "
        "off out old new too via per up ans tom amy bob ben tim sam joe sue ann max "
        "dan kim ali can may will must need day days men man boy boys girl kid kids "
        "car cars way ways pie pies cup cups egg eggs pen pens toy toys cat cats dog "
        "dogs bag bags box hat hats bus ago age ages end each left more most than "
        "then thus hence both here there their with who how why let one two if but "
        "since part see use used say said sum"
    )
)

# A unit in one of its spellings; those in one line are the same unit.
_SAME_UNITS = (
    "mm millimeter millimeters millimetre millimetres",
    "cm centimeter centimeters centimetre centimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "mg milligram milligrams",
    "g gram grams gm",
    "kg kilogram kilograms kilo kilos",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "s sec secs second seconds",
    "min mins minute minutes",
    "h hr hrs hour hours",
    "day days",
    "week weeks wk wks",
    "month months mo",
    "year years yr yrs",
    "ml milliliter milliliters millilitre millilitres",
    "l liter liters litre litres",
    "dollar dollars usd bucks",
    "cent cents",
    "euro euros eur",
    "mph",
    "kmh kph kmph",
    "degree degrees deg",
    "radian radians rad",
    "am",
    "pm",
    "kw",
    "w watt watts",
    "newton newtons n",
    "joule joules j",
    "volt volts v",
    "mole moles mol",
    "gallon gallons gal",
    "quart quarts qt",
    "teaspoon teaspoons tsp",
    "tablespoon tablespoons tbsp",
    "celsius c",
    "fahrenheit f",
    "kelvin k",
    "pa",
    "kpa",
    "hz hertz",
    "khz",
)
UNITS = {word: row.split()[0] for row in _SAME_UNITS for word in row.split()}
OTHER_UNITS = frozenset(
    _words(
        "cup cups gallon gallons gal quart quarts pint pints acre acres hectare "
        "hectares ton tons tonne tonnes unit units square cubic sq cu deg degree "
        "degrees rad radian radians gbp inr rs rupee rupees yen yuan pence newton "
        "newtons joule joules watt watts volt volts ampere amperes hertz hz khz mhz "
        "kw kwh pa kpa mol cc am pm celsius fahrenheit kelvin"
    )
)
# Symbols that stand behind a number with or without a space.
SYMBOL = re.compile(
    "mm|cm|dm|km|mi|ft|yd|in|mg|kg|lbs?|oz|ml|mL|min|hrs?|secs?|mph|kmh|kph|Hz|kHz|kW"
    "|kWh|kPa|Pa|mol|cc|rad|deg|[mgshLlNJWVAKCF]"
)


def unit(said: list[str]) -> str:
    """The unit that these words are, as `m^2` of `square meters`; "" for other words.

    A lone noun is its own unit: 5 apples are not 5 oranges.
    """
    power, names = "", []
    if len(said) == 1 and said[0].isalpha() and said[0] not in UNITS:
        return said[0].removesuffix("s")
    for word in said:
        name, _, raised = word.replace("{", "").replace("}", "").partition("^")
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word in ("square", "sq") else "^3"
        elif word in ("per", "an", "a"):
            names.append("/")
        elif all(_is_unit(x) for x in name.split("/")):
            named = "/".join(_unit_name(x) for x in name.split("/"))
            names.append(named + (f"^{raised}" if raised else power))
            power = ""
        else:
            return ""
    text = re.sub("/+", "/", "".join(names)).replace("degreecelsius", "celsius")
    text = text.replace("degreefahrenheit", "fahrenheit")
    return _SHORT_UNITS.get(text, text)


def _unit_name(name: str) -> str:
    """The first spelling of a unit: m of meters, newton of N; 5 M are no meters."""
    symbol = name if name.islower() or name not in "LNJWVCFK" else name.lower()
    return UNITS.get(symbol, name.removesuffix("s") if len(name) > 1 else name)


def is_unit(name: str) -> bool:
    """Whether this is a unit of more than one letter, in lower case."""
    return len(name) > 1 and (name in UNITS or name in OTHER_UNITS)


def _is_unit(name: str) -> bool:
    return name in UNITS or name in OTHER_UNITS or bool(SYMBOL.fullmatch(name))


_SHORT_UNITS = {"mph": "mi/h", "kmh": "km/h"}
