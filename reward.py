"""reward.py: is the last \\boxed{} after </think> the right answer?  1.0 or 0.0, nothing in between.

    python reward.py --answer '\\frac{2}{4}x' --gold 'x/2'    explain one verdict
    python reward.py FILE.jsonl                              grade {"response"|"answer", "gold"} rows

The reward decides what the policy becomes, so three things matter, in this order: it must not be
exploitable, it must be right, it must be fast.  Each tier below answers only what it is sure of:

    tier        what it does                                        why it exists
    extract     text after the last </think>, last \\boxed{...}      no free-text fallback: that pays hedging
    same        equal token lists                                   formatting never matters
    integer     two plain integers                                  most golds, in a microsecond
    text        words and choices, case ignored                     \\text{(C)} = C, Yes = \\text{yes}
    structure   lists, tuples, intervals, equations, matrices ...   unordered, ordered, as sets, up to a factor
    exact       rational arithmetic (Fraction)                      no tolerance: 10001 is not 10000
    numeric     50 and 120 digits at several points                 \\sqrt{8} = 2\\sqrt{2}, factored = expanded
    sympy       sums, integrals and limits of the gold              in a worker process that can be killed

Left out on purpose: tolerance, per cent as a factor (50% is not 0.5), unit conversion, answers outside
the box, and evaluating a \\sum or \\int the gold does not have (else restating the problem would pay).

Model output is hostile.  It is never handed to eval, sympify or parse_expr, nor to sympy as a string;
it goes through the tokenizer and parser below, and every operation is bounded BEFORE it is done.
Label conventions: `tests/data/` and the doctests.  `strict=True` gives DeepScaleR's original verdicts.
"""

import argparse
import atexit
import collections
import concurrent.futures
import functools
import itertools
import json
import math
import numbers
import operator
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from typing import NamedTuple, Optional

MAX_CHARS = 4_000        # longer answers are refused unread; also keeps int(str) under Python's 4,300-digit error
MAX_TOKENS = 1_500
MAX_DEPTH = 60           # nesting, so that no input reaches Python's recursion limit
MAX_BITS = 60_000        # of any exact integer: 9^{9^9} would otherwise fill memory
MAX_FACTORIAL = 4_000
MAX_ITEMS = 300          # elements of a list
SYMPY_SECONDS = 1.0
SYMPY_BYTES = 2 << 30

counters = collections.Counter()   # no_close, no_box, unparsed_answer, unparsed_gold, timeout
_counter_lock = threading.Lock()


class Verdict(NamedTuple):
    """What `explain` returns: the reward, the tier that decided, why, and what was compared."""
    reward: float
    tier: str
    reason: str
    answer: Optional[str]
    gold: object


class Unparsed(Exception):
    """The text is outside the grammar."""


class Undecided(Exception):
    """The value exists perhaps, but computing it would break a work bound."""


def count(reason):
    """One more of a reason the trainer logs."""
    with _counter_lock:
        counters[reason] += 1


def reset_counters():
    """Return the counters so far as a dict and start again at zero (once per training step)."""
    with _counter_lock:
        seen = dict(counters)
        counters.clear()
    return seen


# ---- Tier extract

def closing_brace(text, start, limit):
    """Index of the brace closing the one at `start`, or -1.  Linear; `\\{` and `\\}` do not count."""
    depth, i, end = 0, start, min(len(text), start + limit)
    while i < end:
        c = text[i]
        if c == "\\":
            i += 1
        elif c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return -1


def last_box(text):
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    open_ = start + len("\\boxed")
    while open_ < len(text) and text[open_] in " \t\n":
        open_ += 1
    if open_ >= len(text) or text[open_] != "{":
        return None
    close = closing_brace(text, open_, MAX_CHARS + 2)
    inside = text[open_ + 1:close].strip() if close > 0 else ""
    return inside or None


def extract_answer(response):
    r"""The content of the last `\boxed{...}` after the last `</think>`, or None.

    The opening tag may sit in the prompt, so only the closing one is required.  An unclosed or empty
    last box is None whatever stands before it: falling back would pay a model for hedging.

    >>> extract_answer(r"<think>\boxed{1}</think> so \boxed{2}, no: \boxed {\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer(r"\boxed{2}"), extract_answer(r"</think> \boxed{2} \boxed{3")
    (None, None)
    """
    if not isinstance(response, str):
        return None
    close = response.rfind("</think>")
    return None if close < 0 else last_box(response[close + len("</think>"):])


# ---- Tokens.  A token is a string: '12.5' number, '\\frac' command, 'abc' letters, '"cm' word, or one character.

UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "π": r"\pi ", "°": r"\degree ", "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "²": "^2", "³": "^3", "′": "'", "’": "'", "，": ",", "；": ";", "：": ":", "（": "(",
    "）": ")", "。": ".", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⁄": "/", "€": r"\$", "£": r"\$", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ",
})
TOKEN = re.compile(r"(?P<space>[\s~]+)|(?P<num>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][0-9]{1,5}(?![0-9.]))?)"
                   r"|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<run>[A-Za-z]+)|(?P<op>.)", re.S)
TEXT_TOKEN = re.compile(r"[A-Za-z](?:[A-Za-z'-]|\.(?=[A-Za-z]))*|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|[^\sA-Za-z]")
GROUPS = re.compile(r"(?<![0-9.,}])[1-9][0-9]{0,2}(?:,[0-9]{3}){1,7}(?![0-9])(?!,[0-9])")
SPACED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{,\}|,?\\[,!;: ]|,\\!\s+| )[0-9]{3})+(?![0-9])")
DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")                    # `\\\\frac`: escaped twice on its way into the data
CLOCK = re.compile(r"(?<=[0-9 ])([aApP])\. ?[mM]\.?")
# 1e-5 and 3.61e-10 are numbers, 24e-32 is 24e - 32.
SCIENTIFIC = re.compile(r"(?:(?<![0-9.(a-zA-Z])[0-9]|[0-9]*\.[0-9]+)[eE][+-][0-9]{1,5}(?![0-9.])")
MIXED_ASCII = re.compile(r"(?<![0-9./^_a-zA-Z})])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![0-9./^])")
REPEATING = re.compile(r"([0-9]{0,200})\.([0-9]{0,200})\\(?:overline|bar|dot)\s*\{?([0-9]{1,200})\}?")

