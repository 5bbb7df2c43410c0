r"""reward.py: is the last \boxed{} after </think> the right answer?  1.0 or 0.0, nothing in between.

    python reward.py --answer '\frac{2}{4}x' --gold 'x/2'    explain one verdict
    python reward.py FILE.jsonl                              grade {"response" or "answer", "gold"} rows

The reward decides what the policy becomes, so three things matter, in this order: it must not be
exploitable, it must be right, it must be fast.  Each tier answers only what it is sure of:

    tier        what it does                                        why it exists
    extract     text after the last </think>, last \boxed{...}      no free-text fallback: that pays hedging
    integer     two plain integers                                  most golds, in a microsecond
    same        equal token lists                                   formatting never matters
    text        words and choices, case ignored                     \text{(C)} = C, Yes = \text{yes}
    structure   lists, tuples, intervals, equations, matrices ...   unordered, ordered, as sets, up to a factor
    exact       rational arithmetic (Fraction)                      no tolerance: 10001 is not 10000
    numeric     50 and 120 digits at several points                 \sqrt{8} = 2\sqrt{2}, factored = expanded
    sympy       sums, integrals and limits of the gold              in a worker process that can be killed

The file follows the way of an answer: extract, tokens, tree (Parser), value (Evaluator), equality of two
expressions, sympy's worker, structure (build), sets of reals, comparison (same), public functions, strict.

Left out on purpose: tolerance, per cent as a factor (50% is not 0.5), unit conversion, answers outside
the box, and evaluating a \sum or \int the gold does not have (else restating the problem would pay).

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
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from typing import NamedTuple

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
    answer: str | None
    gold: object


class Unparsed(Exception):
    """The text is outside the grammar."""


class Undecided(Exception):
    """The value exists perhaps, but computing it would break a work bound."""


# What reading or comparing may raise on bad input, and nothing else: a name misspelt in this file shall surface.
REFUSALS = (Unparsed, Undecided, ArithmeticError, ValueError, IndexError, TypeError, RecursionError)


def count(reason):
    with _counter_lock:
        counters[reason] += 1


def reset_counters():
    """Return the counters so far as a dict and start again at zero (once per training step)."""
    with _counter_lock:
        seen = dict(counters)
        counters.clear()
    return seen


# ---- Tier extract: linear scans only, no backtracking

def closing_brace(text, start, limit):
    r"""Index of the brace closing the one at `start`, or -1; `\{` and `\}` do not count."""
    depth = 0
    for m in BRACE.finditer(text, start, min(len(text), start + limit)):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0 and m[0] == "}":
            return m.start()
    return -1


BRACE = re.compile(r"\\.|[{}]", re.S)
BOX = re.compile(r"\\boxed[ \t\n]*(?=\{)")


def last_box(text):
    box = BOX.match(text, max(text.rfind("\\boxed"), 0))
    close = closing_brace(text, box.end(), MAX_CHARS + 2) if box else -1
    return text[box.end() + 1:close].strip() or None if close > 0 else None


def extract_answer(response):
    r"""The content of the last `\boxed{...}` after the last `</think>`, or None.

    The opening tag may sit in the prompt, so only the closing one is required.  An unclosed or empty
    last box is None whatever stands before it: falling back would pay a model for hedging.

    >>> extract_answer(r"<think>\boxed{1}</think> so \boxed{2}, no: \boxed {\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer(r"\boxed{2}"), extract_answer(r"</think> \boxed{2} \boxed{3")
    (None, None)
    """
    _, close, rest = response.rpartition("</think>") if isinstance(response, str) else ("", "", "")
    return last_box(rest) if close else None


# ---- Tokens.  A token is a string: '12.5' number, '\\frac' command, 'abc' letters, '"cm' word, or one character.

def table(text):
    """`a=b c=d` as a dict."""
    return dict(pair.split("=") for pair in text.split())


UNICODE = {ord(c): t + " " * t.startswith("\\") for c, t in table(r"""
    −=- –=- —=- ×=\times ·=\cdot ⋅=\cdot ∙=\cdot ÷=/ ⁄=/ π=\pi °=\degree √=\sqrt ∞=\infty ∪=\cup ∩=\cap ∈=\in ≤=\le
    ≥=\ge ≠=\ne ≈=\approx ±=\pm ∓=\mp ∅=\emptyset ≡=\equiv ℝ=\mathbb{R} ²=^2 ³=^3 ′=' ’=' ，=, ；=; ：=: （=( ）=) 。=.
    €=\$ £=\$ α=\alpha β=\beta γ=\gamma θ=\theta λ=\lambda φ=\phi ω=\omega""").items()}
UNICODE |= dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), " ")
ALIAS = table(r"""\dfrac=\frac \tfrac=\frac \cfrac=\frac \dbinom=\binom \tbinom=\binom \leq=\le \leqslant=\le \geq=\ge
    \geqslant=\ge \lt=< \gt=> \neq=\ne \times=* \cdot=* \ast=* \div=/ \colon=: \land=\and \wedge=\and \lor=\or \vee=\or
    \varnothing=\emptyset \lvert=| \rvert=| \vert=| \mid=| \lbrace=\{ \rbrace=\} \lbrack=[ \rbrack=] \lparen=( \rparen=)
    \prime=' \varphi=\phi \varepsilon=\epsilon \backslash=\setminus \textdegree=\degree \imath=i \arcsinh=\asinh
    \arccosh=\acosh \arctanh=\atanh \bmod=\mod""")
TRIG = frozenset("sin cos tan cot sec csc".split())
FUNCTIONS = frozenset("\\" + f for f in """sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot
    arcsec arccsc asinh acosh atanh ln log lg exp floor ceil abs gcd lcm max min""".split())
COMMANDS = FUNCTIONS.union(r"\sqrt \pi \infty \binom \frac \theta \alpha \beta \and \or".split())
NAMED = {c[1:]: c for c in COMMANDS} | table(r"asin=\arcsin acos=\arccos atan=\arctan acot=\arccot tg=\tan ctg=\cot "
                                             r"infinity=\infty cdot=* times=*")          # without the backslash
MARKS = frozenset(r"\hat \vec \bar \dot \ddot \tilde \overline \overrightarrow \widehat \underline \mathcal "
                  r"\mathscr \mathfrak \mathbb".split())
SILENT = frozenset(r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \middle
    \displaystyle \textstyle \scriptstyle \limits \nolimits \quad \qquad \, \! \; \: \> \( \) \[ \] \$ \% \rm \bf \it
    \mathop \ensuremath \hfill \hline \notag \nonumber \euro \pounds \bm \boldsymbol""".split()) | {"\\ ", "\\\n"}
SKIPPED = frozenset(r"\phantom \hspace \vspace \tag \label \color \textcolor".split())     # with their argument
LETTER_COMMANDS = frozenset(r"\mathrm \mathbf \mathit \mathsf \operatorname \operatorname*".split())
TEXT_COMMANDS = LETTER_COMMANDS.union(
    r"\text \textbf \textit \textrm \textnormal \textsf \textsc \texttt \emph \mbox \hbox".split())
UNITS = frozenset(unit + "s" * (plural and len(unit) > 2) for plural in (0, 1) for unit in """
    degree deg percent pct cent dollar usd yuan euro pound rupee yen unit square sq cubic cm mm km m dm nm inch inche
    in foot feet ft yard yd yds mile mi meter metre centimeter centimetre millimeter kilometer kilometre second sec
    s minute min hour hr hrs h day week month year yr yrs gram g kg kilogram mg lb lbs ounce oz ton liter litre l ml mph
    kmh kph per radian rad hz hertz joule j kj cal kcal watt w kw newton n volt v k c f kelvin celsius fahrenheit mol
    mole pa atm acre hectare piece people person student way point time apiece each th st nd rd""".split())
# Words that may not be dropped behind a number, because they change what was said.
MEANINGFUL = frozenset("""
    not no or and nor than less more least most about approximately million billion trillion hundred thousand dozen
    base half halves third quarter times squared cubed factorial pi plus minus but except unless if when is are was
    between to over negative positive wrong maybe either""".split())


def rewritten(text, rules):
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


def compiled(*rules):
    return [(re.compile(pattern), new) for pattern, new in rules]


def repeating_decimal(m):
    whole, fixed, period = m.groups()
    value = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed) + Fraction(f"{whole or 0}.{fixed or 0}")
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def join_thousands(m):
    """1,000 is one number, except inside brackets: (100,200) is a point."""
    before = m.string[:m.start()]
    opened = sum(map(before.count, ("(", "[", "\\{"))) - sum(map(before.count, (")", "]", "\\}")))
    return m[0] if opened > 0 else m[0].replace(",", "")


def mixed_number(m):
    whole, top, bottom = (int(digits) for digits in m.groups() if digits)
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else m[0]


