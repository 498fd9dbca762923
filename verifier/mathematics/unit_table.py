"""The table of units: the dimension of every spelling, and its size in the base unit of that dimension."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

_PREFIXES = {
    "n": "1/1000000000",
    "μ": "1/1000000",
    "m": "1/1000",
    "c": "1/100",
    "d": "1/10",
    "k": "1000",
    "M": "1000000",
}
_PREFIXES |= {"G": "1000000000", "T": "1000000000000"}
_LONG_PREFIXES = {"nano": "n", "micro": "μ", "milli": "m", "centi": "c", "kilo": "k", "mega": "M", "giga": "G"}
_METRIC = {
    "m": "length meter meters metre metres",
    "g": "mass gram grams gm",
    "s": "time second seconds sec secs",
    "L": "volume liter liters litre litres l",
    "J": "energy joule joules",
    "eV": "electron_energy electronvolt electronvolts",
    "cal": "heat calorie calories",
    "N": "force newton newtons",
    "W": "power watt watts",
    "Pa": "pressure pascal pascals",
    "Hz": "frequency hertz",
    "V": "voltage volt volts",
    "A": "current ampere amperes amp amps",
    "C": "charge coulomb coulombs",
    "K": "temperature kelvin kelvins",
    "mol": "amount mole moles",
    "T": "flux tesla teslas",
    "F": "capacity farad farads",
    "\\Omega": "resistance ohm ohms Ω",
    "M": "molarity molar",
    "pc": "parsec parsecs",
}
_OTHERS = {
    "length": "in 127/5000 inch inches;ft 381/1250 foot feet;yd 1143/1250 yard yards;mi 201168/125 mile miles",
    "time": "min 60 mins minute minutes;h 3600 hr hrs hour hours;day 86400 days d;week 604800 weeks",
    "year": "year 1 years yr yrs;month 1/12 months",
    "mass": "lb 45359237/100000 lbs pound pounds;oz 45359237/1600000 ounce ounces;ton 1000000 tons tonne tonnes",
    "volume": "gal 473176473/125000000 gallon gallons;quart 473176473/500000000 quarts;cup 473176473/2000000000 cups",
    "dollar": "dollar 1 dollars USD usd bucks;cent 1/100 cents ¢ penny pennies",
    "euro": "euro 1 euros EUR",
    "pounds": "GBP 1",
    "yen": "yen 1",
    "yuan": "yuan 1 RMB",
    "rupees": "rupee 1 rupees INR Rs",
    "erg": "erg 1 ergs",
    "angle": "degree 1 degrees deg",
    "radian": "rad 1 radian radians",
    "percent": "percent 1 percents pct percentage",
    "celsius": "celsius 1 Celsius",
    "fahrenheit": "fahrenheit 1 Fahrenheit",
}


@cache
def unit_sizes() -> dict[str, tuple[str, Fraction]]:
    """Returns (dimension, size) by spelling: `km` is ("length", 1000)."""
    units: dict[str, tuple[str, Fraction]] = {}
    for symbol, line in _METRIC.items():
        dimension, *aliases = line.split()
        units |= dict.fromkeys((symbol, *aliases), (dimension, Fraction(1)))
        units |= {prefix + symbol: (dimension, Fraction(size)) for prefix, size in _PREFIXES.items()}
        for long, prefix in _LONG_PREFIXES.items():
            units |= {long + alias: (dimension, Fraction(_PREFIXES[prefix])) for alias in aliases if len(alias) > 3}
    for dimension, line in _OTHERS.items():
        for unit in line.split(";"):
            name, size, *aliases = unit.split()
            units |= dict.fromkeys((name, *aliases), (dimension, Fraction(size)))
    return units