SILENT = frozenset(r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \middle
    \displaystyle \textstyle \scriptstyle \limits \nolimits \quad \qquad \, \! \; \: \> \( \) \[ \] \$ \% \rm \bf \it
    \mathop \ensuremath \hfill \hline \notag \nonumber \euro \pounds \bm \boldsymbol""".split()) | {"\\ ", "\\\n"}
TEXT_COMMANDS = frozenset(r"""\text \textbf \textit \textrm \textnormal \textsf \textsc \texttt \emph \mbox \hbox
    \mathrm \mathbf \mathit \mathsf \operatorname \operatorname*""".split())
ALIAS = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
         r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">",
         r"\neq": r"\ne", r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\colon": ":", r"\land": r"\and",
         r"\wedge": r"\and", r"\lor": r"\or", r"\vee": r"\or", r"\varnothing": r"\emptyset", r"\lvert": "|",
         r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[",
         r"\rbrack": "]", r"\prime": "'", r"\varphi": r"\phi", r"\varepsilon": r"\epsilon", r"\backslash": r"\setminus",
         r"\textdegree": r"\degree", r"\imath": "i", r"\lparen": "(", r"\rparen": ")", "≡": r"\equiv",
         r"\arcsinh": r"\asinh", r"\arccosh": r"\acosh", r"\arctanh": r"\atanh", r"\bmod": r"\mod"}
NAMED = dict.fromkeys("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc asinh "
                      "acosh atanh ln log lg exp".split())
for _name in NAMED:
    NAMED[_name] = "\\" + _name
NAMED.update(asin=r"\arcsin", acos=r"\arccos", atan=r"\arctan", acot=r"\arccot", tg=r"\tan", ctg=r"\cot",
             sqrt=r"\sqrt", pi=r"\pi", infty=r"\infty", infinity=r"\infty", floor="\\floor", ceil="\\ceil",
             abs="\\abs", gcd=r"\gcd", lcm=r"\lcm", max=r"\max", min=r"\min", binom=r"\binom", frac=r"\frac",
             theta=r"\theta", alpha=r"\alpha", beta=r"\beta", cdot="*", times="*")
NAMED["and"], NAMED["or"] = r"\and", r"\or"
FUNCTIONS = frozenset("\\" + f for f in "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec "
                      "arccsc asinh acosh atanh ln log lg exp floor ceil abs gcd lcm max min".split())
MARKS = frozenset(r"\hat \vec \bar \dot \ddot \tilde \overline \overrightarrow \widehat \underline \mathcal "
                  r"\mathscr \mathfrak \mathbb".split())
UNITS = frozenset("""degree degrees deg percent pct cent cents dollar dollars usd yuan euro euros pound pounds rupees yen
    unit units square sq cubic cm mm km m dm nm inch inches in foot feet ft yard yards yd mile miles mi meter meters metre
    metres centimeter centimeters centimetre centimetres millimeter millimeters kilometer kilometers kilometre kilometres
    second seconds sec s minute minutes mins hour hours hr hrs h day days week weeks month months year years yr yrs
    gram grams g kg kilogram kilograms mg lb lbs ounce ounces oz ton tons liter liters litre litres l ml mph kmh kph per
    radian radians rad hz hertz joule joules j kj cal kcal watt watts w kw newton newtons n volt volts v k c f kelvin
    celsius fahrenheit mol moles pa atm acre acres hectare hectares piece pieces people person students ways points
    times apiece each th st nd rd""".split())
# Words that may not be dropped behind a number, because they change what was said.
MEANINGFUL = frozenset("""not no or and nor than less more least most about approximately million billion trillion thousand
    hundred dozen base half halves third quarter times squared cubed factorial pi plus minus but except unless if when is
    are was between to over negative positive wrong maybe either""".split())


def text_tokens(inner, depth):
    """Words of a \\text{...}: lower case, never mathematics, so that \\text{even} is not e*v*e*n."""
    if "\\" in inner or not re.search("[A-Za-z]{2}", inner) and re.search(r"^\s*[-0-9]|=", inner):
        return math_tokens(inner, depth + 1)
    out = []
    inner = inner.replace("~", " ")
    for t in TEXT_TOKEN.findall(inner):
        if not t[0].isalpha():
            out.append(t)
        elif t.lower() in ("and", "or"):
            out.append("\\" + t.lower())
        else:
            out.append('"' + t.lower().replace(".", ""))
    return out


def command_text(command, inner, depth):
    """\\mathrm{e} and \\mathbf{v} are letters, \\operatorname{sin} a function; everything else is text."""
    bare = inner.strip()
    if command.startswith(("\\math", "\\operator")):
        if len(bare) == 1 and bare.isalpha() and (command != "\\mathrm" or bare in "eid"):
            return [bare]
        if bare in NAMED:
            return [NAMED[bare]]
    return text_tokens(inner, depth)


def math_tokens(source, depth=0):
    if depth > 8:
        raise Unparsed("nested text")
    out, i, n = [], 0, len(source)
    while i < n:
        m = SCIENTIFIC.match(source, i) or TOKEN.match(source, i)
        i, kind, t = m.end(), m.lastgroup, m.group()
        if kind == "space" or t == "$":
            continue
        if kind == "cmd":
            t = ALIAS.get(t, t)
            if t in SILENT:
                if t in ("\\left", "\\right") and source[i:i + 1] == ".":
                    i += 1
                continue
            if t in TEXT_COMMANDS:
                while i < n and source[i] in " *":
                    i += 1
                if source[i:i + 1] == "{":
                    close = closing_brace(source, i, n)
                    if close < 0:            # at once: 600 unclosed \\text{ would each be scanned to the end
                        raise Unparsed("unclosed text")
                    out += command_text(t, source[i + 1:close], depth)
                    i = close + 1
                continue
            if t in ("\\phantom", "\\hspace", "\\vspace", "\\tag", "\\label", "\\color", "\\textcolor"):
                close = closing_brace(source, i, n) if source[i:i + 1] == "{" else i - 1
                if close < 0:
                    raise Unparsed("unclosed " + t)
                i = close + 1
                continue
        elif kind == "run":
            t = NAMED.get(t) or NAMED.get(t.lower() if len(t) > 1 else t) or t
        elif t == "%":
            continue
        out.append(t)
    return out


def degrees(tokens):
    r"""`^\circ`, `^{\circ}` and `\degree` become one token; what follows (C, F) is a unit."""
    out, i = [], 0
    while i < len(tokens):
        if tokens[i] == "^" and tokens[i + 1:i + 2] == ["\\circ"]:
            out.append("\\degree")
            i += 2
        elif tokens[i] == "^" and tokens[i + 1:i + 4] == ["{", "\\circ", "}"]:
            out.append("\\degree")
            i += 4
        elif tokens[i] == "^" and len(tokens) > i + 2 and tokens[i + 2].lstrip('"') in ("th", "st", "nd", "rd"):
            i += 4
        else:
            out.append(tokens[i])
            i += 1
    return out


def group_thousands(source):
    """1,000 and 1{,}000 and 1\\,000 are one number; the commas of (100,200) or of a long list are not."""
    def join(m):
        return re.sub(r"[^0-9]", "", m.group())

    def join_bare(m):
        before = source[:m.start()]
        opened = sum(map(before.count, "([")) + before.count("\\{")
        closed = sum(map(before.count, ")]")) + before.count("\\}")
        return m.group() if opened > closed else m.group().replace(",", "")
    source = SPACED.sub(join, source)
    return GROUPS.sub(join_bare, source)


def repeating_decimal(m):
    """0.1\\overline{6} as a fraction."""
    whole, fixed, period = m.groups()
    value = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed) + Fraction(f"{whole or 0}.{fixed or 0}")
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def unwrap(tokens):
    """Drop a final full stop and braces around everything, unless they enclose a list: {1,2} is a set."""
    while tokens and tokens[-1] in (".", ",", ";", ":") or tokens and tokens[-1] == "\\\\":
        tokens = tokens[:-1]
    while len(tokens) > 2 and tokens[0] == "{" and match_at(tokens, 0) == len(tokens) - 1 \
            and "choose" not in tokens and "\\choose" not in tokens:
        tokens = tokens[1:-1]
    return tokens


def tokenize(source):
    """Text to a tuple of tokens.  Raises Unparsed for text too long to look at."""
    if len(source) > MAX_CHARS:
        raise Unparsed("too long")
    source = source.translate(UNICODE).strip()
    if "\\boxed" in source:
        source = last_box(source) or ""
    if "\\begin" not in source:
        source = DOUBLED.sub(r"\\", source)
    source = source.replace("{:}", ":")
    source = CLOCK.sub(r"\\text{\1m}", source)
    source = source.replace("\\$", " ").replace("$", " ")
    if "." in source:
        source = REPEATING.sub(repeating_decimal, source)
    if "," in source or re.search(r"[0-9](?:\\[,!;: ]| )\s*[0-9]", source):
        source = group_thousands(source)
    source = MIXED_ASCII.sub(r"\1\\frac{\2}{\3}", source)
    tokens = math_tokens(source)
    if len(tokens) > MAX_TOKENS:
        raise Unparsed("too many tokens")
    return tuple(unwrap(degrees(tokens)))


# ---- Parser: tokens to a small tree.  Trees are tuples: ('n', Fraction) ('v', name) ('c', 'pi')
# ('+', ...) ('*', ...) ('/', a, b) ('^', a, b) ('f', name, args...) ('big', kind, var, low, high, body)

OPEN = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil",
        "\\langle": "\\rangle", "\\begin": "\\end"}
CLOSE = frozenset(OPEN.values())
GREEK = frozenset("\\" + g for g in """alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar mho odot
    aleph partial nabla""".split())
BIG = ("\\sum", "\\prod", "\\int", "\\lim")
DIGITS = tuple("0123456789")
ATOMS = GREEK | FUNCTIONS | MARKS | {"\\frac", "\\sqrt", "\\binom", "\\pi", "\\infty", "\\angle", "\\triangle", *BIG}
ONE = ("n", Fraction(1))
MINUS_ONE = ("n", Fraction(-1))


def match_at(tokens, start):
    """Index of the bracket closing the one at `start` (any bracket closes any: [0,1) is fine), or -1."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i] in OPEN:
            depth += 1
        elif tokens[i] in CLOSE:
            depth -= 1
            if depth == 0:
                return i
    return -1


def is_number(token):
    return token[:1] in DIGITS or token[:1] == "." and len(token) > 1


def number(token):
    mantissa, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) * 3.33 > MAX_BITS:
        raise Undecided("number too long")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def letters(run):
    """`abc` is a product, `sinx` a function, `parabola` one opaque name."""
    if len(run) == 1:
        return [run]
    for name in ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "log", "ln", "pi"):
        if run.startswith(name) and len(run) <= len(name) + 2:
            return [NAMED[name], *run[len(name):]]
    return list(run) if len(run) < 4 else [run]


class Parser:
    """Recursive descent over one element (no commas, no relations at the top).

    expression = term (+- term)*      term = signed ([*/] signed | power)*      power = primary [!'°]* [^ exponent]
    """

    def __init__(self, tokens):
        self.tokens = list(itertools.chain.from_iterable(letters(t) if t[0].isalpha() else [t] for t in tokens))
        self.at, self.depth, self.bars, self.in_trig = 0, 0, 0, 0

    def parse(self):
        tree = self.expression()
        if self.at < len(self.tokens):
            raise Unparsed(self.peek())
        return tree

    def peek(self, ahead=0):
        i = self.at + ahead
        return self.tokens[i] if i < len(self.tokens) else ""

    def take(self, expected=None):
        token = self.peek()
        if not token or expected is not None and token != expected:
            raise Unparsed(f"{expected or 'more'} expected, {token or 'end'} found")
        self.at += 1
        return token

    def accept(self, *wanted):
        return self.take() if self.peek() in wanted else ""

    def nested(self, rule, *args):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("too deep")
        tree = rule(*args)
        self.depth -= 1
        return tree

    def expression(self):
        return self.nested(self.sum)

    def sum(self):
        terms = [self.term()]
        while sign := self.accept("+", "-"):
            terms.append(self.term() if sign == "+" else ("*", MINUS_ONE, self.term()))
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def signed(self, rule=None):
        sign = 1
        while t := self.accept("+", "-"):
            sign = -sign if t == "-" else sign
        factor = (rule or self.power)()
        return factor if sign > 0 else ("*", MINUS_ONE, factor)

    def term(self):
        """Products and quotients, left to right; juxtaposition multiplies, except of two numbers."""
        tree = self.signed()
        while True:
            if op := self.accept("*", "/"):
                tree = (op, tree, self.signed())
            elif self.starts_factor(self.peek()):
                if is_number(self.peek()) and is_number(self.tokens[self.at - 1]):
                    raise Unparsed("two numbers side by side")
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_factor(self, t):
        if t == "|":
            return self.bars == 0
        return t[:1].isalnum() or is_number(t) or t in OPEN or t in ATOMS

    def power(self):
        base = self.postfix(self.nested(self.primary))
        double_star = self.peek() == self.peek(1) == "*"
        if self.peek() != "^" and not double_star:
            return base
        self.at += 1 + double_star
        if self.peek() == "'" or self.peek() == "{" and self.peek(1) == "'":
            return self.primes(base)
        return self.postfix(("^", base, self.nested(self.exponent)))

    def primes(self, base):
        """y' and y^{\\prime\\prime} are names; behind a number they are minutes and seconds, and dropped."""
        braces, n = self.accept("{"), 0
        while self.accept("'"):
            n += 1
        if braces:
            self.take("}")
        return ("v", base[1] + "'" * n) if base[0] == "v" else base

    def exponent(self):
        if self.peek() in ("+", "-"):
            return self.signed(lambda: self.nested(self.exponent))
        tree = self.nested(self.primary)
        return ("^", tree, self.nested(self.exponent)) if self.accept("^") else tree

    def postfix(self, tree):
        while t := self.accept("!", "\\degree", "'"):
            if t == "!":
                tree = ("f", "!!" if self.accept("!") else "!", tree)
            elif t == "'":
                self.at -= 1
                tree = self.primes(tree)
            elif self.in_trig:                   # elsewhere a degree sign is a unit and is dropped
                tree = ("/", ("*", tree, ("c", "pi")), ("n", Fraction(180)))
        return tree

    def group(self, open_):
        """Inside of a bracket pair whose opening token was just taken."""
        bars, self.bars = self.bars, open_ == "|"
        tree = self.expression()
        if open_ == "{" and self.accept("\\choose"):
            tree = ("f", "binom", tree, self.expression())
        self.bars = bars
        self.take("|" if open_ == "|" else OPEN[open_])
        return tree

    def argument(self, whole_number=False):
        """Argument of \\frac, \\binom, \\sqrt: a group, else one digit or one symbol as TeX reads it (\\sqrt12 is whole)."""
        t = self.peek()
        if t.isdigit() and len(t) > 1 and not whole_number:
            self.tokens[self.at] = t[1:]
            return ("n", Fraction(int(t[0])))
        if is_number(t):
            return ("n", number(self.take()))
        return self.group(self.take()) if t == "{" else self.nested(self.primary)

    def primary(self):
        t = self.take()
        if is_number(t):
            return self.mixed(("n", number(t)), t)
        if t[0].isalpha() or t in GREEK:
            return self.symbol(t)
        if t in ("(", "[", "{"):
            return self.group(t)
        if t in ("\\lfloor", "\\lceil", "|"):
            return ("f", {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}[t], self.group(t))
        if t == "\\frac":
            return ("/", self.argument(), self.argument())
        if t == "\\binom":
            return ("f", "binom", self.argument(), self.argument())
        if t == "\\sqrt":
            index = self.group(self.take()) if self.peek() == "[" else ("n", Fraction(2))
            return ("f", "root", self.argument(whole_number=True), index)
        if t in FUNCTIONS:
            return self.function(t[1:])
        if t in ("\\pi", "\\infty"):
            return ("c", "pi" if t == "\\pi" else "inf")
        if t in BIG:
            return self.big(t[1:])
        if t in MARKS:
            inner = self.argument()
            name = f"{inner[1]}_{self.subscript()}" if self.accept("_") else None
            inner = ("v", name) if name else inner
            return inner if t in ("\\vec", "\\overrightarrow", "\\overline", "\\underline") else ("v", f"{t}{{{inner}}}")
        if t in ("\\angle", "\\triangle"):
            return ("v", t + str(self.power()))
        raise Unparsed(t)

    def mixed(self, tree, token):
        """1\\frac{4}{5} is 9/5, if the fraction is two plain integers and proper."""
        if self.peek() != "\\frac" or not token.isdigit():
            return tree
        start, saved = self.at, list(self.tokens)
        self.take()
        top, bottom = self.argument(), self.argument()
        if top[0] == bottom[0] == "n" and 0 < top[1] < bottom[1] and self.peek() != "^":
            return ("n", tree[1] + top[1] / bottom[1])
        self.at, self.tokens = start, saved
        return tree

    def symbol(self, t):
        if t in ("i", "e") and self.peek() != "_":
            return ("c", t)
        name = t.lower() if len(t) > 3 and t[0] != "\\" else t
        if self.accept("_"):
            name += "_" + self.subscript()
        inner = self.peek(1)
        if self.peek() == "(" and self.peek(2) == ")" and (inner[:1].isalnum() or inner in GREEK):
            self.at += 3                         # f(2), I(0): a value of a function, not I times 0
            name += f"({inner})"
        return ("v", name)

    def subscript(self):
        if self.peek() != "{":
            return self.take().lstrip('"')
        end = match_at(self.tokens, self.at)
        inside, self.at = self.tokens[self.at + 1:end], end + 1
        if end < 0:
            raise Unparsed("subscript")
        return "".join(t.lstrip('"') for t in inside)

    def function(self, name):
        """sin, log_2, ln^2 and the like with their argument; \\sin^{-1} is the inverse."""
        base = self.argument(whole_number=True) if name == "log" and self.accept("_") else None
        power = self.nested(self.exponent) if self.accept("^") else None
        if name == "log" and self.accept("_"):
            base = self.argument(whole_number=True)
        trig = name in ("sin", "cos", "tan", "cot", "sec", "csc")
        self.in_trig += trig
        args = self.function_arguments()
        self.in_trig -= trig
        if len(args) > 1 and name not in ("gcd", "lcm", "max", "min"):
            raise Unparsed(name)
        if power == ("*", MINUS_ONE, ONE) and trig:
            name, power = "arc" + name, None
        base = ("n", Fraction(10)) if name == "lg" else base
        if name == "exp":
            tree = ("^", ("c", "e"), *args)
        else:
            tree = ("f", "ln" if name in ("log", "lg") else name, *args)
        tree = ("/", tree, ("f", "ln", base)) if base else tree
        return tree if power is None else ("^", tree, power)

    def function_arguments(self):
        """A bracket, or the factors up to the next sign, function or bracket: \\sin 2x \\cos y."""
        if open_ := self.accept("{"):            # sympy prints \log{\left(3 \right)}^{2} for the square of log 3
            return [self.group(open_)]
        if open_ := self.accept("(", "["):
            args = [self.expression()]
            while self.accept(","):
                args.append(self.expression())
            self.take(OPEN[open_])
            return args
        tree = self.signed()
        while self.starts_factor(self.peek()) and self.peek() not in FUNCTIONS and self.peek() not in OPEN:
            tree = ("*", tree, self.power())
        return [tree]

    def big(self, kind):
        """\\sum_{k=a}^{b} body, \\int_a^b body dx, \\lim_{x \\to a} body.  Only built; sympy evaluates."""
        low = high = var = None
        if self.accept("_"):
            if kind != "int" and self.accept("{"):
                var = self.primary()
                if not self.accept("=", "\\to", "\\rightarrow"):
                    raise Unparsed(kind)
                low = self.expression()
                self.take("}")
            else:
                low = self.nested(self.exponent)
        if self.accept("^"):
            high = self.nested(self.exponent)
        if kind == "int":
            end = max((i for i in range(self.at, len(self.tokens) - 1) if self.tokens[i] == "d"), default=-1)
            inner = Parser(self.tokens[self.at:end] or ["1"])
            inner.depth = self.depth
            body, self.at = inner.parse(), end + 1
            var = self.primary() if end >= 0 else None
        else:
            body = self.term()
        if var is None or var[0] not in "vc" or kind in ("sum", "prod") and high is None:
            raise Unparsed(kind)
        bound = ("v", f"#{str(body).count('big')}")      # renamed: \sum_i and \sum_k are one tree
        return ("big", kind, bound, low, high, substitute(body, var, bound))