# Spellings of one number or one sign, rewritten in the source text in this order.  Every repetition is bounded or
# begins where the one before cannot go on, so that no input makes these patterns backtrack for long.
REWRITES = compiled(
    (r"\{:\}", ":"),
    (r"(?<=[0-9 ])([aApP])\. ?[mM]\.?", r"\\text{\1m}"),                                        # 5 p.m.
    (r"\\?\$", " "),
    (r"(?<=[0-9])\s+([kc]?m/(?:s|h|min|hr)(?:\^2|\^\{2\})?)(?=\W*$)", r"\\text{\1}"),                # 6 m/s
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", r"\\degree "),
    (r"\^\{(?:\\text\{)?(?:st|nd|rd|th)\}{1,2}", ""),                                          # 5^{th}
    (r"<\s*=", r"\\le "), (r">\s*=", r"\\ge "), (r"(?:!|\\not)\s*=", r"\\ne "),
    (r"(?<=[0-9])\s*x\s*10\s*(?=\^)", "*10"),                                                  # 8.7 x 10^8
    (r"([0-9]{0,200})\.([0-9]{0,200})\\(?:overline|bar|dot)\s*\{?([0-9]{1,200})\}?", repeating_decimal),
    # 1\,000 and 1{,}000; then 1,000; then 1 4/5; then 1\frac{4}{5}
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{,\}|,?\\[,!;: ]|,\\!\s+| )[0-9]{3})+(?![0-9])",
     lambda m: re.sub(r"[^0-9]", "", m[0])),
    (r"(?<![0-9.,}])[1-9][0-9]{0,2}(?:,[0-9]{3}){1,7}(?![0-9])(?!,[0-9])", join_thousands),
    (r"(?<![0-9./^_a-zA-Z})])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![0-9./^])", mixed_number),
    (r"(?<![0-9.^_])(?<![0-9] )(?<!frac)(?<!sqrt)(?<!binom)([0-9]{1,9})\s*\\?[dtc]?frac\s*"
     r"(?:\{\s*([0-9]{1,9})\s*\}|([0-9]))\s*(?:\{\s*([0-9]{1,9})\s*\}|([0-9]))(?!\s*\^)", mixed_number),
    (r"\^\s*\{((?:\s*(?:'|\\prime))+)\s*\}|\^\s*(?='|\\prime)", r"\1"),                        # y^{\prime}
    (r"(\([^(),]*,[^()]*\))(?=\s*(?:\\left\s*)?\([^(),]*,[^()]*\))", r"\1,"),                     # (2,3)(2,7)
)
# 1e-5 and 3.61e-10 are numbers, 24e-32 is 24e - 32.
SCIENTIFIC = r"(?:(?<![0-9.(a-zA-Z])[0-9]|[0-9]*\.[0-9]+)[eE][+-][0-9]{1,5}(?![0-9.])"
TOKEN = re.compile(rf"(?P<num>{SCIENTIFIC}|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][0-9]{{1,5}}(?![0-9.]))?)"
                   r"|(?P<cmd>\\(?:operatorname\*|[A-Za-z]+|.))|(?P<run>[A-Za-z]+)|(?P<skip>[\s~%]+)|(?P<op>.)", re.S)
TEXT_TOKEN = re.compile(r"[A-Za-z](?:[A-Za-z'-]|\.(?=[A-Za-z]))*|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|[^\sA-Za-z~]")


def text_tokens(command, inner, depth):
    r"""\mathrm{e} is a letter, \operatorname{sin} a function; the rest words: \text{even} is not e*v*e*n."""
    bare = inner.strip()
    if command in LETTER_COMMANDS:
        if len(bare) == 1 and bare.isalpha() and (command != "\\mathrm" or bare in "eid"):
            return [bare]
        if bare in NAMED:
            return [NAMED[bare]]
    if "\\" in inner or not re.search("[A-Za-z]{2}", inner) and re.search(r"^\s*[-0-9]|=", inner):
        return math_tokens(inner, depth + 1)
    words = (t.lower().replace(".", "") if t[0].isalpha() else t for t in TEXT_TOKEN.findall(inner))
    return ["\\" + w if w in ("and", "or") else '"' + w if w[:1].isalpha() else w for w in words]


def math_tokens(source, depth=0):
    r"""Tokens of a formula; commands that only format disappear, \text{...} becomes words."""
    if depth > 8:
        raise Unparsed("nested text")
    out, i = [], 0
    while i < len(source):
        m = TOKEN.match(source, i)
        i, kind, t = m.end(), m.lastgroup, m[0]
        if kind == "run":
            t = NAMED.get(t) or NAMED.get(t.lower() if len(t) > 1 else t) or t
        elif kind == "cmd":
            t = ALIAS.get(t, t)
        if kind == "skip" or t in SILENT:
            i += t in ("\\left", "\\right") and source[i:i + 1] == "."
        elif t in TEXT_COMMANDS or t in SKIPPED:
            while source[i:i + 1] == " ":
                i += 1
            if source[i:i + 1] == "{":
                close = closing_brace(source, i, len(source))
                if close < 0:                # at once: 600 unclosed \text{ would each be scanned to the end
                    raise Unparsed("unclosed " + t)
                out += text_tokens(t, source[i + 1:close], depth) if t in TEXT_COMMANDS else []
                i = close + 1
        else:
            out.append(t)
    return out


def unwrap(tokens):
    """Drop final punctuation and braces around everything, unless they enclose a list: {1,2} is a set."""
    while tokens and tokens[-1] in (".", ",", ";", ":", "\\\\"):
        tokens = tokens[:-1]
    while len(tokens) > 2 and tokens[0] == "{" and match_at(tokens, 0) == len(tokens) - 1 and "\\choose" not in tokens:
        tokens = tokens[1:-1]
    return tokens


def tokenize(source):
    """Text to a tuple of tokens.  Raises Unparsed for text too long to look at."""
    if len(source) > MAX_CHARS:
        raise Unparsed("too long")
    source = source.translate(UNICODE).strip()
    if "\\boxed" in source:
        source = last_box(source) or ""
    if "\\begin" not in source:                          # elsewhere `\\frac` was escaped twice on its way into the data
        source = re.sub(r"\\\\(?=[A-Za-z])", r"\\", source)
    tokens = math_tokens(rewritten(source, REWRITES))
    if len(tokens) > MAX_TOKENS:
        raise Unparsed("too many tokens")
    return tuple(unwrap(tokens))


# ---- Parser: tokens to a tree.  Leaves ('n', Fraction) ('v', name) ('c', 'pi'); else (operation, tree, ...) with
# + * / ^ ! !! root ln sin binom abs ...; and ('big', kind, variable, low, high, body) for \sum \prod \int \lim.

OPEN = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil",
        "\\langle": "\\rangle", "\\begin": "\\end"}
CLOSE = frozenset(OPEN.values())
GREEK = frozenset("\\" + g for g in """alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    rho sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar mho odot
    aleph partial nabla""".split())
ONE, MINUS_ONE, TWO, TEN = (("n", Fraction(k)) for k in (1, -1, 2, 10))
DIGITS = tuple("0123456789")                     # not str.isdigit: that is true of a superscript two
MANY_ARGUMENTS = frozenset(["gcd", "lcm", "max", "min"])
WHOLE_NUMBERS = frozenset(["!", "!!", "binom", "gcd", "lcm"])           # defined for whole numbers only
STEPS = WHOLE_NUMBERS | {"floor", "ceil", "abs", "max", "min"}          # differ at some points, agree at others


def match_at(tokens, start):
    """Index of the bracket closing the one at `start` (any bracket closes any: [0,1) is fine), or -1."""
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] in OPEN) - (tokens[i] in CLOSE)
        if depth == 0 and tokens[i] in CLOSE:
            return i
    return -1


def is_number(token):
    return token[:1] in DIGITS or token[:1] == "." and len(token) > 1


def number(token):
    mantissa, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) * 3.33 > MAX_BITS:
        raise Undecided("number too long")
    return ("n", Fraction(mantissa) * Fraction(10) ** int(exponent) if exponent else Fraction(mantissa))


def negative(tree):
    return ("*", MINUS_ONE, tree)


def minus(a, b):
    return ("+", a, negative(b))


LEADING_FUNCTION = re.compile("(arcsin|arccos|arctan|sqrt|sin|cos|tan|log|ln|pi)(.{0,2})")


def letters(run):
    """`abc` is a product, `sinx` a function, `parabola` one opaque name."""
    function = LEADING_FUNCTION.fullmatch(run)
    return [NAMED[function[1]], *function[2]] if function else list(run) if len(run) < 4 else [run]


SUM, PRODUCT, POWER, EXPONENT, ATOM = range(5)       # how tightly an operator binds


