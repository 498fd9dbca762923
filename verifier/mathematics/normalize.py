r"""Rewrites the LaTeX and Unicode spellings of an answer into one spelling, without changing its mathematical meaning.

`normalize` works token by token: a token is a command, an escaped character or a character. So it never mistakes
`\\[2pt]`, a line end of a matrix, for `\[`. In the result there are only `\frac`, `\sqrt`, `\text{...}` for every kind
of upright text, `\degree`, `\le`, `\ge`, `\ne`, brackets without `\left`, and single spaces. `units.split_unit` later
separates a value from its unit.
"""

from __future__ import annotations

import re
import unicodedata

from verifier.mathematics.numerals import spell_numbers
from verifier.mathematics.spelling import FUNCTIONS, REWRITES

_TOKEN = re.compile(r"\*\*|\\(?:left|right)\s*\.|\\(?:left|right)\s*\\?\||\\\\|\\[a-zA-Z]+|\\.|.", re.DOTALL)
r"""A command, an escaped character, a single character, or one of `**`, `\left.` and `\left|`."""
_THIN_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
"""`1 234 567`"""
_COMMA_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
"""`1,234,567`: groups of three digits only, so not `1,23`."""
_BRACED_COMMA = re.compile(r"(\d)(?: ?\{ ?, ?\}|,\\!\s*)(?=\d{3})")
r"""`1{,}234` and `1,\!234`"""
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
r"""`0.1\overline{6}`"""
_MARKED_REPETITION = re.compile(r"(\d*)\.(\d*)\((\d+)\)|(\d*)\.(\d{3,40})(?:\s*\\(?:dots|ldots|cdots)|\.\.\.|…)")
r"""`0.1(6)` and `0.1666\ldots`"""
_BARRED = re.compile("((?:\\d[\u0304\u0305])+)")
"""Digits with a combining macron or overline each, as in `0.6̅`."""
_DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
r"""`0.\dot{1}4\dot{2}`: dots over the first and the last digit of the period."""
_TO_RATIO = re.compile(r"(?<![\w.])(\d+) to (\d+)$")
"""`3 to 4`, which is the ratio `3:4`."""
_RAISED = re.compile("[²³¹⁰ⁱ⁴-ⁿ]+|[₀-₎]+")
"""Unicode superscripts and subscripts, as in `x²` and `x₁`."""
_TIMES_X = re.compile(r"(?<=\d) ?[xX] ?10 ?\^")
"""`3 x 10^5`: the letter x as a multiplication sign."""
_COMBINATIONS = re.compile(
    r"(?<![\w)}])(?:\{ ?\})?[_^] ?\{?(\w+)\}? ?([CP]) ?_ ?\{?(\w+)\}?|(?<![\w\\])C_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?"
)
"""`_5C_2`, `{}^5P_2`, `C_5^2`: combinations and permutations."""
_ANNOUNCED = re.compile(
    r"^\s*(?:(?:\\text(?:bf|rm)?\s*\{\s*)?(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct )?"
    r"(?:answer|value|result|solution)s?(?: is|s are|:)\s*:?\s*(?:\}\s*:?)?|(?:so|thus|hence|therefore),? (?=\d))(?=.)",
    re.IGNORECASE,
)
"""Introductions such as `The final answer is:` and `So, `."""
_LONE_DOLLAR = re.compile(r"^([-+]?)\$(?=\d[^$]*$)")
"""`$5`: one dollar sign in front of a number is a currency, not the start of mathematics."""
_MODULE = re.compile(r"\b(?:np|numpy|math)\.(?=[a-z])")
"""`np.sqrt(2)`"""
_BOLD_LETTER = re.compile(r"\\(?:mathbf|boldsymbol|bm)\s*\{\s*([a-zA-Z])\s*\}")
r"""`\mathbf{x}`"""
_DOLLARS = re.compile(r"\\text\s*\{\s*\$([^${}]*(?:\{[^${}]*\}[^${}]*)*)\$\s*\}")
r"""`\text{$x$}`"""
_COLOR = re.compile(r"\\(?:text)?color\s*\{\w*\}")
r"""`\color{red}`"""
_ONLY_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_ALIASES = {"infinity": "\\infty", "Infinity": "\\infty", "inf": "\\infty", "asin": "\\arcsin", "acos": "\\arccos"}
_ALIASES |= {
    "atan": "\\arctan",
    "\\infinity": "\\infty",
    "per cent": "percent",
    "positive infinity": "+\\infty",
    "negative infinity": "-\\infty",
    "arsinh": "\\arcsinh",
}
_ALIASES |= {
    "all real numbers": "\\mathbb{R}",
    "all reals": "\\mathbb{R}",
    "any real number": "\\mathbb{R}",
    "the empty set": "\\emptyset",
    "empty set": "\\emptyset",
}
_ALIAS = re.compile(
    r"(?<![a-zA-Z])(?:" + "|".join(map(re.escape, sorted(_ALIASES, key=len, reverse=True))) + r")(?![a-zA-Z])"
)
"""A phrase of `_ALIASES` as a whole word."""
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+) ?/ ?(\d+)(?!\d)")
"""`2 1/3`: a mixed number."""
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\{\s*\\degree\s*\}|\\degree)\s*")
r"""`^\circ`, `^{\circ}` and `^\degree`"""
_PRIME = re.compile(r"\^\s*(?:\{\s*('+)\s*\}|('))")
"""`f^{'}`"""
_NUMBER_TEXT = re.compile(r"\\text\s*\{\s*\(?([-\d.,/ ]+)\)?\s*\}")
r"""`\text{(12)}`"""
_CONJUNCTION = re.compile(r"\\text\s*\{([^{}]*)\}| ?(?<![\\a-zA-Z]),? ?\b(?:and|or)\b(?![a-zA-Z]) ?")
r"""`\text{ and }`, `and`, `or` between two items."""
# \text{min} and \text{sec} are units, minutes and seconds, unless an argument follows: `\text{min}(3, 5)`.
_FUNCTION_TEXT = re.compile(
    r"\\text\s*\{\s*(" + "|".join(sorted(FUNCTIONS - {"min", "sec"})) + r"|min(?=\s*\}\s*[({])"
    r"|sec(?=\s*\}\s*(?:\^\s*(?:\{-?\d\}|\d)\s*)?[({\\a-zA-Z]))\s*\}"
)
_RELATIONS = {"<=": "\\le ", ">=": "\\ge ", "!=": "\\ne "}