def substitute(tree, leaf, value):
    if tree == leaf:
        return value
    return tuple(substitute(t, leaf, value) for t in tree) if isinstance(tree, tuple) else tree


def variables(tree):
    """Free symbols, and whether the tree needs integer points or sympy, in one walk."""
    names, flags, stack = set(), set(), [tree]
    while stack:
        t = stack.pop()
        if t is None:
            continue
        if t[0] == "v":
            names.add(t[1])
        elif t[0] == "c" and t[1] in ("i", "inf"):
            flags.add(t[1])
        elif t[0] != "n" and t[0] != "c":
            if t[0] == "big":
                flags.add("big")
                stack += t[3:]
            else:
                if t[0] == "f" and t[1] in ("floor", "ceil", "!", "!!", "binom", "abs", "gcd", "lcm", "max", "min"):
                    flags.add("steps")
                    if t[1] in ("!", "!!", "binom", "gcd", "lcm"):
                        flags.add("integer")
                stack += t[2:] if t[0] == "f" else t[1:]
    return frozenset(names), frozenset(flags)


# ---- Tiers exact and numeric

LOW, HIGH, MAX_DIGITS = 50, 120, 20_000      # digits to refute, to confirm, and at most
_contexts = {}
_mp_lock = threading.RLock()      # mpmath contexts and its cache of constants are not safe between threads


def context(digits):
    """A private mpmath context."""
    if digits not in _contexts:
        import mpmath                 # here, so that importing this file stays fast
        _contexts[digits] = mpmath.mp.clone()
        _contexts[digits].dps = digits
    return _contexts[digits]