class Parser:
    """Precedence climbing over one element (no commas, no relations at the top)."""

    def __init__(self, tokens, depth=0):
        runs = (letters(t) if t[0].isalpha() else [t] for t in tokens)
        self.tokens = [*itertools.chain.from_iterable(runs), "", "", ""]         # so that peeking needs no check
        self.at, self.depth, self.in_bars, self.in_trig = 0, depth, False, 0

    def parse(self):
        tree = self.tree()
        if self.peek():
            raise Unparsed(self.peek())
        return tree

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead]

    def take(self, expected=None):
        token = self.peek()
        if not token or expected is not None and token != expected:
            raise Unparsed(f"{expected or 'more'} expected, {token or 'end'} found")
        self.at += 1
        return token

    def accept(self, *wanted):
        return self.take() if self.tokens[self.at] in wanted else ""

    def tree(self, level=SUM):
        """The longest expression whose operators all bind at least as tightly as `level`."""
        self.depth += 1                          # every recursion passes here, so nothing exceeds Python's stack
        if self.depth > MAX_DEPTH:
            raise Unparsed("too deep")
        if sign := self.accept("+", "-") if level < ATOM else "":
            tree = self.tree(max(level, POWER))
            tree = negative(tree) if sign == "-" else tree
        else:
            tree = self.primary()
        while (longer := self.extended(tree, level)) is not None:
            tree = longer
        self.depth -= 1
        return tree

    def extended(self, tree, level):
        """`tree` with the operator that follows it, or None.  Juxtaposition multiplies, except of two numbers."""
        t = self.peek()
        if level <= EXPONENT and (t == "^" or t == self.peek(1) == "*"):
            self.at += 1 if t == "^" else 2
            return ("^", tree, self.tree(EXPONENT))
        if t in ("!", "'", "\\degree") and level <= POWER:
            self.at += 1
            if t == "!":
                return ("!!" if self.accept("!") else "!", tree)
            if t == "'":                             # y' is a name; behind a number: minutes, dropped as units are
                return ("v", tree[1] + "'") if tree[0] == "v" else tree
            # a degree sign is dropped too, except in a trigonometric function
            return ("/", ("*", tree, ("c", "pi")), ("n", Fraction(180))) if self.in_trig else tree
        if t in ("*", "/") and level <= PRODUCT:
            self.at += 1
            return (t, tree, self.tree(POWER))
        if t in ("+", "-") and level <= SUM:
            self.at += 1
            term = self.tree(PRODUCT)
            return ("+", *(tree[1:] if tree[0] == "+" else [tree]), term if t == "+" else negative(term))
        if level <= PRODUCT and self.starts_factor():
            if is_number(t) and is_number(self.peek(-1)):
                raise Unparsed("two numbers side by side")
            return ("*", tree, self.tree(POWER))
        return None

    def starts_factor(self):
        t = self.peek()
        return t[:1].isalnum() or t in ATOMS or is_number(t) or t == "|" and not self.in_bars

    def group(self, open_):
        """Inside of a bracket pair whose opening token was just taken."""
        outer, self.in_bars = self.in_bars, open_ == "|"
        tree = self.tree()
        if open_ == "{" and self.accept("\\choose"):
            tree = ("binom", tree, self.tree())
        self.in_bars = outer
        self.take("|" if open_ == "|" else OPEN[open_])
        return tree

    def argument(self, whole_number=False):
        r"""Of \frac, \binom, \sqrt: a group, else one digit or symbol as TeX reads it (but \sqrt12 is \sqrt{12})."""
        t = self.peek()
        if t.isdigit() and len(t) > 1 and not whole_number:
            self.tokens[self.at] = t[1:]
            return number(t[0])
        if is_number(t):
            return number(self.take())
        return self.group(self.take()) if t == "{" else self.tree(ATOM)

    def primary(self):
        t = self.take()
        if is_number(t):
            return number(t)
        if t[0].isalpha() or t in GREEK:
            return self.symbol(t)
        if t in FUNCTIONS:
            return self.function(t[1:])
        if t in MARKS:
            return self.marked(t)
        if t not in PRIMARY:
            raise Unparsed(t)
        return PRIMARY[t](self)

    def root(self):
        index = self.group(self.take()) if self.peek() == "[" else TWO
        return ("root", self.argument(whole_number=True), index)

    def marked(self, mark):
        inner = self.argument()
        return inner if mark in (r"\vec", r"\overrightarrow", r"\overline", r"\underline") else ("v", f"{mark}{inner}")

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
        if end < 0:
            raise Unparsed("subscript")
        inside, self.at = self.tokens[self.at + 1:end], end + 1
        return "".join(t.lstrip('"') for t in inside)

    def function(self, name):
        r"""sin, log_2, ln^2 and the like with their argument; \sin^{-1} is the inverse."""
        base = power = None
        for _ in range(2):                       # in either order
            if base is None and name == "log" and self.accept("_"):
                base = self.argument(whole_number=True)
            elif power is None and self.accept("^"):
                power = self.tree(EXPONENT)
        trig = name in TRIG
        self.in_trig += trig
        args = self.function_arguments()
        self.in_trig -= trig
        if len(args) > 1 and name not in MANY_ARGUMENTS:
            raise Unparsed(name)
        if trig and power == negative(ONE):
            name, power = "arc" + name, None
        tree = ("^", ("c", "e"), *args) if name == "exp" else ("ln" if name in ("log", "lg") else name, *args)
        if base or name == "lg":
            tree = ("/", tree, ("ln", base or TEN))
        return tree if power is None else ("^", tree, power)

    def function_arguments(self):
        r"""A bracket, or the factors up to the next sign, function or bracket: \sin 2x \cos y."""
        if open_ := self.accept("{"):            # sympy prints \log{\left(3 \right)}^{2} for the square of log 3
            return [self.group(open_)]
        if open_ := self.accept("(", "["):
            args = [self.tree()]
            while self.accept(","):
                args.append(self.tree())
            self.take(OPEN[open_])
            return args
        tree = self.tree(POWER)
        while self.starts_factor() and self.peek() not in FUNCTIONS and self.peek() not in OPEN:
            tree = ("*", tree, self.tree(POWER))
        return [tree]

    def big(self, kind):
        r"""\sum_{k=a}^{b} body, \int_a^b body dx, \lim_{x \to a} body.  Only built; sympy evaluates."""
        low = high = var = None
        if self.accept("_"):
            if kind != "int" and self.accept("{"):
                var = self.primary()
                if not self.accept("=", "\\to", "\\rightarrow"):
                    raise Unparsed(kind)
                low = self.tree()
                self.take("}")
            else:
                low = self.tree(EXPONENT)
        if self.accept("^"):
            high = self.tree(EXPONENT)
        if kind != "int":
            body = self.tree(PRODUCT)
        else:
            end = max((i for i in range(self.at, len(self.tokens) - 4) if self.tokens[i] == "d"), default=None)
            if end is None:
                raise Unparsed(kind)
            body, self.at = Parser(self.tokens[self.at:end] or ["1"], self.depth).parse(), end + 1
            var = self.primary()
        if var is None or var[0] not in "vc" or kind in ("sum", "prod") and high is None:
            raise Unparsed(kind)
        bound = ("v", f"#{str(body).count('big')}")      # renamed: \sum_i and \sum_k are one tree
        return ("big", kind, bound, low, high, substitute(body, var, bound))


PRIMARY = {
    "(": lambda p: p.group("("), "[": lambda p: p.group("["), "{": lambda p: p.group("{"),
    "|": lambda p: ("abs", p.group("|")),
    "\\lfloor": lambda p: ("floor", p.group("\\lfloor")), "\\lceil": lambda p: ("ceil", p.group("\\lceil")),
    "\\frac": lambda p: ("/", p.argument(), p.argument()), "\\binom": lambda p: ("binom", p.argument(), p.argument()),
    "\\sqrt": Parser.root, "\\pi": lambda p: ("c", "pi"), "\\infty": lambda p: ("c", "inf"),
    "\\angle": lambda p: ("v", f"\\angle{p.tree(POWER)}"), "\\triangle": lambda p: ("v", f"\\triangle{p.tree(POWER)}"),
    "\\sum": lambda p: p.big("sum"), "\\prod": lambda p: p.big("prod"), "\\int": lambda p: p.big("int"),
    "\\lim": lambda p: p.big("lim"),
}
ATOMS = (GREEK | FUNCTIONS | MARKS | PRIMARY.keys()) - {"|"}


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
        op = t[0]
        if op == "v":
            names.add(t[1])
        elif op == "c" and t[1] in ("i", "inf"):
            flags.add(t[1])
        elif op not in ("n", "c"):
            flags |= {flag for flag, members in FLAGS.items() if op in members}
            stack += t[3:] if op == "big" else t[1:]
    return frozenset(names), frozenset(flags)


FLAGS = {"big": ("big",), "steps": STEPS, "integer": WHOLE_NUMBERS}


# ---- Tiers exact and numeric: the value of a tree

LOW, HIGH, MAX_DIGITS = 50, 120, 20_000      # digits to refute, to confirm, and at most
_mp_lock = threading.RLock()      # mpmath contexts and its cache of constants are not safe between threads


@functools.lru_cache(maxsize=None)           # under _mp_lock; at most MAX_DIGITS different ones
def context(digits):
    """A private mpmath context."""
    import mpmath                            # here, so that importing this file stays fast
    ctx = mpmath.mp.clone()
    ctx.dps = digits
    return ctx


def inexact(x, digits=LOW):
    return context(digits).mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def exact(*values):
    return all(isinstance(v, Fraction) for v in values)


def natural(x, limit):
    if not isinstance(x, Fraction) or x.denominator != 1 or x < 0:
        raise ValueError("not a natural number")
    if x > limit:
        raise Undecided("argument too large")
    return int(x)


def binomial(n, k):
    n, k = natural(n, 10 ** 9), natural(k, 10 ** 9)
    natural(Fraction(n - k), n)              # k > n: 0, but n!/(k!(n-k)!) is undefined there
    if min(k, n - k) * n.bit_length() > MAX_BITS:
        raise Undecided("binomial too large")
    return math.comb(n, k)


WHOLE_RULES = {
    "!": lambda n: math.factorial(natural(n, MAX_FACTORIAL)),
    "!!": lambda n: math.prod(range(natural(n, MAX_FACTORIAL), 0, -2)),
    "binom": binomial,
    "gcd": lambda *xs: math.gcd(*(natural(abs(x), 10 ** 100) for x in xs)),
    "lcm": lambda *xs: math.lcm(*(natural(abs(x), 10 ** 100) for x in xs)),
}
ARITHMETIC = {"+": operator.add, "*": operator.mul, "/": operator.truediv}
COMPARING = {"abs": abs, "max": max, "min": min}


