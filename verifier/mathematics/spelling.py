"""The table of spellings: the replacement of every LaTeX command and Unicode sign, and the names of known functions."""

from __future__ import annotations

_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh log ln exp lg cis max min gcd lcm"
)
FUNCTIONS = frozenset(_NAMES.split())

_TEXT = "textbf textrm textit textnormal textsf texttt mathrm mathit mathsf mbox hbox operatorname textsc mathtt"
_DROPPED = "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle mathbf boldsymbol bm"
_DROPPED += " limits rm tt bf it underline mathds"
REWRITES = (
    {f"\\{name}": "\\text" for name in _TEXT.split()}
    | {f"\\{name}": "" for name in _DROPPED.split()}
    | {f"\\{name}": "\\frac" for name in ("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac")}
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
    | {
        "$": "",
        "~": " ",
        "\t": " ",
        "\n": " ",
        "\r": " ",
        "%": "\\%",
        "*": "\\cdot ",
        "**": "^",
        "\\bmod": "\\mod ",
        "\\lor": " or ",
        "\\vee": " or ",
    }
    | {"\\land": " and ", "\\wedge": " and ", "\\smallsetminus": "\\setminus ", "\\to": "\\to "}
    | {f"\\{name}": "\\approx " for name in ("approx", "simeq", "thickapprox", "doteq")}
    | {
        "≈": "\\approx ",
        "∛": "\\cbrt ",
        "º": "\\degree ",
        "˚": "\\degree ",
        "⁄": "/",
        "′": "'",
        "’": "'",
        "∖": "\\setminus ",
    }
    | {
        "\\overrightarrow": "\\vec ",
        "\\overline": "\\overline ",
        "⇒": " ",
        "∨": " or ",
        "∧": " and ",
        "Ω": "\\Omega ",
        "µ": "μ",
    }
    | {
        "↔": " ",
        "\u200b": "",
        "\ufeff": "",
        "，": ",",
        "：": ":",
        "；": ";",
        "（": "(",
        "）": ")",
        "。": ".",
        "％": "\\%",
    }
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
    | {
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        "′": "'",
        "‘": "'",
        "’": "'",
        "€": "\\euro ",
        "£": "\\pounds ",
        "¥": "\\yen ",
        "₹": "\\rupees ",
    }
)