def _after_fork():
    """A fork may happen while another thread holds a lock, and the child must not share the worker's pipes."""
    global _mp_lock, _counter_lock, _sympy
    _mp_lock, _counter_lock = threading.RLock(), threading.Lock()
    _sympy = Worker("sympy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Evaluator:
    """Value of a tree: a Fraction while everything is rational, else a number of `ctx`.

    Every operation checks the size of its result before computing it, because a big-integer power or a
    factorial is one C call that neither a signal nor another thread can interrupt.
    """

    def __init__(self, digits, point=()):
        self.ctx, self.point = context(digits), point
        self.peak = 0                 # decimal digits before the point of the largest term of any sum

    def inexact(self, x):
        return self.ctx.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x

    def __call__(self, tree):
        kind = tree[0]
        if kind == "n":
            return tree[1]
        if kind == "v":
            return self.point[tree[1]]
        if kind == "c":
            if tree[1] == "inf":
                raise Unparsed("infinity in an expression")
            return {"pi": self.ctx.pi, "e": self.ctx.e, "i": self.ctx.j}[tree[1]] * 1
        if kind == "big":
            raise Undecided("sum, product, integral or limit")
        values = [self(t) for t in tree[2 if kind == "f" else 1:]]
        if kind == "f":
            return getattr(self, NAMES.get(tree[1], tree[1]), functools.partial(self.elementary, tree[1]))(*values)
        if kind == "^":
            return self.power(*values, real_root=tree[2][0] in "n/*" and not variables(tree[2])[0])
        rational = all(isinstance(v, Fraction) for v in values)
        if not rational:
            values = [self.inexact(v) for v in values]
            if kind == "+":
                self.peak = max(self.peak, *(int(self.ctx.mag(v) * 0.302) for v in values if v))
        result = functools.reduce({"+": operator.add, "*": operator.mul, "/": operator.truediv}[kind], values)
        if rational and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
            raise Undecided("number too long")
        return result

    def power(self, base, exponent, real_root=True):
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length()) if isinstance(base, Fraction) else 1
            if abs(exponent) * size > MAX_BITS and base not in (0, 1, -1):
                raise Undecided("power too large")
            return base ** exponent.numerator
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 2 or real_root and exponent.denominator % 2 and base < 0:
                return self.power(self.root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
        if base == 0:
            if self.ctx.re(self.inexact(exponent)) > 0:
                return Fraction(0)
            raise ZeroDivisionError
        x = self.inexact(exponent) * self.ctx.ln(self.inexact(base))
        if abs(x) > 1e6:
            raise Undecided("exponent too large")
        return self.ctx.exp(x)

    def root(self, x, n):
        """The n-th root; odd roots of negative numbers are real, as in school and unlike in sympy."""
        if not isinstance(n, Fraction) or n.denominator != 1 or not 0 < n < 1000:
            return self.power(x, 1 / n, False)
        if isinstance(x, Fraction) and x >= 0 and n == 2:
            top, bottom = math.isqrt(x.numerator), math.isqrt(x.denominator)
            if (top * top, bottom * bottom) == (x.numerator, x.denominator):
                return Fraction(top, bottom)
        if n % 2 and not self.ctx.im(self.inexact(x)) and x < 0:
            return -self.root(-x, n)
        return self.ctx.root(self.inexact(x), int(n)) if x else Fraction(0)

    def natural(self, x, limit):
        if not isinstance(x, Fraction) or x.denominator != 1 or x < 0:
            raise ValueError("not a natural number")
        if x > limit:
            raise Undecided("argument too large")
        return int(x)

    def factorial(self, x):
        return Fraction(math.factorial(self.natural(x, MAX_FACTORIAL)))

    def factorial2(self, x):
        return Fraction(math.prod(range(self.natural(x, MAX_FACTORIAL), 0, -2)))

    def binom(self, n, k):
        n, k = self.natural(n, 10 ** 9), self.natural(k, 10 ** 9)
        self.natural(Fraction(n - k), n)             # k > n: 0, but n!/(k!(n-k)!) is undefined there
        if min(k, n - k) * n.bit_length() > MAX_BITS:
            raise Undecided("binomial too large")
        return Fraction(math.comb(n, k))

    def gcd(self, *xs):
        return Fraction(math.gcd(*(self.natural(abs(x), 10 ** 100) for x in xs)))

    def lcm(self, *xs):
        return Fraction(math.lcm(*(self.natural(abs(x), 10 ** 100) for x in xs)))

    def floor(self, x):
        if isinstance(x, Fraction):
            return Fraction(math.floor(x))
        if abs(x) > 1e30:
            raise Undecided("floor of a large number")
        near = int(self.ctx.nint(x))                 # log_2 8 comes out a hair below 3
        return Fraction(near if abs(x - near) < 1e-30 else int(self.ctx.floor(x)))

    def ceil(self, x):
        return -self.floor(-x)

    def elementary(self, name, *xs):
        if name in ("abs", "max", "min"):
            return {"abs": abs, "max": max, "min": min}[name](*xs)
        x, = map(self.inexact, xs)
        if name == "ln":
            if x == 0:
                raise ZeroDivisionError
            return self.ctx.ln(x) if x != 1 else Fraction(0)
        if abs(x) > (1e6 if name.endswith("h") else 1e12):   # reducing the argument would need as many digits
            raise Undecided("argument too large")
        return getattr(self.ctx, name.replace("arc", "a"))(x)


NAMES = {"!": "factorial", "!!": "factorial2"}

# Sample points.  Positive, of several magnitudes, with large odd denominators: far from any round number.
REAL_POINTS = [[Fraction(a + 197 * k * k + 71 * k, b) for k in range(40)] for a, b in
               ((389, 1013), (1741, 1019), (151, 1009), (4877, 1031), (23017, 1021), (71, 1033))]
INTEGER_POINTS = [[(a * k + b) % c + 1 for k in range(40)] for a, b, c in
                  ((5, 6, 11), (3, 1, 7), (7, 17, 29), (11, 4, 13), (13, 44, 97), (1, 11, 41), (29, 5, 83), (17, 9, 19))]
POINTS_NEEDED = 3


class Scalar:
    """A tree with its free variables; constant values are cached, because golds and list elements repeat."""
    __slots__ = ("tree", "names", "flags", "cache")

    def __init__(self, tree):
        self.tree, self.cache = tree, {}
        self.names, self.flags = variables(tree)

    def value(self, digits=LOW, point=None):
        """(value, peak) at a sample point."""
        if point is None and digits in self.cache:
            return self.cache[digits]
        evaluate = Evaluator(digits, point or {})
        result = evaluate(self.tree), evaluate.peak
        if point is None:
            self.cache[digits] = result
        return result


def infinite(tree):
    """+1 or -1 for an infinity, else 0."""
    if tree == ("c", "inf"):
        return 1
    return -1 if tree == ("*", MINUS_ONE, ("c", "inf")) else 0


def differ(a, b, point=None):
    """Do two Scalars differ (at a point)?

    A clear difference at 50 digits settles it.  Otherwise both are computed again with 120 digits more than
    their largest terms have, and the gap must be rounding noise: tiny, and shrinking with the precision.
    So neither e^{-200} passes for 0 nor 10^{99} + \\sqrt2 for 10^{99}.
    """
    (x, peak), (y, peak_y) = a.value(LOW, point), b.value(LOW, point)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x != y
    gap, size, magnitude = gap_of(x, y, LOW)
    peak = max(peak, peak_y, magnitude)
    if peak < 25 and gap > 1e-8 * size and size > 1e-25:
        return True
    digits = HIGH if peak < 25 else HIGH + peak
    if digits > MAX_DIGITS:
        raise Undecided("too many digits")
    ten = context(digits).mpf(10)
    sharp, size, _ = gap_of(a.value(digits, point)[0], b.value(digits, point)[0], digits)
    noise = ten ** (max(peak, 0) - digits + 15)
    return sharp > ten ** (15 - digits) * size and not (sharp <= noise and (gap == 0 or sharp <= gap * ten ** -40))


def gap_of(x, y, digits):
    """(difference, size, decimal digits of the size) of two values."""
    ctx, inexact = context(digits), Evaluator(digits).inexact
    x, y = inexact(x), inexact(y)
    gap, size = abs(x - y), max(abs(x), abs(y))
    if not ctx.isfinite(gap):
        raise ZeroDivisionError
    return gap, size, int(ctx.mag(size) * 0.302) if size else 0


def sample_points(names, flags):
    names = sorted(names)
    if len(names) > 40:
        raise Undecided("too many variables")
    integers = [dict(zip(names, map(Fraction, row))) for row in INTEGER_POINTS]
    reals = [dict(zip(names, row)) for row in REAL_POINTS]
    if "integer" in flags:
        return integers
    return reals + integers if "steps" in flags else reals


def same_symbolic(a, b, ratio=False):
    """Equal at every sample point where the gold b is defined (with `ratio`: proportional; returns the factor)."""
    names, flags = a.names | b.names, a.flags | b.flags
    needed = 8 if "steps" in flags else POINTS_NEEDED
    usable, complex_points = 0, []
    factor = None
    for point in itertools.chain(sample_points(names, flags), complex_points):
        try:
            gold = b.value(LOW, point)[0]
        except (ArithmeticError, ValueError):
            continue
        real = "i" in flags or isinstance(gold, Fraction) or not context(LOW).im(gold)
        if not real and len(complex_points) < 8 and point not in complex_points:
            complex_points.append(point)     # off the real domain the branches of roots differ: last resort only
            continue
        agrees, factor = agree_at(a, b, point, factor, ratio)
        if not agrees:
            return False
        usable += 1
        if usable == needed:
            break
    if usable < (1 if "integer" in flags else 2):
        raise Undecided("no point where both are defined")
    return factor if ratio else True


def agree_at(a, b, point, factor, ratio):
    """(agree, factor) at one point; an answer undefined where the gold is defined does not agree."""
    try:
        if not ratio:
            return not differ(a, b, point), None
        left, right = a.value(LOW, point)[0], b.value(LOW, point)[0]
        if left == 0 or right == 0:
            return left == right, factor
        if isinstance(left, Fraction) and isinstance(right, Fraction) and (factor is None or isinstance(factor, Fraction)):
            quotient = left / right
            return factor in (None, quotient), quotient
        inexact = Evaluator(LOW).inexact
        quotient = inexact(left) / inexact(right)
        return factor is None or abs(quotient - inexact(factor)) < 1e-30 * abs(quotient), quotient
    except (ArithmeticError, ValueError):
        return False, factor


def same_scalar(a, b):
    """a the answer, b the gold.  Raises Undecided when only sympy could tell."""
    if a.tree == b.tree:
        return True
    if infinite(a.tree) or infinite(b.tree):
        return infinite(a.tree) == infinite(b.tree)
    if "inf" in a.flags:
        return False
    if "big" in a.flags and "big" not in b.flags:
        return False                       # the problem restated is not its answer
    try:
        return same_value(a, b)
    except Undecided:
        if "big" in b.flags:
            return ask_sympy(a, b)
        if not is_tower(b):
            raise
        return same_value(Scalar(hide_towers(a.tree)), Scalar(hide_towers(b.tree)))


def same_value(a, b):
    with _mp_lock:
        try:
            return same_symbolic(a, b) if a.names | b.names else not differ(a, b)
        except (ArithmeticError, ValueError):
            return False


def is_literal(tree):
    """7, -7, 7/2: what a plain number looks like."""
    while tree[:2] == ("*", MINUS_ONE):
        tree = tree[2]
    return tree[0] == "n" or tree[0] == "/" and is_literal(tree[1]) and is_literal(tree[2])


def is_unfinished(tree):
    """37*41 or 3+4 for a plain number, while 2^{10}, 8.7*10^8 and \\binom52 are accepted ways to write one."""
    def arithmetic(t):
        return t[0] == "n" or t[0] in ("+", "*", "/") and all(map(arithmetic, t[1:]))
    return arithmetic(tree) and not is_literal(tree)


def is_tower(b):
    """Is the gold itself beyond the bounds?  (If only the answer is, it is wrong.)"""
    return hide_towers(b.tree) != b.tree


def hide_towers(tree):
    """Replace what is too large to compute, such as 9^{9^9}, by a name of its own: equal names, equal values."""
    if tree[0] in ("n", "v", "c"):
        return tree
    tree = tuple(hide_towers(t) if isinstance(t, tuple) else t for t in tree)
    try:
        Evaluator(LOW, dict.fromkeys(variables(tree)[0], Fraction(3)))(tree)
    except Undecided:
        return ("v", f"#{tree}")
    except (ArithmeticError, ValueError):
        pass
    return tree


# ---- Tier sympy: a worker process that can be killed

class Worker:
    """`python reward.py --worker KIND`, one JSON line in, one out.

    A fresh interpreter, not a fork: forking a process with torch, CUDA or threads is unsafe, and
    multiprocessing's spawn would import the caller's __main__ again.  SIGALRM would only work in the main
    thread and not inside a long C call, so time is kept here and the process is killed.  The worker ends
    by itself when its input closes, however the parent ended.
    """

    def __init__(self, kind):
        self.kind, self.process, self.lock = kind, None, threading.Lock()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker", self.kind], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.read(20) != b"ready\n":
            raise OSError("worker did not start")

    def read(self, seconds):
        """One line, or b'' when time is up or the worker died."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return b""
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                return b""
            line += chunk
        return line

    def ask(self, job, seconds):
        """The worker's answer, or None after a timeout, which also ends the worker."""
        with self.lock:
            try:
                if self.process is None:
                    self.start()
                self.process.stdin.write(json.dumps(job).encode() + b"\n")
                self.process.stdin.flush()
                line = self.read(seconds)
                if line:
                    return json.loads(line)
            except (OSError, ValueError):
                pass
            self.stop()
            return None

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


_sympy = Worker("sympy")
_used = threading.local()             # did this thread's verdict need sympy?
atexit.register(lambda: _sympy.stop())


def plain(tree):
    """A tree as JSON: Fractions become strings."""
    if isinstance(tree, Fraction):
        return f"{tree.numerator}/{tree.denominator}"
    return [plain(t) for t in tree] if isinstance(tree, tuple) else tree


def ask_sympy(a, b):
    verdict = _sympy.ask([plain(a.tree), plain(b.tree)], SYMPY_SECONDS)
    if verdict is None:
        count("timeout")
        raise Undecided("sympy timeout")
    _used.sympy = True
    return verdict


def sympy_tree(node, sp):
    """The sympy expression of a JSON tree.  Built node by node: sympy never sees a string to parse."""
    kind = node[0]
    if kind == "n":
        top, _, bottom = node[1].partition("/")
        return sp.Rational(int(top), int(bottom))
    if kind == "v":
        return sp.Symbol(node[1], positive=True)
    if kind == "c":
        return {"pi": sp.pi, "e": sp.E, "i": sp.I, "inf": sp.oo}[node[1]]
    if kind == "big":
        _, kind, var, low, high, body = (t and sympy_tree(t, sp) if isinstance(t, list) else t for t in node)
        if kind == "lim":
            return sp.Limit(body, var, low).doit()
        limits = var if low is None else (var, low, high)
        return {"sum": sp.Sum, "prod": sp.Product, "int": sp.Integral}[kind](body, limits).doit()
    parts = [sympy_tree(t, sp) for t in node[2 if kind == "f" else 1:]]
    if kind == "f" and node[1] == "root":
        return parts[0] ** (1 / parts[1])
    names = {"!": "factorial", "!!": "factorial2", "binom": "binomial", "ceil": "ceiling", "abs": "Abs", "ln": "log",
             "max": "Max", "min": "Min", "+": "Add", "*": "Mul", "^": "Pow"}
    if kind == "/":
        return parts[0] / parts[1]
    name = node[1] if kind == "f" else kind
    return getattr(sp, names.get(name) or name.replace("arc", "a"))(*parts)


def prove_equal(job):
    """Equal after sympy's canonical ordering, or with the difference simplified to 0."""
    import sympy as sp
    a, b = (sympy_tree(t, sp) for t in job)
    return bool(a == b or sp.expand(a - b) == 0 or sp.simplify(a - b) == 0)


def worker_main(kind):
    """Serve jobs until the input closes.  The kernel enforces memory and CPU limits, should the parent be gone."""
    sys.path.pop(0)                    # a random.py next to this file must not shadow the library
    serve = {"sympy": prove_equal, "grade": grade_chunk}[kind]
    if kind == "sympy":
        import sympy                   # slow, so it happens before `ready`, outside any job's time
        assert sympy
    print("ready", flush=True)
    for line in sys.stdin:
        limit_process(kind)
        try:
            result = serve(json.loads(line))
        except Exception:              # whatever sympy raises, the pair is not shown to be equal
            result = False
        print(json.dumps(result), flush=True)


def limit_process(kind):
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (SYMPY_BYTES, SYMPY_BYTES))
        if kind == "sympy":
            used = resource.getrusage(resource.RUSAGE_SELF)
            allowed = int(used.ru_utime + used.ru_stime + SYMPY_SECONDS + 2)
            resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, ValueError, OSError):
        pass                           # not on this platform: the parent's wall-clock limit remains


# ---- Tier structure: tokens to a Node