class Evaluator:
    """Value of a tree: a Fraction while everything is rational, else a number of `ctx`.

    Every operation checks the size of its result before computing it, because a big-integer power or a
    factorial is one C call that neither a signal nor another thread can interrupt.
    """

    def __init__(self, digits, point=()):
        self.ctx, self.point = context(digits), point
        self.inexact = functools.partial(inexact, digits=digits)
        self.peak = 0                 # decimal digits before the point of the largest term of any sum

    def __call__(self, tree):
        op = tree[0]
        if op == "n":
            return tree[1]
        if op == "v":
            return self.point[tree[1]]
        if op == "c":
            if tree[1] == "inf":
                raise Unparsed("infinity in an expression")
            return {"pi": self.ctx.pi, "e": self.ctx.e, "i": self.ctx.j}[tree[1]] * 1
        if op == "big":
            raise Undecided("sum, product, integral or limit")
        values = [self(t) for t in tree[1:]]
        if op in ARITHMETIC:
            return self.arithmetic(op, values)
        if op == "^":
            return self.power(*values, real_root=tree[2][0] == "n" or not variables(tree[2])[0])
        if op in WHOLE_RULES:
            return Fraction(WHOLE_RULES[op](*values))
        if op in COMPARING:
            return COMPARING[op](*values)
        return getattr(self, op, functools.partial(self.elementary, op))(*values)

    def arithmetic(self, op, values):
        rational = exact(*values)
        if not rational:
            values = [self.inexact(v) for v in values]
            if op == "+":
                self.peak = max(self.peak, *(int(self.ctx.mag(v) * 0.302) for v in values if v))
        result = functools.reduce(ARITHMETIC[op], values)
        if rational and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
            raise Undecided("number too long")
        return result

    def power(self, base, exponent, real_root=True):
        if exact(exponent) and exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length()) if exact(base) else 1
            if abs(exponent) * size > MAX_BITS and base not in (0, 1, -1):
                raise Undecided("power too large")
            return base ** exponent.numerator
        if exact(base, exponent):
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
        if not exact(n) or n.denominator != 1 or not 0 < n < 1000:
            return self.power(x, 1 / n, False)
        if exact(x) and x >= 0 and n == 2:
            top, bottom = math.isqrt(x.numerator), math.isqrt(x.denominator)
            if (top * top, bottom * bottom) == (x.numerator, x.denominator):
                return Fraction(top, bottom)
        if n % 2 and not self.ctx.im(self.inexact(x)) and x < 0:
            return -self.root(-x, n)
        return self.ctx.root(self.inexact(x), int(n)) if x else Fraction(0)

    def floor(self, x):
        if exact(x):
            return Fraction(math.floor(x))
        if abs(x) > 1e30:
            raise Undecided("floor of a large number")
        near = int(self.ctx.nint(x))                 # log_2 8 comes out a hair below 3
        return Fraction(near if abs(x - near) < 1e-30 else int(self.ctx.floor(x)))

    def ceil(self, x):
        return -self.floor(-x)

    def ln(self, x):
        if x == 0:
            raise ZeroDivisionError
        return self.ctx.ln(self.inexact(x)) if x != 1 else Fraction(0)

    def elementary(self, name, x):
        x = self.inexact(x)
        if abs(x) > (1e6 if name.endswith("h") else 1e12):   # reducing the argument would need as many digits
            raise Undecided("argument too large")
        return getattr(self.ctx, name.replace("arc", "a"))(x)


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


# ---- Are two expressions equal?

# Sample points.  Positive, of several magnitudes, with large odd denominators: far from any round number.
REAL_POINTS = [[Fraction(a + 197 * k * k + 71 * k, b) for k in range(40)] for a, b in
               ((389, 1013), (1741, 1019), (151, 1009), (4877, 1031), (23017, 1021), (71, 1033))]
INTEGER_POINTS = [[Fraction((a * k + b) % c + 1) for k in range(40)] for a, b, c in (
    (5, 6, 11), (3, 1, 7), (7, 17, 29), (11, 4, 13), (13, 44, 97), (1, 11, 41), (29, 5, 83), (17, 9, 19))]


def sample_points(names, flags):
    if len(names) > 40:
        raise Undecided("too many variables")
    rows = INTEGER_POINTS if "integer" in flags else REAL_POINTS + INTEGER_POINTS * ("steps" in flags)
    return [dict(zip(sorted(names), row)) for row in rows]


def infinite(tree):
    """+1 or -1 for an infinity, else 0."""
    return (tree == ("c", "inf")) - (tree == negative(("c", "inf")))


def gap(a, b, digits):
    """(difference, size, decimal digits before the point) of two (value, peak)."""
    (x, peak_x), (y, peak_y), ctx = a, b, context(digits)
    x, y = inexact(x, digits), inexact(y, digits)
    difference, size = abs(x - y), max(abs(x), abs(y))
    if not ctx.isfinite(difference):
        raise ZeroDivisionError
    return difference, size, max(peak_x, peak_y, int(ctx.mag(size) * 0.302) if size else 0)


def differ(a, b, point=None):
    r"""Do two Scalars differ (at a point)?

    A clear difference at 50 digits settles it.  Otherwise both are computed again with 120 digits more than
    their largest terms have, and the gap must be rounding noise: tiny, and shrinking with the precision.
    So neither e^{-200} passes for 0 nor 10^{99} + \sqrt2 for 10^{99}.
    """
    x, y = a.value(LOW, point), b.value(LOW, point)
    if exact(x[0], y[0]):
        return x[0] != y[0]
    rough, size, peak = gap(x, y, LOW)
    if peak < 25 and rough > 1e-8 * size and size > 1e-25:       # half of the 50 digits are to spare
        return True
    digits = HIGH if peak < 25 else HIGH + peak
    if digits > MAX_DIGITS:
        raise Undecided("too many digits")
    sharp, size, _ = gap(a.value(digits, point), b.value(digits, point), digits)
    ten = context(digits).mpf(10)
    noise = ten ** (max(peak, 0) - digits + 15)
    return sharp > ten ** (15 - digits) * size and not (sharp <= noise and (rough == 0 or sharp <= rough * ten ** -40))


def same_symbolic(a, b):
    """Equal at every sample point where the gold b is defined; an answer undefined there is different."""
    flags, usable = a.flags | b.flags, 0
    needed = 8 if "steps" in flags else 3
    points = sample_points(a.names | b.names, flags)
    for real in (True, False):        # off the real domain the branches of roots differ: last resort only
        for point in points:
            try:
                gold = b.value(LOW, point)[0]
            except (ArithmeticError, ValueError):
                continue
            if real != ("i" in flags or exact(gold) or not context(LOW).im(gold)):
                continue
            if differ(a, b, point):
                return False
            usable += 1
            if usable == needed:
                return True
    if usable < (1 if "integer" in flags else 2):
        raise Undecided("no point where both are defined")
    return True


def same_value(a, b):
    with _mp_lock:
        try:
            return same_symbolic(a, b) if a.names | b.names else not differ(a, b)
        except (ArithmeticError, ValueError):
            return False


def same_scalar(a, b):
    """a the answer, b the gold.  Raises Undecided when only sympy could tell."""
    if a.tree == b.tree:
        return True
    if infinite(a.tree) or infinite(b.tree):
        return infinite(a.tree) == infinite(b.tree)
    if "inf" in a.flags or "big" in a.flags and "big" not in b.flags:
        return False                         # the problem restated is not its answer
    try:
        return same_value(a, b)
    except Undecided:
        if "big" in b.flags:
            return ask_sympy(a, b)
        opaque = hide_towers(b.tree)
        if opaque == b.tree:                 # only the answer is beyond the bounds, so it is wrong
            raise
        return same_value(Scalar(hide_towers(a.tree)), Scalar(opaque))


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


def proportional(a, b):
    """The constant factor between two expressions that must be zero, or None: a(x) b(p) = b(x) a(p) for all x."""
    if a.names != b.names or not a.names:
        return None
    for point in sample_points(a.names, a.flags | b.flags):
        at_a, at_b = (functools.reduce(lambda t, n: substitute(t, ("v", n), ("n", point[n])), s.names, s.tree)
                      for s in (a, b))
        try:
            with _mp_lock:
                x, y = Scalar(at_a).value()[0], Scalar(at_b).value()[0]
        except (ArithmeticError, ValueError):
            continue
        if x and y:
            equal = same_value(Scalar(("*", a.tree, at_b)), Scalar(("*", b.tree, at_a)))
            return (x / y if exact(x, y) else inexact(x) / inexact(y)) if equal else None
    return None


def is_literal(tree):
    """7, -7, 7/2: what a plain number looks like."""
    while tree[:2] == ("*", MINUS_ONE):
        tree = tree[2]
    return tree[0] == "n" or tree[0] == "/" and is_literal(tree[1]) and is_literal(tree[2])