def normalize(text: str) -> str:
    """Rewrites `text` into one spelling. Equal answers may still be spelled differently; different ones always are."""
    text = _unwrap(text)
    if text.isascii() and text.isdecimal():
        return text
    text = _BRACED_COMMA.sub(r"\1,", text)
    text = _BARRED.sub(lambda match: f"\\overline{{{match[1][::2]}}}", text)
    text = _DOTTED.sub(r"\\overline{\1\2\3}", text)
    text = _RAISED.sub(_raise_or_lower, text)
    text = _MARKED_REPETITION.sub(_mark_repeated, text)
    text = _TOKEN.sub(lambda match: _rewrite(match[0]), text)
    text = re.sub(r"\s+", " ", text)
    for relation, command in _RELATIONS.items():
        text = text.replace(relation, command)
    text = _DEGREE.sub(r"\\degree ", text)
    text = _PRIME.sub(lambda match: match[1] or match[2], text)
    text = _FUNCTION_TEXT.sub(r"\\\1 ", text)
    if whole := _ONLY_TEXT.fullmatch(text.strip(" .,;")):
        text = whole[1]
    text = text.replace("\\text{\\$}", "\\$")
    text = _ALIAS.sub(lambda match: _ALIASES[match[0]], text)
    text = _NUMBER_TEXT.sub(r"\1", text)
    text = _CONJUNCTION.sub(_join, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _bare_set(text)
    text = _THIN_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _TIMES_X.sub(r"\\cdot 10^", text)
    text = _TO_RATIO.sub(r"\1:\2", text)
    text = _COMBINATIONS.sub(_combination, text)
    text = text.rstrip(" .,;:。\\").removeprefix("=").strip()
    return spell_numbers(text)


def _unwrap(text: str) -> str:
    r"""Removes markup without meaning: Markdown's signs, introductions such as "The answer is:", colors, bold letters,
    `\text{$ $}`, and the module in `np.sqrt(2)`.
    """
    text = _ANNOUNCED.sub("", _COLOR.sub("", text)).strip()
    text = _MODULE.sub("", _DOLLARS.sub(r"\1", _BOLD_LETTER.sub(r" \1 ", text)))
    text = _LONE_DOLLAR.sub(r"\1\$", text)
    while len(text) > 2 and text[0] in "*`_" and text[0] == text[-1]:
        text = text[1:-1].strip()
    return text


def _raise_or_lower(match: re.Match[str]) -> str:
    digits = unicodedata.normalize("NFKC", match[0]).replace("−", "-")
    return f"_{{{digits}}}" if match[0][0] >= "₀" else f"^{{{digits}}}"


def _bare_set(text: str) -> str:
    r"""Makes braces around a whole list or condition a set, as in `{1, 2}`; drops them around other text, `{5}`."""
    if text[:1] != "{" or text[-1:] != "}":
        return text
    inside = text[1:-1]
    if inside.count("{") != inside.count("}") or inside.find("}") < inside.find("{"):
        return text
    if "\\over " in inside or "\\choose" in inside:
        return text
    return f"\\{{{inside}\\}}" if re.search(r"[,;|:]|\\mid", inside) else inside.strip()


def _mark_repeated(match: re.Match[str]) -> str:
    r"""`0.1(6)` and `0.1666\ldots` as `0.1\overline{6}` and `0.1666\overline{6}`.

    Before dots, one digit must stand three times to count as the period, and a longer period twice.
    """
    if match[3]:
        return f"{match[1]}.{match[2]}\\overline{{{match[3]}}}"
    digits = match[5]
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        repeats = 2 if length > 1 else 3
        if digits.endswith(period * repeats):
            return f"{match[4]}.{digits}\\overline{{{period}}}"
    return match[0]


def _combination(match: re.Match[str]) -> str:
    if match[4] and int(match[4][:9]) < int(match[5][:9]):
        return match[0]
    n, k = (match[1], match[3]) if match[1] else (match[4], match[5])
    binomial = f"\\binom{{{n}}}{{{k}}}"
    return f"{binomial} \\cdot {k}!" if match[2] == "P" else binomial


def join_thousands(text: str) -> str:
    """Removes thousands separators: `1,234,567` becomes `1234567`.

    A comma is a thousands separator only between groups of three digits, and only in a text without brackets. In
    `(1,234)` it separates two coordinates.
    """
    if re.search(r"[(\[]|\\\{|\\langle", text):
        return text
    return _COMMA_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _rewrite(token: str) -> str:
    if token.startswith(("\\left", "\\right")) and token[-1] in ".|" and len(token) > 5:
        return "" if token[-1] == "." else "\\lvert " if token.startswith("\\left") else "\\rvert "
    if token in REWRITES:
        return REWRITES[token]
    return token if token.isascii() or len(token) > 1 else _plain_character(token)


def _plain_character(character: str) -> str:
    r"""Vulgar fractions as `\frac` and full-width forms as ASCII; other characters unchanged."""
    decomposition = unicodedata.decomposition(character)
    if not decomposition.startswith("<"):
        return character
    kind, *codes = decomposition.split()
    if kind in ("<super>", "<sub>"):
        return character
    plain = "".join(chr(int(code, 16)) for code in codes)
    if kind == "<fraction>" and "⁄" in plain:
        numerator, _, denominator = plain.partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    return plain


def _join(match: re.Match[str]) -> str:
    """Replaces the word "and" by a comma, "or" by a semicolon; other upright text stays."""
    word = match[0] if match[1] is None else match[1]
    if match[1] is not None and word.strip(" ,") not in ("and", "or"):
        return match[0]
    return "; " if "or" in word else ", "


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
    if len(match[0]) > 100:
        return match[0]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return f"(\\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}})"