class Node(NamedTuple):
    """kind   value
    scalar    Scalar
    text      lower-case words
    list      [Node]                 unordered
    tuple     (open, [Node], close)  ordered
    real      [Piece]                union of intervals and points
    relation  ([op], [Scalar])       chain of = < <= ... between scalars
    assign    (name, Node)           x=5, f(x)=2x, (p,q)=(3,2)
    matrix    [[Scalar]]
    ratio     [Scalar]
    base      (digits, base)
    """
    kind: str
    value: object
    words: tuple = ()        # what was dropped behind a number: units and the like
    key: str = ""            # letters only, for comparing with text


class Piece(NamedTuple):
    low: Scalar
    low_closed: bool
    high: Scalar
    high_closed: bool


INF, MINUS_INF = Scalar(("c", "inf")), Scalar(("*", MINUS_ONE, ("c", "inf")))
RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!="}
FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
SEPARATORS = frozenset([",", ";", "\\and", "\\or"])


def split(tokens, separators):
    """Split at bracket depth 0 (bars do not nest).  Returns parts and the separators between them."""
    parts, found, depth, start = [], [], 0, 0
    for i, t in enumerate(tokens):
        if t in OPEN:
            depth += 1
        elif t in CLOSE:
            depth -= 1
            if depth < 0:
                raise Unparsed("unbalanced")
        elif depth == 0 and t in separators:
            parts.append(tokens[start:i])
            found.append(t)
            start = i + 1
    if depth:
        raise Unparsed("unbalanced")
    return parts + [tokens[start:]], found


def build(tokens, depth=0):
    """Tokens to a Node, outermost structure first."""
    tokens = unwrap(list(tokens))
    if not tokens or depth > 20:
        raise Unparsed("empty")
    tokens = merge_operators(tokens)
    parts, found = split(adjacent_tuples(tokens), SEPARATORS)
    if found:
        return build_list(parts, found, depth)
    return build_element(tokens, depth)


def merge_operators(tokens):
    """ASCII <=, >=, != as one token; `8.7 x 10^8` means a product."""
    out = []
    for i, t in enumerate(tokens):
        if t == "=" and out and out[-1] in ("<", ">", "!"):
            out[-1] = {"<": "\\le", ">": "\\ge", "!": "\\ne"}[out[-1]]
        elif t == "x" and out and out[-1][0].isdigit() and tokens[i + 1:i + 3] == ["10", "^"]:
            out.append("*")
        elif t == "=" and out and out[-1] == "\\not":
            out[-1] = "\\ne"
        else:
            out.append(t)
    return out


def adjacent_tuples(tokens):
    """(2,3)(2,7) in a gold is a list of two points."""
    if "," not in tokens or ")" not in tokens:
        return tokens
    out, i, tuple_ended = [], 0, -1
    while i < len(tokens):
        end = match_at(tokens, i) if tokens[i] == "(" else -1
        if end > 0 and len(split(tokens[i + 1:end], ",")[0]) > 1:
            out += [","] * (tuple_ended == i) + tokens[i:end + 1]
            i = tuple_ended = end + 1
        else:
            out.append(tokens[i])
            i += 1
    return out


def build_list(parts, found, depth):
    """Elements between commas and and/or.  Only `, and` may leave an empty part."""
    if len(parts) > MAX_ITEMS:
        raise Unparsed("too many elements")
    items = []
    for i, part in enumerate(parts):
        if not part and 0 < i < len(parts) - 1 and found[i - 1] in (",", ";") and found[i] in ("\\and", "\\or"):
            continue
        node = build(part, depth + 1)
        items += node.value if node.kind == "list" and {"\\pm", "\\mp"} & set(part) else [node]
    sets = [to_real(n) if n.kind in ("real", "relation") else None for n in items]
    if all(s is not None for s in sets) and (len({n.words for n in items}) == 1):
        return Node("real", combine(sets, "\\or" in found), items[0].words)
    return Node("list", items)


def combine(sets, union):
    """x < -4 or x > 4 is a union; x > 2, x < 5 an intersection unless that is empty."""
    if not union:
        result = sets[0]
        for s in sets[1:]:
            result = intersect(result, s)
        if result:
            return result
    return merge([p for s in sets for p in s])


def build_element(tokens, depth):
    if tokens[0] == "\\{" and match_at(tokens, 0) == len(tokens) - 1:
        return build_bracket(tokens, depth)
    if "\\pm" in tokens or "\\mp" in tokens:
        return build_plus_minus(tokens, depth)
    if tokens[0] == "\\approx":
        tokens = tokens[1:]
    if "\\equiv" in tokens and not {"\\pmod", "\\mod"} & set(tokens):
        tokens = ["=" if t == "\\equiv" else t for t in tokens]
    if "\\approx" in tokens:
        left, _ = split(tokens, ("\\approx",))
        tokens = left[0] if not is_name(left[0]) else [("=" if t == "\\approx" else t) for t in tokens]
    if any(t in RELATIONS or t == "\\in" for t in tokens):
        parts, found = split(tokens, ("\\cup",))
        if not found or any(t in ("\\in", "=") for t in tokens):    # else: -1 < x < 0 \cup 1 < x < 2
            parts, found = split(tokens, {*RELATIONS, "\\in"})
            if found:
                return build_relation(parts, found, depth)
    if any(t in ("\\cup", "\\cap", "\\setminus", "\\mathbb") or t == '"u' for t in tokens):
        pieces = build_set(tokens, depth)
        if pieces is not None:
            return Node("real", pieces)
    if tokens[0] in ("(", "[", "\\langle") and match_at(tokens, 0) == len(tokens) - 1:
        node = build_bracket(tokens, depth)
        if node is not None:
            return node
    if tokens == ["\\emptyset"]:
        return Node("list", [])
    if "\\begin" in tokens:
        return build_matrix(tokens)
    return build_scalar(tokens)


def build_plus_minus(tokens, depth):
    r"""a \pm b is two values; independent signs multiply, unless a \mp or a bracket ties them together."""
    places = [i for i, t in enumerate(tokens) if t in ("\\pm", "\\mp")]
    tied = "\\mp" in tokens or tokens[0] in ("(", "[") and "," in tokens
    if len(places) > 3 and not tied or len(places) > 20:
        raise Unparsed("too many signs")
    items = []
    for signs in [(0,) * len(places), (1,) * len(places)] if tied else itertools.product((0, 1), repeat=len(places)):
        variant = list(tokens)
        for i, sign in zip(places, signs):
            variant[i] = "+-"[sign ^ (variant[i] == "\\mp")]
        items.append(build_element(variant, depth + 1))
    return Node("list", items)


def is_name(tokens):
    """May this be the left side of `name = value`?  A symbol, f(x), AB, (p,q), \\frac{NO}{BO}, words; never x+y or 2x."""
    if not tokens or len(tokens) > 24 or any(t in "+-*/!" or t in ("\\le", "\\ge") for t in tokens):
        return False
    if all(t[0] == '"' or t in ("(", ")") for t in tokens):
        return True
    depth, previous = 0, ""
    for t in tokens:
        if t in OPEN:
            depth += 1
        elif t in CLOSE:
            depth -= 1
        elif t == "^" or t[0].isdigit() and depth == 0 and previous != "_":
            return False
        elif t[0].isalpha() and not (len(t) == 1 or t.isupper() or t[0] == '"'):
            return False
        previous = t
    tokens = without_subscripts(tokens)
    if tokens[0] == "(" or "(" in tokens and tokens[1] == "(":
        return True
    at_top = [t for t in tokens if t[0].isalpha() or t[0] == '"']
    if len(at_top) > 1 and not all(t.isupper() for t in at_top if t[0] != '"'):
        return "(" in tokens and tokens[0] in FUNCTIONS
    return tokens[0][0].isalpha() or tokens[0] in GREEK or tokens[0] in FUNCTIONS or tokens[0] in MARKS or \
        tokens[0] in ("\\angle", "\\frac", "|", "\\triangle")


def without_subscripts(tokens):
    out, i = [], 0
    while i < len(tokens):
        if tokens[i] == "_" and out:
            i = match_at(tokens, i + 1) if tokens[i + 1:i + 2] == ["{"] else i + 1
            if i < 0:
                break
        else:
            out.append(tokens[i])
        i += 1
    return out


def name_key(tokens):
    """m_{\\max} and m_\\max, f(x) and f( x ) are one name."""
    return "".join(t for t in tokens if t not in ("{", "}")).replace('"', "")


def build_relation(parts, found, depth):
    if any(not p for p in parts):
        raise Unparsed("empty side")
    if "\\in" in found:
        if len(found) > 1 or not is_name(parts[0]):
            raise Unparsed("\\in")
        node = build(parts[1], depth + 1)
        if node.kind == "tuple":
            node = as_interval(node) or node
        return Node("assign", (name_key(parts[0]), node)) if node.kind != "real" else \
            Node("real", node.value, (name_key(parts[0]),))
    if set(found) == {"="}:
        return build_equation(parts, depth)
    ops = [RELATIONS[t] for t in found]
    return Node("relation", (ops, [Scalar(Parser(strip_units(p)[0]).parse()) for p in parts]))


def build_equation(parts, depth):
    """name = value, value = name, a = b = 5, 2*3 = 6, or a true equation."""
    names = []
    while len(parts) > 1 and is_name(parts[0]):
        names.append(name_key(parts[0]))
        parts = parts[1:]
    if not names and len(parts) == 2 and is_name(parts[1]):
        names, parts = [name_key(parts[1])], parts[:1]
    if len(parts) > 1:
        sides = [Scalar(Parser(strip_units(p)[0]).parse()) for p in parts]
        if not any(s.names for s in sides):
            if not all(same_scalar(s, sides[-1]) for s in sides[:-1]):
                raise Unparsed("a false equation")
            parts = parts[-1:]
        elif names or len(parts) > 2:
            raise Unparsed("chain of equations")
        else:
            return Node("relation", (["="], sides))
    node = build(parts[0], depth + 1)
    if not names:
        return node
    return Node("assign", ("=".join(names), node))


def build_bracket(tokens, depth):
    """(a,b), [a,b), \\{a,b\\}; None if the brackets only group."""
    inside = tokens[1:-1]
    open_, close = tokens[0], tokens[-1]
    if open_ == "\\{":
        if close != "\\}":
            raise Unparsed("braces")
        return build_braces(inside, depth)
    parts, found = split(inside, (",", ";"))
    if found:
        if len(parts) > MAX_ITEMS:
            raise Unparsed("too many elements")
        return Node("tuple", (open_, [build(p, depth + 1) for p in parts], close))
    if "\\begin" in inside and inside[0] == "\\begin" and match_at(inside, 0) >= len(inside) - 4:
        return build_matrix(inside)
    if len(inside) == 1 and (inside[0][0].isalpha() or inside[0][0] == '"'):
        return build_scalar(inside)
    return None


def build_braces(inside, depth):
    if not inside:
        return Node("list", [])
    for bar in ("|", ":"):
        parts, found = split(inside, (bar,))
        if len(found) == 1 and is_name(parts[0][:1]) and any(t in RELATIONS for t in parts[1]):
            return build(parts[1], depth + 1)        # \{x \mid x > 2\}
    node = build(inside, depth + 1)
    if node.kind == "list" and (len(split(inside, SEPARATORS)[1]) or "\\pm" in inside):
        return node
    return Node("list", [node])