def is_unfinished(tree):
    r"""37*41 or 3+4 for a plain number, while 2^{10}, 8.7*10^8 and \binom52 are accepted ways to write one."""
    def arithmetic(t):
        return t[0] == "n" or t[0] in ARITHMETIC and all(map(arithmetic, t[1:]))
    return arithmetic(tree) and not is_literal(tree)


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
        """One line; OSError when time is up or the worker died."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0)
            ready = select.select([self.process.stdout], [], [], left)[0]
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                raise OSError("no answer")
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
                return json.loads(self.read(seconds))
            except (OSError, ValueError):
                self.stop()
                return None

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            try:
                self.process.stdin.close()
            except OSError:              # a job it never read
                pass
            self.process = None


_sympy = Worker("sympy")
_used = threading.local()             # did this thread's verdict need sympy?
atexit.register(lambda: _sympy.stop())


def _after_fork():
    """A fork may happen while another thread holds a lock, and the child must not share the worker's pipes."""
    global _mp_lock, _counter_lock, _sympy
    _mp_lock, _counter_lock, _sympy = threading.RLock(), threading.Lock(), Worker("sympy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def plain(tree):
    """A tree as JSON has it: Fractions become text."""
    return json.loads(json.dumps(tree, default=str))


def ask_sympy(a, b):
    verdict = _sympy.ask([plain(a.tree), plain(b.tree)], SYMPY_SECONDS)
    if verdict is None:
        count("timeout")
        raise Undecided("sympy timeout")
    _used.sympy = True
    return verdict


SYMPY_NAMES = table("!=factorial !!=factorial2 binom=binomial ceil=ceiling abs=Abs ln=log max=Max min=Min +=Add *=Mul "
                    "^=Pow sum=Sum prod=Product int=Integral")


def sympy_tree(node, sp):
    """The sympy expression of a JSON tree.  Built node by node: sympy never sees a string to parse."""
    op = node[0]
    if op == "n":
        return sp.Rational(*map(int, node[1].split("/")))
    if op == "v":
        return sp.Symbol(node[1], positive=True)
    if op == "c":
        return {"pi": sp.pi, "e": sp.E, "i": sp.I, "inf": sp.oo}[node[1]]
    if op == "big":
        var, low, high, body = (t and sympy_tree(t, sp) for t in node[2:])
        if node[1] == "lim":
            return sp.Limit(body, var, low).doit()
        return getattr(sp, SYMPY_NAMES[node[1]])(body, var if low is None else (var, low, high)).doit()
    parts = [sympy_tree(t, sp) for t in node[1:]]
    if op == "/":
        return parts[0] / parts[1]
    if op == "root":
        return parts[0] ** (1 / parts[1])
    return getattr(sp, SYMPY_NAMES.get(op) or op.replace("arc", "a"))(*parts)


def prove_equal(job):
    """Equal after sympy's canonical ordering, or with the difference simplified to 0."""
    import sympy as sp
    a, b = (sympy_tree(t, sp) for t in job)
    return bool(a == b or sp.expand(a - b) == 0 or sp.simplify(a - b) == 0)


def worker_main(kind):
    """Serve jobs until the input closes."""
    sys.path.pop(0)                    # a random.py next to this file must not shadow the library
    serve = {"sympy": prove_equal, "grade": grade_chunk}[kind]
    if kind == "sympy":
        __import__("sympy")            # slow, so it happens before `ready`, outside any job's time
    print("ready", flush=True)
    for line in sys.stdin:
        limit_process(kind)
        try:
            result = serve(json.loads(line))
        except Exception:              # whatever sympy raises, the pair is not shown to be equal
            result = False
        print(json.dumps(result), flush=True)


def limit_process(kind):
    """The kernel enforces memory and CPU limits too, should the parent be gone."""
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
    list      [Node]                  unordered
    tuple     (label, [Node])         ordered; the label is the brackets, ':' or the size of a matrix
    real      [(Cut, Cut)]            union of intervals and points
    relation  ([op], [Scalar])        chain of = < <= ... between scalars
    assign    (name, Node)            x=5, f(x)=2x, (p,q)=(3,2)
    base      (digits, base)
    """
    kind: str
    value: object
    words: tuple = ()        # what was dropped behind a number: units and the like
    key: str = ""            # letters only, for comparing with text


RELATIONS = {"=": "=", "\\equiv": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!="}
FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
SEPARATORS = frozenset([",", ";", "\\and", "\\or"])
NAME_STARTS = GREEK | FUNCTIONS | MARKS | {"\\angle", "\\triangle", "\\frac", "|"}


def split(tokens, separators):
    """Split at bracket depth 0 (bars do not nest).  Returns parts and the separators between them."""
    parts, found, depth, start = [], [], 0, 0
    for i, t in enumerate(tokens):
        depth += (t in OPEN) - (t in CLOSE)
        if depth < 0:
            raise Unparsed("unbalanced")
        if depth == 0 and t in separators:
            parts.append(tokens[start:i])
            found.append(t)
            start = i + 1
    if depth:
        raise Unparsed("unbalanced")
    if len(parts) >= MAX_ITEMS:
        raise Unparsed("too many elements")
    return parts + [tokens[start:]], found


def build(tokens, depth=0):
    """Tokens to a Node, outermost structure first."""
    tokens = unwrap(list(tokens))
    if not tokens or depth > 20:
        raise Unparsed("empty")
    parts, found = split(tokens, SEPARATORS)
    return build_list(parts, found, depth) if found else build_element(tokens, depth)


def build_list(parts, found, depth):
    """Elements between commas and and/or.  Only `, and` may leave an empty part."""
    items = []
    for i, part in enumerate(parts):
        if not part and 0 < i < len(parts) - 1 and found[i - 1] in (",", ";") and found[i] in ("\\and", "\\or"):
            continue
        node = build(part, depth + 1)
        items += node.value if node.kind == "list" and {"\\pm", "\\mp"} & set(part) else [node]
    sets = [pieces(n) if n.kind in ("real", "relation") else None for n in items]
    if None in sets or len({n.words for n in items}) > 1:
        return Node("list", items)
    # x < -4 or x > 4 is a union; x > 2, x < 5 an intersection unless that is empty
    both = [] if "\\or" in found else functools.reduce(intersection, sets)
    return Node("real", both or union(itertools.chain(*sets)), items[0].words)


def build_element(tokens, depth):
    """What has no comma at the top, tried from the outside in: braces, signs, relations, sets, brackets, values."""
    enclosed = match_at(tokens, 0) == len(tokens) - 1
    if enclosed and tokens[0] == "\\{":
        return build_braces(tokens, depth)
    if "\\pm" in tokens or "\\mp" in tokens:
        return build_plus_minus(tokens, depth)
    if "\\approx" in tokens:                 # \frac13 \approx 0.33: the exact side counts; x \approx 5 is x = 5
        left = split(tokens, ("\\approx",))[0][0]
        tokens = tokens[1:] if not left else left if not is_name(left) else \
            ["=" if t == "\\approx" else t for t in tokens]
    present = set(tokens)
    if present & (RELATIONS.keys() | {"\\in"}) and (
            "\\cup" not in present or present & {"\\in", "="}):        # not -1 < x < 0 \cup 1 < x < 2
        parts, found = split(tokens, {*RELATIONS, "\\in"})
        if found:
            return build_relation(parts, found, depth)
    if present & {"\\cup", "\\cap", "\\setminus", "\\mathbb"}:
        found = build_set(tokens, depth)
        if found is not None:
            return Node("real", found)
    if enclosed and tokens[0] in ("(", "[", "\\langle"):
        node = build_tuple(tokens, depth)
        if node is not None:
            return node
    if tokens == ["\\emptyset"]:
        return Node("list", [])
    return build_matrix(tokens) if "\\begin" in present else build_scalar(tokens)


def build_plus_minus(tokens, depth):
    r"""a \pm b is two values; independent signs multiply, unless a \mp or a bracket ties them together."""
    places = [i for i, t in enumerate(tokens) if t in ("\\pm", "\\mp")]
    tied = "\\mp" in tokens or tokens[0] in ("(", "[") and "," in tokens
    if len(places) > (20 if tied else 3):
        raise Unparsed("too many signs")
    items = []
    for signs in [(0,) * len(places), (1,) * len(places)] if tied else itertools.product((0, 1), repeat=len(places)):
        variant = list(tokens)
        for i, sign in zip(places, signs):
            variant[i] = "+-"[sign ^ (variant[i] == "\\mp")]
        items.append(build_element(variant, depth + 1))
    return Node("list", items)


def build_braces(tokens, depth):
    inside = tokens[1:-1]
    if tokens[-1] != "\\}":
        raise Unparsed("braces")
    if not inside:
        return Node("list", [])
    for bar in ("|", ":"):
        parts, found = split(inside, (bar,))
        if len(found) == 1 and is_name(parts[0][:1]) and any(t in RELATIONS for t in parts[1]):
            return build(parts[1], depth + 1)        # \{x \mid x > 2\}
    node = build(inside, depth + 1)
    return node if node.kind == "list" and (split(inside, SEPARATORS)[1] or "\\pm" in inside) else Node("list", [node])


def build_tuple(tokens, depth):
    """(a,b), [a,b); None if the brackets only group."""
    inside = tokens[1:-1]
    parts, found = split(inside, (",", ";"))
    if found:
        return Node("tuple", (tokens[0] + tokens[-1], [build(p, depth + 1) for p in parts]))
    if inside[:1] == ["\\begin"] and match_at(inside, 0) >= len(inside) - 4:
        return build_matrix(inside)
    return None


def build_matrix(tokens):
    r"""[factor] \begin{xmatrix} ... \end{xmatrix}; the bracket style does not matter, a determinant is not a matrix."""
    start = tokens.index("\\begin")
    end, name_end, factor = match_at(tokens, start), match_at(tokens, start + 1), tokens[:start]
    name = "".join(tokens[start + 2:name_end])
    inside, rest = tokens[name_end + 1:end], tokens[end + 1:]
    if name not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array") or \
            rest[:1] != ["{"] or match_at(rest, 0) != len(rest) - 1 or factor[-1:] in (["("], ["["]):
        raise Unparsed("environment " + name)
    if name == "array" and inside[:1] == ["{"]:
        inside = inside[match_at(inside, 0) + 1:]
    grid = [[parse_scalar(cell) for cell in split(row, ("&",))[0]] for row in split(inside, ("\\\\",))[0] if row]
    if not grid or len({len(row) for row in grid}) != 1:
        raise Unparsed("ragged matrix")
    cells = list(itertools.chain(*grid))
    if factor:
        scale = MINUS_ONE if factor == ["-"] else Parser(factor[:-1] if factor[-1] == "*" else factor).parse()
        cells = [Node("scalar", Scalar(("*", scale, cell.value.tree))) for cell in cells]
    return Node("tuple", (f"matrix of {len(grid)} rows", cells))


def bare(tokens, brackets="(){}"):
    r"""The text without brackets or braces: m_{\max} and m_\max, f(x) and f( x ) are one name."""
    return "".join(t.lstrip('"') for t in tokens if t not in brackets)


def is_name(tokens):
    r"""May this be the left side of `name = value`?  x, f(x), AB, (p,q), \frac{NO}{BO}, words; never x+y or 2x."""
    if not 0 < len(tokens) <= 24 or any(t in "+-*/!^" or t in ("\\le", "\\ge") for t in tokens):
        return False
    if all(t[0] == '"' or t in "()" for t in tokens):
        return True
    tokens, depth = re.sub(r" _ (?:\{[^{}]*\}|[^ ]+)", "", " ".join(tokens)).split(), 0
    for t in tokens:
        depth += (t in OPEN) - (t in CLOSE)
        if t[0] in DIGITS and (depth == 0 or tokens[0] == "\\frac"):
            return False
        if t[0].isalpha() and len(t) > 1 and not t.isupper():
            return False
    if tokens[0] == "(" or tokens[1:2] == ["("]:
        return True
    symbols = [t for t in tokens if t[0].isalpha() or t[0] == '"']
    if len(symbols) > 1 and not all(t.isupper() for t in symbols if t[0] != '"'):
        return "(" in tokens and tokens[0] in FUNCTIONS
    return tokens[0][0].isalpha() or tokens[0] in NAME_STARTS


def build_relation(parts, found, depth):
    """x \\in S, an inequality, a chain of them, or an equation."""
    ops = [RELATIONS.get(t, t) for t in found]
    if not all(parts) or "\\in" in ops and (len(ops) > 1 or not is_name(parts[0])):
        raise Unparsed("relation")
    if "\\in" in ops:
        name, node = bare(parts[0], "{}"), build(parts[1], depth + 1)
        interval = pieces(node) if node.kind in ("tuple", "real") else None
        return Node("assign", (name, node)) if interval is None else Node("real", interval, (name,))
    return build_equation(parts, depth) if set(ops) == {"="} else Node("relation", (ops, [side(p) for p in parts]))


def side(tokens):
    return Scalar(Parser(strip_units(tokens)[0]).parse())


def build_equation(parts, depth):
    """name = value, value = name, a = b = 5, 2*3 = 6, or a true equation."""
    if len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]):
        parts = parts[::-1]
    first = next((i for i, p in enumerate(parts[:-1]) if not is_name(p)), len(parts) - 1)
    names, parts = [bare(p, "{}") for p in parts[:first]], parts[first:]
    if len(parts) > 1:
        sides = [side(p) for p in parts]
        if any(s.names for s in sides):
            if names or len(parts) > 2:
                raise Unparsed("chain of equations")
            return Node("relation", (["="], sides))
        if not all(same_scalar(s, sides[-1]) for s in sides[:-1]):
            raise Unparsed("a false equation")
    node = build(parts[-1], depth + 1)
    return Node("assign", ("=".join(names), node)) if names else node


def strip_units(tokens):
    """(tokens, words dropped).  Words behind a value are dropped, with powers and slashes, unless they change it."""
    for k in range(1, len(tokens) if tokens[-1] != "\\degree" else 0):
        t = tokens[k]
        if t[0] == '"' or t[0].isalpha() and (len(t) > 3 or len(t) > 1 and t.lower() in UNITS
                                              or t in "CFK" and tokens[k - 1] == "\\degree"):
            words = unit_words(tokens[k:])
            if words is not None:
                return (tokens, ()) if MEANINGFUL & set(words) else (tokens[:k], words)
    return tokens, ()


def unit_words(tokens):
    """The words of `km/h`, `cm^{-2}`, `square feet`; None if there is anything else."""
    text = " ".join(t.lstrip('"').lower() for t in tokens)
    text = re.sub(r"\^ (?:[0-9]+(?: |$)|\{ (?:- )?[0-9]+ \})", "", text)
    plain = re.fullmatch(r"(?:(?:[a-z][^ ]*|[/*().])(?: +|$))*", text)
    return tuple(re.findall(r"[a-z][^ ]*", text)) if plain else None


def letter_key(tokens):
    r"""`(C)`, `\text{C}` and `C` in one form; empty if there is more than letters."""
    key = bare(tokens).lower()
    return key if key.replace("-", "").replace("'", "").isalpha() else ""


def parse_scalar(tokens):
    return Node("scalar", Scalar(Parser(tokens).parse()))


def build_scalar(tokens):
    """A number, an expression, a ratio, a number in a base, or words."""
    parts, found = split(tokens, (":",))
    if found:
        parts[-1], words = strip_units(parts[-1] or [""])
        return Node("tuple", (":", [parse_scalar(p) for p in parts]), words)
    if "_" in tokens and (node := build_base(tokens)):
        return node
    prose = len(tokens) > 1 and all(t.isalpha() for t in tokens) and max(map(len, tokens)) > 3   # infinitely many
    quoted = any(t[0] == '"' for t in tokens)
    if prose or quoted and all(t[0] == '"' or t in "().!?{}" or t[0].isalpha() for t in tokens):
        words = " ".join(t.lstrip('"').lower() for t in tokens if t[0] == '"' or t[0].isalpha())
        return Node("text", words, (), letter_key(tokens))
    value, words = strip_units(tokens)
    try:
        node = parse_scalar(value)
    except Unparsed:
        if quoted:                                   # "October 30": equal to the same words only
            return Node("text", " ".join(tokens).replace('"', ""))
        raise
    if words and node.value.names and not UNITS.issuperset(words):
        raise Unparsed("words behind an expression")
    return node._replace(words=words, key=letter_key(tokens))


def build_base(tokens):
    """2516_8, 2516_{8}, (1001)_2."""
    digits, _, base = bare(tokens).partition("_")
    numeral = re.fullmatch(r"(-?)0*([0-9][0-9A-Fa-f.]*|[0-9A-Fa-f.]*[0-9])", digits)
    if numeral and re.fullmatch(r"-?[0-9]{1,4}|[a-z]", base):
        return Node("base", (numeral[1] + numeral[2].upper(), base))
    return None


# ---- Sets of real numbers

class Cut(NamedTuple):
    """A place between real numbers, just before or just after one: [1, 2) runs from before 1 to before 2.

    So open and closed ends need no case of their own: [0,1) and [1,2] touch, (0,1) and (1,2) do not.
    """
    at: Scalar
    after: bool


START, END = Cut(Scalar(negative(("c", "inf"))), True), Cut(Scalar(("c", "inf")), False)


def position(scalar):
    """The number an end point is, as a Fraction, an infinite float or an mpf."""
    if sign := infinite(scalar.tree):
        return sign * math.inf
    if scalar.names:
        raise Unparsed("variable end point")
    value, _ = scalar.value()
    if not exact(value) and context(LOW).im(value):
        raise Unparsed("complex end point")
    return value


def order(p, q):
    """-1, 0 or 1 as the Cut p lies before, at or after q."""
    x, y = position(p.at), position(q.at)
    if not exact(x, y) and not isinstance(x, float) and not isinstance(y, float):
        x, y = (0, 0) if same_scalar(p.at, q.at) else (inexact(x), inexact(y))
    return (x > y) - (x < y) or p.after - q.after


by_place = functools.cmp_to_key(order)


def union(intervals):
    """Sorted, and joined where they touch."""
    out = []
    for low, high in sorted(intervals, key=lambda interval: by_place(interval[0])):
        if out and order(low, out[-1][1]) <= 0:
            low, last = out.pop()
            high = max(last, high, key=by_place)
        out.append((low, high))
    return out


def complement(intervals):
    edges = [START, *itertools.chain(*intervals), END]
    return [(low, high) for low, high in zip(edges[::2], edges[1::2]) if order(low, high) < 0]


def intersection(xs, ys):
    return complement(union(complement(xs) + complement(ys)))


def pieces(node):
    """The intervals of a tuple, union, finite set or single-variable relation; None if it is no set of reals."""
    try:
        if node.kind == "real":
            return node.value
        if node.kind == "relation":
            return solve(*node.value)
        if node.kind == "tuple" and node.value[0] in ("()", "[)", "(]", "[]"):
            (open_, close), (low, high) = node.value[0], (n.value for n in node.value[1] if n.kind == "scalar")
            interval = Cut(low, open_ == "("), Cut(high, close == "]")
            return [interval] if order(*interval) < 0 else None
        if node.kind == "list" and all(n.kind == "scalar" for n in node.value):
            return union((Cut(n.value, False), Cut(n.value, True)) for n in node.value)
    except REFUSALS:
        pass
    return None


def solve(ops, sides):
    """A chain such as 1 < x <= 2.  Only solved relations count: `2x + 1 < 5` restates a problem."""
    names = frozenset().union(*(s.names for s in sides))
    if len(names) != 1 or set(ops) == {"="}:
        return None
    result = [(START, END)]
    for op, left, right in zip(ops, sides, sides[1:]):
        result = intersection(result, half_line(op, left, right, *names))
    return result


def half_line(op, left, right, name):
    if left.tree != ("v", name):
        left, right, op = right, left, FLIP[op]
    if left.tree != ("v", name) or right.names:
        raise Unparsed("not solved")
    if end := infinite(right.tree):
        if end == {"<": 1, "<=": 1, ">": -1, ">=": -1}.get(op):
            return [(START, END)]
        raise Unparsed("infinity")
    before, after = Cut(right, False), Cut(right, True)
    return {"<": [(START, before)], "<=": [(START, after)], ">": [(after, END)], ">=": [(before, END)],
            "=": [(before, after)], "!=": [(START, before), (after, END)]}[op]


def build_set(tokens, depth):
    r"""\cup, \cap and \setminus of intervals and finite sets, left to right; None if it is something else."""
    parts, found = split(tokens, ("\\cup", "\\cap", "\\setminus"))
    result = []
    for op, part in zip(["\\cup", *found], parts):
        if bare(part, "{}") == "\\mathbbR":
            intervals = [(START, END)]
        elif part == ["\\emptyset"]:
            intervals = []
        elif not found or not part:
            return None
        elif (intervals := pieces(build_element(unwrap(part), depth + 1))) is None:
            raise Unparsed("union of other things")
        if op == "\\cap":
            result = intersection(result, intervals)
        elif op == "\\setminus":
            result = intersection(result, complement(intervals))
        else:
            result = union(result + intervals)
    return result


# ---- Comparing two Nodes.  a is always the answer, b the gold.

def same(a, b):
    """Do two Nodes say the same?  What is of another kind is different, except where a convention joins kinds."""
    kinds = {a.kind, b.kind}
    x, y = set(a.words), set(b.words)
    if not (x <= UNITS and y <= UNITS or x <= y or y <= x) and x and y:
        return False                     # nothing is converted, so units never conflict; odd does not fit even
    if "assign" in kinds:
        return same_assign(a, b)
    if kinds == {"text"}:
        return a.value == b.value
    if "text" in kinds or b.key and b.key in "abcdefgh" and b.value.tree == ("v", b.key.upper()):
        return bool(a.key) and a.key == b.key        # a choice: `b` may stand for B, but not B for a variable b
    if "list" in kinds and "real" not in kinds:
        return same_list(a, b)
    if kinds == {"scalar"}:
        return same_scalar(a.value, b.value)
    if kinds == {"tuple"}:
        (label, xs), (gold_label, ys) = a.value, b.value
        return label == gold_label and len(xs) == len(ys) and all(map(same, xs, ys))
    if kinds == {"base"}:
        return a.value == b.value
    if kinds == {"relation"} and same_relation(a, b):
        return True
    xs, ys = pieces(a), pieces(b)
    return xs is not None and ys is not None and same_name(a, b) and same_pieces(xs, ys)


def same_name(a, b):
    """x > 2 is (2,oo), but not y > 2."""
    names = [set(n.words) if n.kind == "real" else set().union(*(s.names for s in n.value[1])) if n.kind == "relation"
             else set() for n in (a, b)]
    return not all(names) or names[0] == names[1]


def same_pieces(xs, ys):
    return len(xs) == len(ys) and all(p.after == q.after and same_scalar(p.at, q.at)
                                      for x, y in zip(xs, ys) for p, q in zip(x, y))


def zero_form(node):
    """lhs - rhs of an equation, if it is one between scalars."""
    if node.kind == "relation" and node.value[0] == ["="]:
        return Scalar(minus(*(s.tree for s in node.value[1])))
    name, value = node.value if node.kind == "assign" else ("", node)
    if re.fullmatch(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_.+)?'*", name) and value.kind == "scalar":
        return Scalar(minus(value.value.tree, ("v", name)))
    return None


def same_assign(a, b):
    """x=5 against x=5, against 5, or against another equation."""
    if a.kind == b.kind and a.value[0] == b.value[0]:
        return same(a.value[1], b.value[1])
    x, y = zero_form(a), zero_form(b)
    if x is not None and y is not None:
        return proportional(x, y) is not None
    if a.kind == b.kind:
        return same_function(*a.value, *b.value)
    left, right = (n.value[1] if n.kind == "assign" else n for n in (a, b))
    if "relation" in (a.kind, b.kind) or is_quantity(left if a.kind == "assign" else right):
        return False                     # SRAC = LRAC is a statement, its right side alone says nothing
    return same(left, right)


def is_quantity(node):
    """A product of capitals or words, such as PV or LRAC."""
    if node.kind != "scalar" or not node.value.names:
        return False
    return all(n.isupper() or len(n) > 3 for n in node.value.names) and \
        set(re.sub(r"[(),']", " ", str(node.value.tree)).split()) <= {"*", "v", *node.value.names}


def same_function(name, value, gold_name, gold):
    """y = x+1 and f(x) = x+1 define one function."""
    return "y" in (name, gold_name) and all(re.fullmatch(r"y|[A-Za-z]\([a-z]\)", n) for n in (name, gold_name)) and \
        gold.kind == "scalar" and bool(gold.value.names) and same(value, gold)


def same_relation(a, b):
    """Chains term by term, or one relation up to a factor, whose sign turns an inequality round."""
    (ops, xs), (gold_ops, ys) = a.value, b.value
    for o, s in ((ops, xs), ([FLIP[x] for x in reversed(ops)], xs[::-1])):
        if o == gold_ops and all(map(same_scalar, s, ys)):
            return True
    if len(ops) != 1 or len(gold_ops) != 1 or pieces(b) is not None:
        return False                     # x < 2 is asked for: 3x - 6 < 0 is the problem, not the answer
    factor = proportional(*(Scalar(minus(*(t.tree for t in s))) for s in (xs, ys)))
    if factor is None or ops[0] in ("=", "!="):
        return factor is not None and ops == gold_ops
    if not exact(factor) and context(LOW).im(factor):
        return False
    return (ops[0] if factor > 0 else FLIP[ops[0]]) == gold_ops[0]


def elements(node):
    """Elements of a list, without a name that all of them share (`x=1, x=2` or `x=1, 2`)."""
    if node.kind == "assign" and node.value[1].kind == "list":
        return node.value[0], node.value[1].value
    items = node.value if node.kind == "list" else [node]
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
        found = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if found is None:
            return False
        del rest[found]
    return True


# ---- Public interface

@functools.lru_cache(maxsize=20_000)
def read(text):
    """(tokens, Node) of a text; None for what is outside the grammar."""
    tokens = None
    try:
        tokens = tokenize(text) or None
        return tokens, tokens and build(tokens)
    except REFUSALS:
        return tokens, None


PLAIN_INTEGER = re.compile(r"(-?)([0-9]+)")          # no optional parts side by side: matching stays linear


def compare(answer, gold):
    """(equal, tier, reason) for two texts: the tiers in their order."""
    m, g = PLAIN_INTEGER.fullmatch(answer.strip()), PLAIN_INTEGER.fullmatch(gold.strip())
    if m and g:
        digits, gold_digits = m[2].lstrip("0"), g[2].lstrip("0")
        return result(digits == gold_digits and (m[1] == g[1] or not digits), "integer")
    (tokens, a), (gold_tokens, b) = read(answer), read(gold)         # cached: a gold is read once
    if tokens == gold_tokens is not None:
        return result(True, "same")
    if b is None or a is None:
        return False, "parse", "unparsed_gold" if b is None else "unparsed_answer"
    kinds = {a.kind, b.kind}
    tier = "text" if "text" in kinds else "numeric" if kinds == {"scalar"} else "structure"
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
    except REFUSALS:
        return False, tier, "not comparable"
    if tier == "numeric" and not a.value.names | b.value.names:
        rational = all(exact(n.value.cache.get(LOW, [None])[0]) for n in (a, b))
        tier = "exact" if rational or a.value.tree == b.value.tree else tier
    return result(equal, "sympy" if _used.sympy else tier)


def result(equal, tier):
    return equal, tier, "equal" if equal else "different"


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
        verdict = strict_compare(answer, text) if strict else compare(answer, text)
        if verdict[0]:
            return verdict
        best = verdict if best[2] == "unparsed_gold" else best
    return best


def grade(answer, gold, strict=False):
    r"""Does `answer` (the text inside the box) equal `gold`?  Never raises; what cannot be read is wrong.

    `gold` is a text, a number, or a list of which any element counts.  `strict` gives the verdict of
    DeepScaleR's own grader.  The conventions, by example:

    >>> def check(right, *pairs):
    ...     assert all(grade(*pair) is right for pair in pairs), [pair for pair in pairs if grade(*pair) is not right]
    >>> check(True, (r"\dfrac12", "0.5"), (r"\left(\tfrac{1}{2}\right)", "1/2"), (r"$\boxed{\frac12}$.", r"\frac 12"))
    >>> check(True, ("3*sqrt(13)", r"3\sqrt{13}"), ("2π", r"2\pi"), (r"0.\overline{3}", "1/3"), (r"1\frac45", "9/5"))
    >>> check(False, ("3.14", r"\pi"), ("0.33", r"\frac13"), ("10001", "10000"))             # no tolerance
    >>> check(True, (r"1,\!000", "1000"), ("1{,}000", r"1\,000"), ("025", "25"), ("142", 142.0), ("8e7", r"8\cdot10^7"))
    >>> check(True, (r"50\%", "50"), (r"90^\circ", "90"), (r"\$36", r"36 \text{ dollars}"), (r"5 \text{ cm}^2", "5"))
    >>> check(False, ("0.5", r"50\%"), (r"5 \text{ million}", "5"), (r"\text{odd}", r"\text{even}"))
    >>> check(True, ("x=5", "5"), ("f(x)=2x", "2x"), ("(p,q)=(3,2)", "(3,2)"), ("y-3=2x", "y=2x+3"))
    >>> check(False, ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), ("(1,2]", "[1,2]"), (r"\{1,2\}", "(1,2)"), ("-y=x", "y=x"))
    >>> check(True, ("2, 1", r"\{1,2\}"), ("1 and 2", r"2 \text{ or } 1"), (r"3 \pm 1", "2, 4"), ("x=1, x=2", "1,2"))
    >>> check(False, ("5 or 6", "5"), ("4,5,6", "5"), ("1", "1,2"), ("1,2,3", "1,2"), (r"\pm 2", "2"))     # no hedging
    >>> check(True, ("x > 2", r"(2,\infty)"), (r"-2 \le x < 7", r"x \in [-2,7)"), (r"x<1 \text{ or } x>4",
    ...       r"(4,\infty)\cup(-\infty,1)"), (r"\mathbb{R}", r"(-\infty,\infty)"))
    >>> check(True, (r"-\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{bmatrix}-1&0\\0&-1\end{bmatrix}"),
    ...       (r"\textbf{(C)}", "C"), ("yes", r"\text{Yes}"), ("52_{8}", "52_8"), ("1 : 4", "1:4"))
    >>> check(False, ("52_9", "52_8"), ("4:1", "1:4"), ("2:8", "1:4"), ("B", r"\text{(C)}"))
    >>> check(True, ("(x+1)^2", "x^2+2x+1"), (r"\ln 4", r"2\ln 2"), (r"1-\sin^2 a", r"\cos^2 a"), (r"2^{10}", "1024"))
    >>> grade("6", ["5", "6"]), grade("6", None), grade("6", float("nan"))
    (True, False, False)
    """
    try:
        return isinstance(answer, str) and judge(answer, gold, strict)[0]
    except Exception:
        return False


def explain(response, gold, strict=False):
    r"""The `Verdict` on a whole response: reward, the tier that decided, why, the answer found, the gold.

    >>> explain(r"<think>...</think> \boxed{x+1}", r"1+x")
    Verdict(reward=1.0, tier='numeric', reason='equal', answer='x+1', gold='1+x')
    >>> explain(r"the answer is 5", "5").reason, explain("</think> 5", "5").reason
    ('no_close', 'no_box')
    """
    answer = strict_extract(response) if strict else extract_answer(response)
    if answer is not None:
        return explain_answer(answer, gold, strict)
    reason = "no_box" if isinstance(response, str) and "</think>" in response else "no_close"
    count(reason)
    return Verdict(0.0, "extract", reason, None, gold)


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


def compute_rewards(responses, golds, workers=None, strict=False):
    r"""Rewards of many responses, in order; from any thread, under fork and spawn.

    One process grades thousands a second, so `workers` (extra processes) pays only for very large files.
    Raises ValueError if the lengths differ: silently short rewards would train on the wrong rows.

    >>> compute_rewards([r"</think>\boxed{1}", r"</think>\boxed{2}"], ["1", "1"])
    [1.0, 0.0]
    """
    rows = list(zip(responses, golds, strict=True))
    if not workers or workers < 2:
        return [compute_reward(r, g, strict) for r, g in rows]
    graders = [Worker("grade") for _ in range(workers)]
    shares = [rows[i::workers] for i in range(workers)]
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        graded = list(threads.map(grade_remotely, graders, shares, itertools.repeat(strict)))
    return [graded[i % workers][i // workers] for i in range(len(rows))]


def grade_remotely(worker, rows, strict):
    """Grade rows in a worker; what cannot be sent (a gold that is no JSON) is graded here."""
    try:
        rewards, seen = worker.ask([rows, strict], 30 + len(rows)) or (None, {})
    except (TypeError, ValueError, RecursionError):
        rewards, seen = None, {}
    finally:
        worker.stop()
    with _counter_lock:
        counters.update(seen)
    return rewards or [compute_reward(r, g, strict) for r, g in rows]


def grade_chunk(job):
    """In the worker: the rewards of some rows, and their counters."""
    rows, strict = job
    reset_counters()
    return [compute_reward(response, gold, strict) for response, gold in rows], reset_counters()


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
    if rewritten(answer.strip(), MATHD) == rewritten(gold.strip(), MATHD):
        return True, "strict", "equal strings"
    a, b = prm800k(answer), prm800k(gold)
    if a == b or not a:
        return result(a == b, "strict")
    xs, ys = strict_elements(a), strict_elements(b)
    if len(ys) > 1 and (a[0], a[-1]) != (b[0], b[-1]) or len(xs) != len(ys):
        return result(False, "strict")
    try:
        return result(all(map(strict_element, xs, ys)), "strict")
    except REFUSALS:
        return False, "strict", "not comparable"


MATHD = compiled(
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"),
    (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", ""),
    (r"^((?:(?!\\text\{ ).)*)\\text\{ (?!.*\\text\{ ).*", r"\1"), (r"\\%", ""),
    (r" \.", " 0."), (r"\{\.", "{0."), (r"^\s*\.", "0."), (r"^\s*[^=]{0,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{\s])", r"\\sqrt{\1}"), (r" ", ""), (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"))
PRM800K = compiled(
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\\?[%$]", ""), (r" (?:or|and) ", " , "),
    (r"million", "*10^6"), (r"billion", "*10^9"), (r"trillion", "*10^12"),
    (r"(degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
     r"(es)?s? *(\^[0-9]+)?", ""),
    (r"\^ *\\circ|\^ *\{\\circ\}", ""), (r"^\{(.*)\}$", r"\1"), (r",\\!", ""))
PRM800K_END = compiled((r"- *", "-"), (r"([0-9]) +([0-9])", r"\1+\2"), (r"[ {}]", ""))
STRICT_SYMBOLS = table(r"\pi=pi \infty=inf \cup=u \cdot=* \times=* \le=≤ \ge=≥ \leq=≤ \geq=≥ \pm=± \in=∈ \not=≠")


def prm800k(text):
    """The prm800k normaliser.  LaTeX becomes plain text and braces go, which merges 9/(4 pi) with 9/4 pi."""
    text = rewritten(text.strip(), PRM800K)
    if is_integral(text):
        text = str(int(float(text)))
    if "\\" in text:
        text = strict_plain(text)
    text = rewritten(text, PRM800K_END).lower()
    return str(int(float(text.replace(",", "")))) if is_integral(strip_commas(text)) else text


def strip_commas(text):
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text)


def is_integral(text):
    try:
        return text.isascii() and abs(float(text) - round(float(text))) <= 1e-7
    except (ValueError, OverflowError):
        return False


PLAIN = compiled(
    (r"\\[td]?frac", r" \\frac"), (r"\\sqrt *\[[^\]]*\]", r"\\sqrt"),
    (r"\\frac *(?:\{([^{}]*)\}|([0-9a-z])) *(?:\{([^{}]*)\}|([0-9a-z]))", r"\1\2/\3\4"),
    (r"\\sqrt *(?:\{([^{}]*)\}|([0-9a-z]))", r"sqrt(\1\2)"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox) *\{([^{}]*)\}", r"\1"))


def strict_plain(text):
    r"""What pylatexenc prints: \frac{a}{b} as a/b, \sqrt{a} as sqrt(a), the index of a root lost."""
    text = rewritten(text, PLAIN[:2])
    for _ in range(20):                # innermost first; a bounded number of levels
        text = rewritten(text, PLAIN[2:])
    text = re.sub(r"\\[,;: ]", " ", text)
    return re.sub(r"\\([A-Za-z]+|.)", lambda m: STRICT_SYMBOLS.get(m[0], m[1] if m[0] in FUNCTIONS | GREEK else ""),
                  text).strip()


def strict_elements(text):
    text = strip_commas(text)
    return [e.strip() for e in text[1:-1].split(",")] if re.fullmatch(r"[(\[][^()\[\]]+[)\]]", text) else [text]


def strict_element(a, b):
    fraction = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
    if fraction.fullmatch(a) and fraction.fullmatch(b):
        return a == b
    if is_integral(strip_commas(a)) != is_integral(strip_commas(b)):
        return False
    both = f"({b})-({a})"
    found = {c for c in re.sub("sqrt|frac", "", both) if c.isalpha()}
    if len(found) > 2 or re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+", both):
        return False
    trees = [Parser(math_tokens(text)).parse() for text in (a, b)]
    for letter in "ei":                # lower-cased, both were plain symbols to the original
        trees = [substitute(tree, ("c", letter), ("v", letter)) for tree in trees]
    return same_scalar(*map(Scalar, trees))


# ---- Command line

def grade_file(path, strict):
    """Grade the rows of a file; print how many were decided where, and the speed."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = iter
    with open(path) as f:
        rows = [json.loads(line) for line in f if line.strip()]
    start, verdicts = time.perf_counter(), []
    for row in tqdm(rows):
        text = ["response", "answer"]["answer" in row and "response" not in row]
        verdicts.append((explain if text == "response" else explain_answer)(row[text], row["gold"], strict))
    seconds = time.perf_counter() - start
    for (tier, reason), n in collections.Counter((v.tier, v.reason) for v in verdicts).most_common():
        print(f"{n:8d}  {tier:10s} {reason}")
    print(f"{sum(v.reward for v in verdicts):.0f} of {len(rows)} right, {len(rows) / max(seconds, 1e-9):.0f} a second")


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
