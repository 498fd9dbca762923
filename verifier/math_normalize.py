r"""Spelling: rewrites an answer's many LaTeX and Unicode spellings into one, without changing its mathematics.

`normalize` works token by token (a command, an escaped character, a character), so `\\[2pt]` is never mistaken for
`\[`. What remains afterwards: `\frac`, `\sqrt`, `\text{...}` for every kind of upright text, `\degree`, `\le`, `\ge`,
`\ne`, plain brackets without `\left`, and single spaces. `split_unit` then takes the unit off a value.
"""

from __future__ import annotations

import re
import unicodedata

_NAMES = "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh log ln exp lg"
FUNCTIONS = frozenset(_NAMES.split())

_TOKEN = re.compile(r"\\(?:left|right)\s*\.|\\(?:left|right)\s*\\?\||\\\\|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_TEXT = "textbf textrm textit textnormal textsf texttt mathrm mathit mathsf mbox hbox operatorname"
_DROPPED = "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle mathbf boldsymbol bm limits rm"
_REWRITES = (
    {f"\\{name}": "\\text" for name in _TEXT.split()}
    | {f"\\{name}": "" for name in _DROPPED.split()}
    | {f"\\{name}": "\\frac" for name in ("dfrac", "tfrac", "cfrac")}
    | {f"\\{name}": "\\binom" for name in ("dbinom", "tbinom")}
    | {f"\\{name}": " " for name in ("quad", "qquad", "enspace", "hfill", " ", ",", ";", ":", ">", "\n")}
    | {f"\\{name}": "" for name in ("!", "(", ")", "[", "]")}
    | {f"\\{name}": "\\le " for name in ("le", "leq", "leqslant")}
    | {f"\\{name}": "\\ge " for name in ("ge", "geq", "geqslant")}
    | {f"\\{name}": "\\ne " for name in ("ne", "neq")}
    | {f"\\{name}": "\\cdot " for name in ("cdot", "times", "ast", "bullet")}
    | {f"\\{name}": "\\mid " for name in ("mid", "vert")}
    | {f"\\{name}": "\\cup " for name in ("cup", "bigcup")}
    | {f"\\{name}": "\\emptyset " for name in ("emptyset", "varnothing", "O")}
    | {f"\\{name}": "\\{" for name in ("{", "lbrace")}
    | {f"\\{name}": "\\}" for name in ("}", "rbrace")}
    | {"\\lbrack": "[", "\\rbrack": "]", "\\lt": "<", "\\gt": ">", "\\colon": ":", "\\backslash": "\\setminus "}
    | {"\\degree": "\\degree ", "\\prime": "'", "\\R": "\\mathbb{R}", "\\dots": "\\ldots ", "\\cdots": "\\ldots "}
    | {"$": "", "~": " ", "\t": " ", "\n": " ", "\r": " ", "%": "\\%", "*": "\\cdot "}
    | {"−": "-", "–": "-", "—": "-", "×": "\\cdot ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∕": "/"}
    | {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset "}
    | {
        "π": "\\pi ",
        "∞": "\\infty ",
        "√": "\\sqrt ",
        "°": "\\degree ",
        "θ": "\\theta ",
        "±": "\\pm ",
        "ℝ": "\\mathbb{R}",
    }
    | {"α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "ω": "\\omega ", "φ": "\\phi ", "μ": "\\mu ", "σ": "\\sigma "}
    | {"⟨": "\\langle ", "⟩": "\\rangle ", "′": "'", "‘": "'", "’": "'", "€": "\\text{euro}", "£": "\\text{pound}"}
)

_THIN_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
_COMMA_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_BRACED_COMMA = re.compile(r"(\d)(?:\{,\}|,\\!\s*)(?=\d{3})")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+) ?/ ?(\d+)(?!\d)")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\{\s*\\degree\s*\}|\\degree)\s*")
_PRIME = re.compile(r"\^\s*(?:\{\s*('+)\s*\}|('))")
_NUMBER_TEXT = re.compile(r"\\text\s*\{\s*\(?([-\d.,/ ]+)\)?\s*\}")
_CONJUNCTION = re.compile(r"\\text\s*\{([^{}]*)\}| ?(?<![\\a-zA-Z]),? ?\b(?:and|or)\b(?![a-zA-Z]) ?")
_FUNCTION_TEXT = re.compile(r"\\text\s*\{\s*(" + "|".join(sorted(FUNCTIONS)) + r")\s*\}")
_RELATIONS = {"<=": "\\le ", ">=": "\\ge ", "!=": "\\ne "}
_DIGITS = {"SUPER": "^{%s}", "SUB": "_{%s}"}


def normalize(text: str) -> str:
    """One spelling for `text`; equal answers may still differ, unequal answers stay unequal."""
    text = _BRACED_COMMA.sub(r"\1,", text)
    text = _TOKEN.sub(lambda match: _rewrite(match[0]), text)
    text = re.sub(r"\s+", " ", text)
    for relation, command in _RELATIONS.items():
        text = text.replace(relation, command)
    text = _DEGREE.sub(r"\\degree ", text)
    text = _PRIME.sub(lambda match: match[1] or match[2], text)
    text = _FUNCTION_TEXT.sub(r"\\\1 ", text)
    text = _NUMBER_TEXT.sub(r"\1", text)
    text = _CONJUNCTION.sub(_join, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _THIN_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    return text.rstrip(" .,;:。\\").strip()


def join_thousands(text: str) -> str:
    """`1,234,567` as one number, outside brackets only: inside them a comma separates."""
    if re.search(r"[(\[]|\\\{|\\langle", text):
        return text
    return _COMMA_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _rewrite(token: str) -> str:
    if token.startswith(("\\left", "\\right")) and token[-1] in ".|" and len(token) > 5:
        return "" if token[-1] == "." else "\\lvert " if token.startswith("\\left") else "\\rvert "
    if token in _REWRITES:
        return _REWRITES[token]
    return token if token.isascii() or len(token) > 1 else _plain_character(token)


def _plain_character(character: str) -> str:
    """ASCII for superscripts, subscripts, vulgar fractions and full-width forms; others stay."""
    decomposition = unicodedata.decomposition(character)
    if not decomposition.startswith("<"):
        return character
    kind, *codes = decomposition.split()
    plain = "".join(chr(int(code, 16)) for code in codes)
    if kind == "<fraction>" and "⁄" in plain:
        numerator, _, denominator = plain.partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    if kind in ("<super>", "<sub>"):
        return _DIGITS[kind.strip("<>").upper()] % plain.replace("−", "-")
    return plain


def _join(match: re.Match[str]) -> str:
    if match[1] is None:
        return ", "
    return ", " if match[1].strip(" ,") in ("and", "or") else match[0]


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
    if len(match[0]) > 100:
        return match[0]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return f"(\\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}})"