def build_matrix(tokens):
    """[factor] \\begin{xmatrix} ... \\end{xmatrix}; the bracket style does not matter, a determinant is not a matrix."""
    start = tokens.index("\\begin")
    end = match_at(tokens, start)
    factor = tokens[:start]
    if factor and factor[-1] in ("(", "["):
        raise Unparsed("matrix")
    name_end = match_at(tokens, start + 1)
    name = "".join(tokens[start + 2:name_end])
    inside, rest = tokens[name_end + 1:end], tokens[end + 1:]
    if name not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array") or \
            rest[:1] != ["{"] or match_at(rest, 0) != len(rest) - 1:
        raise Unparsed("environment " + name)
    if name == "array" and inside[:1] == ["{"]:
        inside = inside[match_at(inside, 0) + 1:]
    rows = [row for row in split(inside, ("\\\\",))[0] if row]
    grid = [[Parser(cell).parse() for cell in split(row, ("&",))[0]] for row in rows]
    if not grid or len({len(row) for row in grid}) != 1:
        raise Unparsed("ragged matrix")
    if factor:
        scale = MINUS_ONE if factor == ["-"] else Parser(factor[:-1] if factor[-1] == "*" else factor).parse()
        grid = [[("*", scale, cell) for cell in row] for row in grid]
    return Node("matrix", [[Scalar(cell) for cell in row] for row in grid])


def strip_units(tokens):
    """(tokens, words dropped).  Words behind a value are dropped, with powers and slashes, unless they change it."""
    if tokens[-1] in ("\\degree",):
        return tokens, ()
    for k in range(1, len(tokens)):
        t = tokens[k]
        if t[0] == '"' or t[0].isalpha() and (len(t) > 3 or len(t) > 1 and t.lower() in UNITS or t.lower() in ("am", "pm")
                                              or t in "CFK" and tokens[k - 1] == "\\degree"):
            words = unit_tail(tokens[k:])
            if words is not None:
                return (tokens, ()) if MEANINGFUL & set(words) else (tokens[:k], tuple(words))
    return tokens, ()


def unit_tail(tokens):
    """The words of `km/h`, `cm^{-2}`, `square feet`; None if there is anything else."""
    words, i = [], 0
    while i < len(tokens):
        t = tokens[i]
        if t[0] == '"' or t[0].isalpha():
            words.append(t.lstrip('"').lower())
        elif t == "^" and i + 1 < len(tokens):
            end = match_at(tokens, i + 1) if tokens[i + 1] == "{" else i + 1
            inner = [x for x in tokens[i + 1:end + 1] if x not in ("{", "}", "-")]
            if len(inner) != 1 or not inner[0].isdigit():
                return None
            i = end
        elif t not in ("/", "*", "(", ")", "."):
            return None
        i += 1
    return words


def build_scalar(tokens):
    """A number, an expression, a ratio, a number in a base, or words."""
    parts, found = split(tokens, (":",))
    if found:
        parts[-1], words = strip_units(parts[-1]) if parts[-1] else (parts[-1], ())
        return Node("ratio", [Scalar(Parser(p).parse()) for p in parts], words)
    if "_" in tokens:
        node = build_base(tokens)
        if node is not None:
            return node
    key = "".join(t.lstrip('"').lower() for t in tokens if t not in ("{", "}", "(", ")"))
    key = key if key.replace("-", "").replace("'", "").isalpha() else ""
    prose = len(tokens) > 1 and all(t.isalpha() for t in tokens) and max(map(len, tokens)) > 3   # infinitely many
    if prose or any(t[0] == '"' for t in tokens):
        if all(t[0] == '"' or t in ("(", ")", ".", "!", "?", "{", "}") or t[0].isalpha() for t in tokens):
            words = " ".join(t.lstrip('"').lower() for t in tokens if t[0] == '"' or t[0].isalpha())
            return Node("text", words, (), key)
    value, words = strip_units(tokens)
    try:
        scalar = Scalar(Parser(value).parse())
    except Unparsed:
        if any(t[0] == '"' for t in tokens):     # "October 30": equal to the same words only
            return Node("text", " ".join(tokens).replace('"', ""))
        raise
    if words and scalar.names and not set(words) <= UNITS:
        raise Unparsed("words behind an expression")
    return Node("scalar", scalar, words, key)


def build_base(tokens):
    """2516_8, 2516_{8}, (1001)_2."""
    i = tokens.index("_")
    digits, base = ("".join(t.lstrip('"') for t in part if t not in ("(", ")", "{", "}"))
                    for part in (tokens[:i], tokens[i + 1:]))
    if re.fullmatch(r"-?[0-9]{1,4}|[a-z]", base) and re.fullmatch(r"-?(?:[0-9][0-9A-Fa-f.]*|[0-9A-Fa-f.]*[0-9])", digits):
        return Node("base", ("-" * (digits[0] == "-") + digits.lstrip("-0").upper(), base))
    return None


# ---- Sets of real numbers

def position(scalar):
    """Sort key of an end point; raises if it is not a real constant."""
    sign = infinite(scalar.tree)
    if sign:
        return sign * math.inf
    if scalar.names:
        raise Unparsed("variable end point")
    try:
        value, _ = scalar.value()
    except (ArithmeticError, ValueError):
        raise Unparsed("end point") from None
    if isinstance(value, Fraction):
        return value
    if context(LOW).im(value):
        raise Unparsed("complex end point")
    return value


def before(a, b):
    """-1, 0, 1: the order of two end points."""
    x, y = position(a), position(b)
    if isinstance(x, Fraction) and isinstance(y, Fraction) or isinstance(x, float) or isinstance(y, float):
        return (x > y) - (x < y)
    if same_scalar(a, b):
        return 0
    return 1 if Evaluator(LOW).inexact(x) > Evaluator(LOW).inexact(y) else -1


def as_interval(node):
    """A two-element tuple (a,b) with a < b as a Piece list, \\{a\\} as points, else None."""
    try:
        if node.kind == "real":
            return node
        if node.kind == "tuple" and len(node.value[1]) == 2 and node.value[0] in "([" and node.value[2] in ")]":
            low, high = (n.value for n in node.value[1] if n.kind == "scalar")
            order = before(low, high)
            left, right = node.value[0] == "[", node.value[2] == "]"
            if order < 0 or order == 0 and left and right:
                return Node("real", [Piece(low, left, high, right)])
        if node.kind == "list" and all(n.kind == "scalar" for n in node.value):
            return Node("real", merge([Piece(n.value, True, n.value, True) for n in node.value]))
    except (Unparsed, ValueError):
        pass
    return None


def build_set(tokens, depth):
    """\\cup, \\cap and \\setminus of intervals and finite sets, left to right; None if it is something else."""
    parts, found = split(tokens, ("\\cup", "\\cap", "\\setminus", '"u'))
    result = None
    for op, part in zip(["\\cup", *found], parts):
        if part == ["\\mathbb", "{", "R", "}"] or part == ["\\mathbb", "R"]:
            pieces = [Piece(MINUS_INF, False, INF, False)]
        elif part == ["\\emptyset"]:
            pieces = []
        elif not found or not part:
            return None
        else:
            node = build_element(unwrap(part), depth + 1)
            node = as_interval(node) or (to_real(node) and Node("real", to_real(node)))
            if node is None:
                raise Unparsed("union of other things")
            pieces = node.value
        if result is None:
            result = pieces
        elif op == "\\cap":
            result = intersect(result, pieces)
        elif op == "\\setminus":
            result = intersect(result, complement(pieces))
        else:
            result = merge(result + pieces)
    return result


def merge(pieces):
    """Sorted, with touching pieces joined: [0,1) and [1,2] is [0,2], (0,1) and (1,2) stays."""
    pieces = sorted(pieces, key=functools.cmp_to_key(
        lambda p, q: before(p.low, q.low) or q.low_closed - p.low_closed))
    out = []
    for p in pieces:
        if out:
            last = out[-1]
            gap = before(last.high, p.low)
            if gap > 0 or gap == 0 and (last.high_closed or p.low_closed):
                end = before(last.high, p.high)
                high, closed = (p.high, p.high_closed) if end < 0 else \
                    (last.high, last.high_closed or end == 0 and p.high_closed)
                out[-1] = Piece(last.low, last.low_closed, high, closed)
                continue
        out.append(p)
    return out


def intersect(xs, ys):
    out = []
    for p in xs:
        for q in ys:
            low = before(p.low, q.low)
            high = before(p.high, q.high)
            left = (p if low > 0 else q) if low else None
            right = (p if high < 0 else q) if high else None
            piece = Piece(left.low if left else p.low, left.low_closed if left else p.low_closed and q.low_closed,
                          right.high if right else p.high,
                          right.high_closed if right else p.high_closed and q.high_closed)
            order = before(piece.low, piece.high)
            if order < 0 or order == 0 and piece.low_closed and piece.high_closed:
                out.append(piece)
    return out


def complement(pieces):
    out, low, closed = [], MINUS_INF, False
    for p in pieces:
        if before(low, p.low) < 0 or closed and not p.low_closed:
            out.append(Piece(low, closed, p.low, not p.low_closed))
        low, closed = p.high, not p.high_closed
    if low is not INF and before(low, INF) < 0:
        out.append(Piece(low, closed, INF, False))
    return out


def to_real(node):
    """The pieces of an interval, union or single-variable relation; None if it is not one."""
    if node.kind != "relation":
        found = as_interval(node) if node.kind in ("tuple", "real", "list") else None
        return found.value if found else None
    ops, sides = node.value
    names = frozenset().union(*(s.names for s in sides))
    if len(names) != 1 or set(ops) == {"="}:
        return None
    result = [Piece(MINUS_INF, False, INF, False)]
    try:
        for op, left, right in zip(ops, sides, sides[1:]):
            result = intersect(result, half_line(op, left, right, *names))
    except (Unparsed, ArithmeticError, ValueError, TypeError):
        return None
    return result


def half_line(op, left, right, name):
    """The solutions of `x op constant`.  Only solved relations count: `2x + 1 < 5` restates a problem."""
    if left.tree != ("v", name):
        left, right, op = right, left, FLIP[op]
    if left.tree != ("v", name) or right.names:
        raise Unparsed("not solved")
    end = infinite(right.tree)
    if end:
        if end == (1 if op in ("<", "<=") else -1):
            return [Piece(MINUS_INF, False, INF, False)]
        raise Unparsed("infinity")
    point = Piece(right, True, right, True)
    return {"<": [Piece(MINUS_INF, False, right, False)], "<=": [Piece(MINUS_INF, False, right, True)],
            ">": [Piece(right, False, INF, False)], ">=": [Piece(right, True, INF, False)],
            "=": [point], "!=": complement([point])}[op]


# ---- Comparing two Nodes.  a is always the answer, b the gold.

def same(a, b):
    if a.words and b.words and not same_words(set(a.words), set(b.words)):
        return False
    if a.kind == "assign" or b.kind == "assign":
        return same_assign(a, b)
    if a.kind == b.kind == "text":
        return a.value == b.value
    if "text" in (a.kind, b.kind) or is_choice(b):
        return bool(a.key) and a.key == b.key
    if "list" in (a.kind, b.kind) and "real" not in (a.kind, b.kind):
        return same_list(a, b)
    if a.kind != b.kind or a.kind == "relation":
        if a.kind == b.kind and same_relation(a, b):
            return True
        x, y = to_real(a), to_real(b)
        return x is not None and y is not None and same_name(a, b) and same_pieces(x, y)
    if a.kind == "scalar":
        return same_scalar(a.value, b.value)
    if a.kind == "tuple":
        (o1, xs, c1), (o2, ys, c2) = a.value, b.value
        return o1 == o2 and c1 == c2 and len(xs) == len(ys) and all(map(same, xs, ys))
    if a.kind == "matrix":
        return [len(r) for r in a.value] == [len(r) for r in b.value] and \
            all(same_scalar(x, y) for r, s in zip(a.value, b.value) for x, y in zip(r, s))
    if a.kind == "ratio":
        return len(a.value) == len(b.value) and all(map(same_scalar, a.value, b.value))
    if a.kind == "real":
        return same_pieces(a.value, b.value)
    return a.value == b.value


def is_choice(node):
    """A bare capital A to H as gold: `b` may stand for B (but not B for a variable b)."""
    return node.kind == "scalar" and node.value.tree[0] == "v" and node.value.tree[1] in tuple("ABCDEFGH")


def same_words(a, b):
    """Units never conflict (nothing is converted), `integers` fits `distinct integers`, odd does not fit even."""
    return a <= UNITS and b <= UNITS or a <= b or b <= a


def same_name(a, b):
    """x > 2 is (2,oo), but not y > 2."""
    def name(n):
        if n.kind == "relation":
            return "".join(frozenset().union(*(s.names for s in n.value[1])))
        return n.words[0] if n.kind == "real" and n.words else None
    return name(a) is None or name(b) is None or name(a) == name(b)


def same_pieces(xs, ys):
    return len(xs) == len(ys) and all(
        p.low_closed == q.low_closed and p.high_closed == q.high_closed
        and same_scalar(p.low, q.low) and same_scalar(p.high, q.high) for p, q in zip(xs, ys))


def sides(node):
    """lhs - rhs of an equation, if it is one between scalars."""
    if node.kind == "relation" and node.value[0] == ["="]:
        left, right = node.value[1]
        return Scalar(("+", left.tree, ("*", MINUS_ONE, right.tree)))
    if node.kind == "assign" and node.value[1].kind == "scalar":
        name = node.value[0]
        if re.fullmatch(r"[A-Za-z](_.+)?'*|\\[A-Za-z]+(_.+)?'*", name):
            return Scalar(("+", node.value[1].value.tree, ("*", MINUS_ONE, ("v", name))))
    return None


def same_assign(a, b):
    """x=5 against x=5, against 5, or against another equation."""
    if a.kind == b.kind and a.value[0] == b.value[0]:
        return same(a.value[1], b.value[1])
    x, y = sides(a), sides(b)
    if x is not None and y is not None:
        return proportional(x, y) is not None
    if a.kind == b.kind:
        return same_function(a, b)
    if any(n.kind == "assign" and is_quantity(n.value[1]) for n in (a, b)):
        return False                     # SRAC = LRAC is a statement, its right side alone says nothing
    if a.kind == "assign":
        return b.kind != "relation" and same(a.value[1], b)
    return a.kind != "relation" and same(a, b.value[1])


def is_quantity(node):
    """A product of capitals or words, such as PV or LRAC."""
    if node.kind != "scalar" or not node.value.names:
        return False
    return all(n.isupper() or len(n) > 3 for n in node.value.names) and \
        set(re.sub(r"[(),']", " ", str(node.value.tree)).split()) <= {"*", "v", *node.value.names}


def same_function(a, b):
    """y = x+1 and f(x) = x+1 define one function."""
    pattern = r"(y|[A-Za-z]\([a-z]\))"
    return bool(re.fullmatch(pattern, a.value[0]) and re.fullmatch(pattern, b.value[0])) and \
        "y" in (a.value[0], b.value[0]) and bool(b.value[1].kind == "scalar" and b.value[1].value.names) and \
        same(a.value[1], b.value[1])


def proportional(x, y):
    """The constant factor between two expressions that must be zero, or None."""
    if x.names != y.names or not x.names:
        return None
    try:
        with _mp_lock:
            return same_symbolic(x, y, ratio=True) or None
    except (ArithmeticError, ValueError):
        return None


def same_relation(a, b):
    """Chains term by term, or one relation up to a factor, whose sign turns an inequality round."""
    (ops, xs), (gold_ops, ys) = a.value, b.value
    for o, s in ((ops, xs), ([FLIP[x] for x in reversed(ops)], xs[::-1])):
        if o == gold_ops and all(map(same_scalar, s, ys)):
            return True
    if len(ops) != 1 or len(gold_ops) != 1 or gold_ops != ["="] and to_real(b) is not None:
        return False                     # x < 2 is asked for: 3x - 6 < 0 is the problem, not the answer
    factor = proportional(*(Scalar(("+", s[0].tree, ("*", MINUS_ONE, s[1].tree))) for s in (xs, ys)))
    if factor is None:
        return False
    op = ops[0]
    if op in ("=", "!="):
        return op == gold_ops[0]
    if not isinstance(factor, Fraction) and context(LOW).im(factor):
        return False
    return (op if factor > 0 else FLIP[op]) == gold_ops[0]


def elements(node):
    """Elements of a list, without a name that all of them share (`x=1, x=2` or `x=1, 2`)."""
    if node.kind == "assign" and node.value[1].kind == "list":
        return node.value[0], list(node.value[1].value)
    items = list(node.value) if node.kind == "list" else [node]
    names = {n.value[0] for n in items if n.kind == "assign"}
    if len(names) == 1 and all(n.kind != "relation" for n in items):
        return names.pop(), [n.value[1] if n.kind == "assign" else n for n in items]
    return None, items


def same_list(a, b):
    """Unordered: every element of the gold once, none extra."""
    (name_a, xs), (name_b, ys) = elements(a), elements(b)
    if len(xs) != len(ys) or name_a and name_b and name_a != name_b:
        return False
    rest = list(ys)
    for x in xs:
        for i, y in enumerate(rest):
            if same(x, y):
                del rest[i]
                break
        else:
            return False
    return True


# ---- Public interface

@functools.lru_cache(maxsize=20_000)
def read(text):
    """(tokens, Node) of a text; the Node is None if the text is outside the grammar."""
    try:
        tokens = tokenize(text)
    except (Unparsed, Undecided, ValueError):
        return None, None
    if not tokens:
        return None, None
    try:
        return tokens, build(tokens)
    except (Unparsed, Undecided, ArithmeticError, ValueError, IndexError, RecursionError):
        return tokens, None


PLAIN_INTEGER = re.compile(r"(-?)([0-9]+)")          # no optional parts side by side: matching stays linear


def compare(answer, gold):
    """(equal, tier, reason) for two texts."""
    m, g = PLAIN_INTEGER.fullmatch(answer.strip()), PLAIN_INTEGER.fullmatch(gold.strip())
    if m and g:
        digits, gold_digits = m[2].lstrip("0"), g[2].lstrip("0")
        equal = digits == gold_digits and (m[1] == g[1] or not digits)
        return equal, "integer", "equal" if equal else "different"
    tokens, a = read(answer)
    gold_tokens, b = read(gold)
    if gold_tokens is None:
        return False, "parse", "unparsed_gold"
    if tokens == gold_tokens:
        return True, "same", "equal"
    if b is None:
        return False, "parse", "unparsed_gold"
    if a is None:
        return False, "parse", "unparsed_answer"
    tier = "text" if "text" in (a.kind, b.kind) else "structure" if (a.kind, b.kind) != ("scalar", "scalar") else "numeric"
    _used.sympy = False
    try:
        if b.kind == "list" and "\\or" in gold_tokens and all(same(n, b.value[0]) for n in b.value[1:]):
            b = b.value[0]               # the gold gives one value in two forms: 30.4 or 152/5
        left, right = (n.value[1] if n.kind == "assign" else n for n in (a, b))
        if left.kind == right.kind == "scalar" and is_literal(right.value.tree) and is_unfinished(left.value.tree):
            return False, "exact", "unfinished arithmetic"
        equal = same(a, b)
    except Undecided as e:
        return False, "bound", "timeout" if "timeout" in str(e) else str(e)
    except (Unparsed, ArithmeticError, ValueError, TypeError, RecursionError):
        return False, tier, "not comparable"
    if tier == "numeric" and not a.value.names | b.value.names and (a.value.tree == b.value.tree or all(
            isinstance(n.value.cache.get(LOW, (None,))[0], Fraction) for n in (a, b))):
        tier = "exact"
    return equal, "sympy" if _used.sympy else tier, "equal" if equal else "different"


def gold_texts(gold):
    """The accepted texts of a gold: a text, a number, or a list of them (any counts)."""
    if isinstance(gold, str):
        forms = re.split(r"\\text\s*\{\s*OR\s*\}", gold)      # the data's way to list accepted forms
        return [gold, *forms] if len(forms) > 1 else [gold]
    if isinstance(gold, (list, tuple)):
        return [text for g in gold if not isinstance(g, (list, tuple)) for text in gold_texts(g)]
    try:
        real = isinstance(gold, numbers.Real) and not isinstance(gold, bool) and math.isfinite(gold)
        return [str(gold)] if real else []
    except (ValueError, OverflowError):          # more digits than Python converts
        return []


def judge(answer, gold, strict=False):
    """The first matching text of the gold decides; else the first that could be read."""
    best = (False, "parse", "unparsed_gold")
    for text in gold_texts(gold):
        result = strict_compare(answer, text) if strict else compare(answer, text)
        if result[0]:
            return result
        if best[2] == "unparsed_gold":
            best = result
    return best


def grade(answer, gold, strict=False):
    r"""Does `answer` (the text inside the box) equal `gold`?  Never raises; what cannot be read is wrong.

    `gold` is a text, a number, or a list of which any element counts.  `strict` gives the verdict of
    DeepScaleR's own grader.  The conventions, by example:

    >>> def check(right, *pairs):
    ...     return [pair for pair in pairs if grade(*pair) is not right]
    >>> check(True, (r"\dfrac12", "0.5"), (r"\left(\tfrac{1}{2}\right)", "1/2"), (r"$\boxed{\frac{1}{2}}$.", r"\frac 12"),
    ...       ("3*sqrt(13)", r"3\sqrt{13}"), ("2π", r"2\pi"), (r"0.\overline{3}", r"\frac13"), (r"1\frac{4}{5}", "9/5"))
    []
    >>> check(False, ("3.14", r"\pi"), ("0.33", r"\frac13"), ("10001", "10000"))             # no tolerance
    []
    >>> check(True, (r"1,\!000", "1000"), ("1{,}000", r"1\,000"), ("025", "25"), ("142", 142.0), ("87e7", r"8.7 \times 10^8"))
    []
    >>> check(True, (r"50\%", "50"), (r"90^\circ", "90"), (r"\$36", r"36 \text{ dollars}"), (r"5 \text{ cm}^2", "5"))
    []
    >>> check(False, ("0.5", r"50\%"), (r"5 \text{ million}", "5"), (r"\text{odd}", r"\text{even}"))
    []
    >>> check(True, ("x=5", "5"), ("f(x)=2x", "2x"), ("(p,q)=(3,2)", "(3,2)"), ("y-3=2x", "y=2x+3"), ("2x+4y=6", "x+2y-3=0"))
    []
    >>> check(False, ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), ("(1,2]", "[1,2]"), (r"\{1,2\}", "(1,2)"), ("-2x-y=0", "y=2x"))
    []
    >>> check(True, ("2, 1", r"\{1,2\}"), ("1 and 2", r"2 \text{ or } 1"), (r"3 \pm 1", "2, 4"), ("x=1, x=2", "1,2"))
    []
    >>> check(False, ("5 or 6", "5"), ("4,5,6", "5"), ("1", "1,2"), ("1,2,3", "1,2"), (r"\pm 2", "2"))     # no hedging
    []
    >>> check(True, ("x > 2", r"(2,\infty)"), (r"-2 \le x < 7", r"x \in [-2,7)"), (r"x<1 \text{ or } x>4",
    ...       r"(4,\infty)\cup(-\infty,1)"), (r"\mathbb{R}", r"(-\infty,\infty)"))
    []
    >>> check(True, (r"-\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{bmatrix}-1&0\\0&-1\end{bmatrix}"),
    ...       (r"\textbf{(C)}", "C"), ("yes", r"\text{Yes}"), ("52_{8}", "52_8"), ("1 : 4", "1:4"))
    []
    >>> check(False, ("52_9", "52_8"), ("4:1", "1:4"), ("2:8", "1:4"), ("B", r"\text{(C)}"))
    []
    >>> check(True, ("(x+1)^2", "x^2+2x+1"), (r"\ln 4", r"2\ln 2"), (r"1-\sin^2 a", r"\cos^2 a"), (r"2^{10}", "1024"))
    []
    >>> grade("6", ["5", "6"]), grade("6", None), grade("6", float("nan"))
    (True, False, False)
    """
    try:
        if not isinstance(answer, str):
            return False
        return judge(answer, gold, strict)[0]
    except Exception:
        return False


def explain(response, gold, strict=False):
    """The `Verdict` on a whole response: reward, the tier that decided, why, the answer found, the gold.

    >>> explain(r"<think>...</think> \\boxed{x+1}", r"1+x")
    Verdict(reward=1.0, tier='numeric', reason='equal', answer='x+1', gold='1+x')
    >>> explain(r"the answer is 5", "5").reason, explain("</think> 5", "5").reason
    ('no_close', 'no_box')
    """
    answer = strict_extract(response) if strict else extract_answer(response)
    if answer is None:
        closed = isinstance(response, str) and "</think>" in response
        reason = "no_box" if closed else "no_close"
        count(reason)
        return Verdict(0.0, "extract", reason, None, gold)
    return explain_answer(answer, gold, strict)


def explain_answer(answer, gold, strict=False):
    """`explain` for the text inside the box."""
    try:
        equal, tier, reason = judge(answer, gold, strict)
    except Exception as e:             # the last line of defence: the trainer must never see an exception
        equal, tier, reason = False, "error", type(e).__name__
    if reason in ("unparsed_answer", "unparsed_gold"):
        count(reason)
    return Verdict(float(equal), tier, reason, answer, gold)


def compute_reward(response, gold, strict=False):
    r"""1.0 if the last box after the last </think> holds the gold, else 0.0.  Never raises.

    >>> compute_reward(r"<think>hm</think> \boxed{\frac{2}{4}x}", r"x/2")
    1.0
    """
    return explain(response, gold, strict).reward


def grade_chunk(job):
    rows, strict = job
    reset_counters()
    rewards = [compute_reward(response, gold, strict) for response, gold in rows]
    return [rewards, reset_counters()]


def compute_rewards(responses, golds, workers=None, strict=False):
    """Rewards of many responses, in order; from any thread, under fork and spawn.

    One process grades thousands a second, so `workers` (extra processes) pays only for very large files.
    Raises ValueError if the lengths differ: silently short rewards would train on the wrong rows.

    >>> compute_rewards([r"</think>\\boxed{1}", r"</think>\\boxed{2}"], ["1", "1"])
    [1.0, 0.0]
    """
    responses, golds = list(responses), list(golds)
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses, {len(golds)} golds")
    if not workers or workers < 2:
        return [compute_reward(r, g, strict) for r, g in zip(responses, golds)]
    rows = list(zip(responses, golds))
    size = max(1, min(500, -(-len(rows) // workers)))
    chunks = [rows[i:i + size] for i in range(0, len(rows), size)]
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        graders = queue.SimpleQueue()
        for _ in range(workers):
            graders.put(Worker("grade"))
        results = list(threads.map(lambda chunk: grade_remotely(chunk, strict, graders), chunks))
    while not graders.empty():
        graders.get().stop()
    return [reward for rewards in results for reward in rewards]


def grade_remotely(chunk, strict, graders):
    """Grade a chunk in one of the workers; what cannot be sent (a gold that is no JSON) is graded here."""
    worker = graders.get()
    try:
        result = worker.ask([chunk, strict], 30 + len(chunk))
    except (TypeError, ValueError):
        result = None
    finally:
        graders.put(worker)
    if not result:
        return [compute_reward(r, g, strict) for r, g in chunk]
    with _counter_lock:
        counters.update(result[1])
    return result[0]


# ---- strict: the original DeepScaleR verdicts

def strict_extract(response):
    """The original cuts at the first and second </think>.  (It also wanted <think>, which the prompt may hold.)"""
    parts = response.split("</think>") if isinstance(response, str) else []
    return last_box(parts[1]) if len(parts) > 1 else None


def strict_compare(answer, gold):
    """MATH's string equality, or prm800k's grader with `simplify(a - b) == 0` replaced by the tiers above.

    Same blind spots on purpose: ordered lists, unreduced fractions wrong, no trigonometry or logarithms.
    Source: github.com/agentica-project/deepscaler, rewards/math_utils; its hangs are answered with 0.
    """
    gold = last_box(gold) or "" if "\\boxed" in gold else gold
    if max(len(answer), len(gold)) > MAX_CHARS:
        return False, "strict", "too long"
    if mathd(answer) == mathd(gold):
        return True, "strict", "equal strings"
    a, b = prm800k(answer), prm800k(gold)
    if a == b:
        return True, "strict", "equal"
    if not a:
        return False, "strict", "empty"
    xs, ys = strict_elements(a), strict_elements(b)
    if len(ys) > 1 and (a[0], a[-1]) != (b[0], b[-1]) or len(xs) != len(ys):
        return False, "strict", "different"
    equal = all(map(strict_element, xs, ys))
    return equal, "strict", "equal" if equal else "different"


def mathd(text):
    """The MATH normaliser: formatting, units behind `\\text{ `, a short `x=`, 0.5 and a/b as \\frac."""
    text = text.strip()
    whole = re.fullmatch(r"\\text\{(.+?)\}", text)
    text = whole[1].strip() if whole else text
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
                     ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):
        text = text.replace(old, new)
    if text.count("\\text{ ") == 1:
        text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{\s])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}", text)


STRICT_UNITS = re.compile(r"(degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
                          r"(es)?(s)? *(\^[0-9]+)?")
STRICT_SYMBOLS = {r"\pi": "pi", r"\infty": "inf", r"\cup": "u", r"\cdot": "*", r"\times": "*", r"\le": "≤", r"\ge": "≥",
                  r"\leq": "≤", r"\geq": "≥", r"\pm": "±", r"\in": "∈", r"\not": "≠"}


def prm800k(text):
    """The prm800k normaliser.  LaTeX becomes plain text and braces go, which merges 9/(4 pi) with 9/4 pi."""
    whole = re.fullmatch(r"\\text\{(.+?)\}", text.strip())
    text = whole[1] if whole else text.strip()
    for old, new in (("\\%", "%"), ("\\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "),
                     ("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12")):
        text = text.replace(old, new)
    text = re.sub(r"\^ *\\circ|\^ *\{\\circ\}", "", STRICT_UNITS.sub("", text))
    text = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    text = text.replace(",\\!", "")
    if is_integral(text):
        text = str(int(float(text)))
    if "\\" in text:
        text = strict_plain(text)
    text = re.sub(r"- *", "-", text)
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", text)
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    return str(int(float(text.replace(",", "")))) if is_integral(strip_commas(text)) else text


def strip_commas(text):
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text) if "," in text else text


def is_integral(text):
    try:
        return text.isascii() and abs(float(text) - round(float(text))) <= 1e-7
    except (ValueError, OverflowError):
        return False


def strict_plain(text):
    """What pylatexenc prints: \\frac{a}{b} as a/b, \\sqrt{a} as sqrt(a), the index of a root lost."""
    text = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    text = re.sub(r"\\sqrt *\[[^\]]*\]", r"\\sqrt", text)
    for _ in range(20):                # innermost first; a bounded number of levels
        new = re.sub(r"\\frac *(?:\{([^{}]*)\}|([0-9a-z])) *(?:\{([^{}]*)\}|([0-9a-z]))", r"\1\2/\3\4", text)
        new = re.sub(r"\\sqrt *(?:\{([^{}]*)\}|([0-9a-z]))", r"sqrt(\1\2)", new)
        new = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox) *\{([^{}]*)\}", r"\1", new)
        if new == text:
            break
        text = new
    text = re.sub(r"\\[,;: ]", " ", text)
    return re.sub(r"\\([A-Za-z]+|.)", lambda m: STRICT_SYMBOLS.get(m[0], m[1] if "\\" + m[1] in FUNCTIONS | GREEK else ""),
                  text).strip()


def strict_elements(text):
    text = strip_commas(text)
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not any(c in "()[]" for c in text[1:-1]):
        return [e.strip() for e in text[1:-1].split(",")]
    return [text]


def strict_element(a, b):
    fraction = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
    if fraction.fullmatch(a) and fraction.fullmatch(b):
        return a == b
    if is_integral(strip_commas(a)) != is_integral(strip_commas(b)):
        return False
    both = f"({b})-({a})"
    found = {c for c in both.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(found) > 2 or "^{" in both or "^(" in both or re.search(r"\^[0-9]+\^|\^[0-9][0-9]+", both):
        return False
    try:
        x, y = (strict_scalar(t) for t in (a, b))
        return same_scalar(x, y)
    except (Unparsed, Undecided, ArithmeticError, ValueError, IndexError, TypeError, RecursionError):
        return False


def strict_scalar(text):
    """Lower-cased `e` and `i` were plain symbols to the original."""
    tree = Parser(math_tokens(text)).parse()
    for letter in "ei":
        tree = substitute(tree, ("c", letter), ("v", letter))
    return Scalar(tree)


# ---- Command line

def grade_file(path, strict):
    """Grade the rows of a file; print how many were decided where, and the speed."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = iter
    with open(path) as f:
        rows = [json.loads(line) for line in f if line.strip()]
    start, right, reasons = time.perf_counter(), 0, collections.Counter()
    for row in tqdm(rows):
        if "response" in row:
            verdict = explain(row["response"], row["gold"], strict)
        else:
            verdict = explain_answer(row["answer"], row["gold"], strict)
        right += verdict.reward == 1.0
        reasons[verdict.tier, verdict.reason] += 1
    seconds = time.perf_counter() - start
    for (tier, reason), n in reasons.most_common():
        print(f"{n:8d}  {tier:10s} {reason}")
    print(f"{right} of {len(rows)} right, {len(rows) / max(seconds, 1e-9):.0f} a second")


def main():
    parser = argparse.ArgumentParser(description="Grade one answer, or a file of JSON lines.")
    parser.add_argument("file", nargs="?", help='rows {"response" or "answer", "gold"}')
    parser.add_argument("--answer", help="text inside the box")
    parser.add_argument("--gold", help="the right answer")
    parser.add_argument("--strict", action="store_true", help="DeepScaleR's original verdicts")
    parser.add_argument("--worker", choices=["sympy", "grade"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker_main(args.worker)
    elif args.file:
        grade_file(args.file, args.strict)
    elif args.answer is not None and args.gold is not None:
        for name, value in explain_answer(args.answer, args.gold, args.strict)._asdict().items():
            print(f"{name:8s} {value}")
    else:
        parser.error("give FILE.jsonl, or --answer and --gold")


if __name__ == "__main__":
    main()
