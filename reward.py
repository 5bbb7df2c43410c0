r"""reward.py: is the last \boxed{} after </think> the right answer?  1.0 or 0.0, nothing in between.

    python reward.py --answer '\frac{2}{4}x' --gold 'x/2'    explain one verdict
    python reward.py FILE.jsonl                              grade rows of response or answer, gold, problem

The reward must not be exploitable, must be right and must be fast, in this order.  The way of an answer:

    extract    the last \boxed{...} after the last </think>      no fallback to free text: that pays hedging
    tokens     one spelling for everything LaTeX has many for    formatting never matters
    tree       a parser of our own, for lists and sets as well   model text never reaches eval or sympify
    value      exact while rational, else to 200 digits          no tolerance: 10001 is not 10000
    equality   by kind: values, words, lists, sets, equations    unordered, ordered, as sets, up to a factor
    sympy      what digits leave open: sums, tiny terms          in a process that can be killed
    public     grade, explain, compute_reward                    with two locks against restating the problem

The locks: a plain gold (7, 1/2, 3\sqrt2, \pi/4) wants a finished answer: 3+4 and \log_2 8 earn nothing for
it; an answer whose tokens stand in a row in the problem's own formulas earns nothing unless it is the gold.
Left out on purpose: tolerance, per cent as a factor (50% is not 0.5), unit conversion, answers outside a box.
Model output is hostile: every operation is bounded BEFORE it is done; what cannot be read earns nothing.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import select
import signal
import string
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction

MAX_CHARS = 4_000        # longer answers are refused unread; int(str) stays under Python's 4,300 digits, too
MAX_DEPTH = 60           # nesting, so that no input reaches Python's recursion limit
MAX_BITS = 60_000        # of any exact integer: 9^{9^9} would otherwise fill memory
PRECISION = 300          # digits of inexact numbers; what agrees to 200 of them is equal
SEEN_BITS = 600          # longer integers would lose digits among inexact numbers
SECONDS = 0.8            # for one comparison, sympy apart
SYMPY_SECONDS, ORPHAN_SECONDS, WORKER_BYTES = 1.0, 10, 2 << 30          # of the worker

# What `explain` returns.  reason: equal, different, restated, no_close, no_box, unparsed_answer,
# unparsed_gold, too_large, timeout, or "error: ...", which is a fault of this file and should alarm.
Verdict = collections.namedtuple("Verdict", "reward reason answer gold")


class Undecided(ValueError):
    """The value exists perhaps, but computing it would break a bound, or its digits do not decide."""


def refuse(when, why, error=ValueError):
    """The way out for what is outside the grammar, makes no sense or, as Undecided, breaks a bound."""
    if when:
        raise error(why)


# What reading or comparing raises on bad input, and nothing else: a name misspelt in this file shall surface.
REFUSALS = (ArithmeticError, ValueError, RecursionError)


# ---- extract: linear scans only, no backtracking

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
BOX = re.compile(r"\\boxed[ \t\n]*(?=\{)")
# What may stand between the boxes of one answer in several parts: punctuation and "and".
GLUE = re.compile(r"(?:[\s,;.:$*&]|\\[,;:! \[\]()\\]|\\q?quad\b|\\text\{[\s,]*(?:and)?[\s,]*\}|\band\b)*")


def braced(text, start):
    r"""What the \boxed at `start` holds and where it ends; nothing if it is not closed."""
    box, depth = BOX.match(text, max(start, 0)), 0
    for m in BRACE.finditer(text, box.end(), box.end() + MAX_CHARS + 2) if box else ():
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return text[box.end() + 1:m.start()].strip(), m.end()
    return "", 0


def last_boxes(response, require_think=True):
    r"""The boxes that end a response, one after another with only punctuation and "and" between them.

    Only what follows the last </think> counts.  An unclosed or empty last box is no answer, whatever stands
    before it: falling back would pay a model for hedging.

    >>> last_boxes(r"<think>\boxed{0}</think> \boxed{1}? So $\boxed{2}$, $\boxed{3}$ and $\boxed {4}$.")
    ['2', '3', '4']
    """
    _, close, text = response.rpartition("</think>") if isinstance(response, str) else ("", "", "")
    contents, end = [], len(text)
    while (close or not require_think) and len(contents) < 20:
        start = text.rfind("\\boxed", 0, end)
        content, after = braced(text, start)
        if not content or contents and (end - after > 40 or not GLUE.fullmatch(text, after, end)):
            break
        contents.insert(0, content)
        end = start
    return contents


def extract_answer(response, require_think=True):
    r"""The content of the last `\boxed{...}` after the last `</think>`, or None.

    >>> extract_answer(r"<think>\boxed{1}</think> so \boxed{2}, no: \boxed {\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    return (last_boxes(response, require_think) or [None])[-1]


# ---- tokens: strings, '12.5' number, '\\frac' command, 'a' letter, '"cm' word, or one other character

def table(text):
    return dict(pair.split("=", 1) for pair in text.split())


def words(text, plural=False):
    return frozenset(text.split()) | {word + "s" for word in text.split() if plural and len(word) > 2}


UNICODE = {ord(c): t + " " * t.startswith("\\") for c, t in table(r"""
    −=- –=- —=- ‐=- ‑=- ∗=* ∶=: ×=\times ·=\cdot ⋅=\cdot ∙=\cdot ÷=/ ⁄=/
    π=\pi °=\degree √=\sqrt ∞=\infty ∪=\cup ∩=\cap ∈=\in ≤=\le ≥=\ge ≦=\le
    ≧=\ge ⩽=\le ⩾=\ge ≠=\ne ≈=\approx ±=\pm ∓=\mp ∅=\emptyset ≡=\equiv
    ℝ=\mathbb{R} ℤ=\mathbb{Z} ℕ=\mathbb{N} ′=' ’=' 、=, 。=. θ=\theta α=\alpha
    β=\beta γ=\gamma λ=\lambda φ=\phi ω=\omega …=\ldots ㎝=\text{cm} ㎜=\text{mm}
    ㎞=\text{km} ㎏=\text{kg} ㎎=\text{mg} ㎖=\text{ml} ㏄=\text{ml} ㎡=\text{m}^2
    ㎠=\text{cm}^2 ㎢=\text{km}^2 ㎥=\text{m}^3 ㎤=\text{cm}^3 ℃=\degree ℉=\degree""").items()}
UNICODE |= dict.fromkeys(map(ord, "\u00a0\u2009\u202f\u3000€£¥￥¢₹₩₽"), " ")
UNICODE |= {0xfee0 + ord(c): c for c in string.ascii_letters + "()[]{}|<>=+-/.,:;%"}          # full width
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n"))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
ALIAS = table(r"""\dfrac=\frac \tfrac=\frac \cfrac=\frac \dbinom=\binom \tbinom=\binom \leq=\le \leqslant=\le
    \geq=\ge \geqslant=\ge \lt=< \gt=> \neq=\ne \cdot=* \times=* \ast=* \div=/ \colon=: \land=\and \wedge=\and
    \lor=\or \vee=\or \varnothing=\emptyset \lvert=| \rvert=| \vert=| \mid=| \lbrace=\{ \rbrace=\} \prime='
    \varphi=\phi \backslash=\setminus \langle=( \rangle=) \lbrack=[ \rbrack=] \lparen=( \rparen=) \dots=\ldots
    \cdots=\ldots \textdegree=\degree \varepsilon=\epsilon \rightarrow== \to== \equiv== \bmod=\pmod \mod=\pmod
    \sfrac=\frac \nicefrac=\frac \leqq=\le \geqq=\ge \tg=\tan \ctg=\cot \begin{aligned}=\begin{cases}
    \end{aligned}=\end{cases} \begin{dcases}=\begin{cases} \end{dcases}=\end{cases}""")
ALIAS |= dict.fromkeys(words(r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \middle \limits
    \biggl \biggr \Biggl \Biggr \displaystyle \textstyle \quad \qquad \, \! \; \: \> \( \) \[ \] \$ \% $ % ~ "
    \rm \bf \it \bm \boldsymbol \hline \angle \triangle \vec \phantom \mathrm \mathbf \text \pounds
    \ensuremath \fbox \large \Large""") | {"\\ ", "\\\n"}, "")
TRIG = words("sin cos tan cot sec csc")
FUNCTIONS = {"\\" + arc + name + h for arc in ("", "arc") for name in TRIG for h in ("", "h")} | words(
    r"\asin \acos \atan \asinh \acosh \atanh \ln \log \lg \exp \gcd \lcm \max \min")
NAMED = {c[1:]: c for c in FUNCTIONS | words(r"\sqrt \pi \infty \frac \binom \theta \alpha \beta \and \or")}
NAMED |= table(r"tg=\tan ctg=\cot arctg=\arctan cosec=\csc infinity=\infty Infinity=\infty times=*")
GREEK = words(r"""\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu \nu
    \xi \rho \sigma \tau \upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi
    \Omega \ell \hbar \mho \odot \partial \nabla""")
MARKS = words(r"\overrightarrow \overline \bar \hat \widehat \dot \ddot \tilde \underline \mathcal")
# A closed list: only these words may be dropped behind a value.
UNITS = words("""degree deg percent pct cent dollar usd yuan euro pound rupee yen unit square sq cubic cu cm
    mm km m dm nm mi inch inche in foot feet ft yard yd mile meter metre centimeter centimetre millimeter
    millimetre kilometer kilometre second sec s minute min hour hr h day week month year yr gram g kilogram kg
    mg lb ounce oz ton tonne liter litre L l ml milliliter gallon quart mph kmh kph per radian rad hz hertz
    khz mhz joule J kj cal kcal watt W kw newton N volt V ohm mol mole pa atm kelvin K C F celsius fahrenheit
    acre hectare mb gb kb byte bit rpm point pt people person student child children boy girl man men woman
    women adult worker player member team way piece item object thing apple orange ball marble coin book card
    ticket page word letter digit time number integer value solution root triangle rectangle circle side edge
    vertices face diagonal line region pair set subset group game trip car bus buses box boxes bag bottle
    chair table tile tree flower cat dog animal pen pencil candies cookie stamp block cube dice match matches
    element term factor divisor multiple function permutation combination arrangement distinct different total
    each apiece step move turn lap row column seat room house question problem decade century pint cup knot
    lbs hrs yds metric light amp ampere coulomb tesla pascal kwh penny pennies 平方厘米 立方厘米
    平方米 立方米 平方千米 平方公里 平方分米 立方分米 厘米 毫米 分米 千米
    公里 米 元 角 分 美元 个 人 名 位 只 本 张 次 种 台 辆 条 件 块 棵 天 日 周
    月 年 岁 小时 分钟 秒 时 度 千克 公斤 克 吨 升 毫升 支""", plural=True)
# Units of two or three letters that need neither \text nor a blank; other letters are a product.
SHORT_UNITS = words("cm mm km kg mg ml mL ft yd yds mi lb lbs oz hr hrs min sec mph kmh Hz kHz kJ kW pct")
COUNTS = table("""zero=0 one=1 two=2 three=3 four=4 five=5 six=6 seven=7 eight=8 nine=9 ten=10 eleven=11
    twelve=12 thirteen=13 fourteen=14 fifteen=15 sixteen=16 seventeen=17 eighteen=18 nineteen=19 twenty=20
    thirty=30 forty=40 fifty=50 sixty=60 seventy=70 eighty=80 ninety=90""")
FACTORS = {word + s: Fraction(text) for s in ("", "s") for word, text in table("""hundred=100 thousand=1000
    million=1e6 billion=1e9 dozen=12 trillion=1e12 half=1/2 halve=1/2 third=1/3 quarter=1/4 fourth=1/4
    fifth=1/5 sixth=1/6 seventh=1/7 eighth=1/8 ninth=1/9 tenth=1/10 hundredth=1/100 thousandth=1/1000
    millionth=1e-6 十=10 百=100 千=1000 万=1e4 亿=1e8""").items()}
# Words of a qualifier behind an answer.  Those of a domain change what is said.
DOMAINS = words("""integer whole real natural rational complexe complex odd even prime positive negative
    nonnegative non-negative nonzero non-zero""", plural=True)
QUALIFIERS = DOMAINS | {"\\" + word for word in DOMAINS} | {*string.ascii_letters} | words(r"""where for with
    is are being any all every each some an the arbitrary constant constants number numbers value values of in
    fixed \in \forall \and , ( )""")
PROSE = words("""all any every real number except excluding there solution root exist answer final option
    choice where for only the about approximately roughly empty set integer constant""", plural=True)
VOCABULARY = PROSE | QUALIFIERS | UNITS | FACTORS.keys() | COUNTS.keys() | {"no", "if", "other", "than"}
DIGITS = tuple("0123456789")                     # not str.isdigit: that is true of a superscript two
CLOCK = (r"(?<![\d:.])(?<!: )([01]?[0-9]|2[0-4])(?:\s*:\s*([0-5][0-9](?![0-9.]|\\[dtc]?frac))(:[0-5][0-9])?)?"
         r"(?!\s*[:.0-9])(?:(?:[\s\"(~]|\\[ ,;:!])*([aApP][mM])(?![A-Za-z])[\")]*)?")
TEXT = r"\\(text[a-z]*|math(?:rm|bf|it|sf)|operatorname\*?|emph|mbox|hbox)\s*\{([^{}]*)\}"
WORD = re.compile(r"[0-9]+:[0-9:]+[ap]?m?|[A-Za-z](?:[A-Za-z'-]|\.(?= ?[A-Za-z]))*|"
                  r"[十百万亿]|千(?![米克])|[\u4e00-\u9fff]+|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[^\s~]")


def quoted(m):
    r"""\text{...} as "..."; but \mathrm{e} is a letter, \operatorname{sin} a function, \text{12} a number."""
    command, inner = m[1], re.sub('["$]', " ", m[2])
    bare = inner.strip(" ~")
    name = bare in ("e", "i") or command[:2] in ("ma", "op") and re.fullmatch("[A-Z]+|[a-z]", bare)
    if (name or bare in NAMED) and not {bare, bare.lower()} & UNITS:
        return f" {NAMED.get(bare, bare)} "
    is_math = "\\" in inner or re.match(r"\s*[0-9]+:", inner) or not re.search(
        "[A-Za-z]{2}", inner) and re.search(r"^[-\s]*[0-9]|=", inner)
    return f" {inner} " if is_math else f'"{inner}"'


def repeating_decimal(m):
    """0.(3) and the like as a fraction."""
    whole, fixed, period = m[1], m[2], m[3] or m[4]
    top = int(whole + fixed + period) - int(whole + fixed or 0)
    return f"\\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


def mixed_number(m):
    """1 4/5 as 9/5; 3 10/5 is no mixed number."""
    whole, top, bottom = (int(digits) for digits in m.groups() if digits)
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else m[0]


def clock_time(m):
    """3:30 p.m. as the word 3:30pm; without two digits of minutes below 60 it is a ratio."""
    half = (m[4] or "").lower()
    return f'"{int(m[1])}:{m[2] or "00"}{m[3] or ""}{half}"' if m[2] or half else m[0]


VECTOR = r"\\(?:vec|overrightarrow|mathbf)\s*\{?\s*([A-Za-z]{1,2})\s*\}?"
INTEGER = r"(?:\{\s*([0-9]{1,9})\s*\}|([0-9]))"
# Spellings of one number or sign, rewritten in the source text, in this order.  No input makes these patterns
# backtrack for long.  The last text of a row saves time: without one of its characters nothing is to be done.
REWRITES = [(re.compile(pattern), new, frozenset(needs)) for pattern, new, needs in (
    (r"\\(?:[hv]?phantom|[hvm]space\*?|(?:text)?color|tag)\s*\{[^{}]*\}", "", "{"),
    (r"\\(?:mathrm|text) ?\{ ?C ?\} ?_ ?\{?(\w{1,9})\}? ?\^ ?\{?(\w{1,9})\}?", r"\\binom{\1}{\2}", "C"),
    (r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?|\\math(?:bf|rm)\s*\{\s*([RZNQ])\s*\}",
     lambda m: f"\\{table('R=reals Z=integers N=naturals Q=rationals C=complexes')[m[1] or m[2]]} ", "RZNQC"),
    (rf"{VECTOR}\s*\\times\s*{VECTOR}",
     lambda m: f"\\hat{{{m[1]}{m[2]}}}" if m[1] < m[2] else f"(-\\hat{{{m[2]}{m[1]}}})", "vb"),
    (r"\{ ?\\(?:rm|bf|it|sf) ([^{}]*)\}|\\(?:rm|bf|it|sf) ?\{([^{}]*)\}", r"\\mathrm{\1\2}", "mbts"),
    *[(TEXT, quoted, "bhpx")] * 4,                                            # a \text in a \text: 4 levels
    (r"[⁰¹²³⁴-⁹⁻ⁿ]+", lambda m: f"^{{{''.join(map(RAISED.get, m[0]))}}}", RAISED),
    (r"[₀-₉]+", lambda m: f"_{{{''.join(map(LOWERED.get, m[0]))}}}", LOWERED),
    (r"(?<=[0-9 \"(~])([aApP])\. ?[mM]\b\.?", r" \1m", "mM"),                                        # 5 p.m.
    (r"\{:\}|\\!:\\!|\":\"", ":", ":"), (CLOCK, clock_time, ":mM"),
    (r"(?:\^ ?(\{)?|(?<=[0-9])(?=\s*\"))\s*\"?\s*(?:st|nd|rd|th)\s*\"?(?(1)\s*\})(?![A-Za-z])", "", "hds"),
    (r"((?<=1)st|(?<=2)nd|(?<=3)rd|(?<=[04-9])th|(?<=1[1-3])th)(?![A-Za-z0-9])", "", "hds"),            # 12th
    (r"(?<=[0-9])\s+([kc]?m/(?:s|h|min|hr)(?:\^2|\^\{2\})?)(?=\W*$)", r'"\1"', "m"),                # 6 m/s
    (r"\^\s*\{((?:\s*(?:'|\\prime))+)\s*\}|\^\s*(?='|\\prime)", r"\1", "'p"),                  # y^{\prime}
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})\s*", r"\\degree ", "i"),     # 5' is 5, not behind degrees
    (r"(?<![A-Za-z_^0-9.])(?<!ee )([0-9]{1,99}(?:\.[0-9]{1,99})?)\s*'{1,2}(?![A-Za-z'0-9])", r"\1", "'"),
    (r"\(\s*\"?\s*\\?[pb]?mod\s*\"?\s*\{?([^{}()\"]{1,40})\}?\s*\"?\s*\)", r"\\pmod{\1}", "m"),
    (r"<\s*=", r"\\le ", "<"), (r">\s*=", r"\\ge ", ">"), (r"(?:!|\\not)\s*=", r"\\ne ", "="),
    (r"\\?((?:sin|cos|tan|cot|sec|csc)h?)\s*\^\s*(?:\{\s*-\s*1\s*\}|-\s*1)", r"\\arc\1 ", "^"),
    (r"\*\*", "^", "*"), (r"\.\.\.", r"\\ldots ", "."), (r"^\s*\\approx", "", "x"),
    (r"(\\begin\{array\})\s*\{[^{}]*\}|(\\\\)\s*\[-?[0-9.]+ ?[a-z]{2}\]", r"\1\2", "y["),            # \\[4pt]
    (r"\\dot\s*\{?([0-9])\}?([0-9]*)\\dot\s*\{?([0-9])\}?", r"\\overline{\1\2\3}", "d"),     # 0.\dot12\dot3
    (r"(?<=[0-9])\s*x\s*10\s*(?=\^)", "*10", "x"), (r"(?<![0-9.])\.(?=[0-9])", "0.", "."),    # 8.7 x 10^8, .5
    (r"([0-9]{0,200})\.([0-9]{0,200})(?:\\(?:overline|bar|dot)\s*\{?([0-9]{1,200})\}?|\(([0-9]{1,200})\))",
     repeating_decimal, "."),
    (r"(?<![0-9.,])([0-9]{1,200})\{,\}([0-9]{1,2}|[0-9]{4,200})(?![0-9{,])", r"\1.\2", ","),        # 0{,}5
    # 1\,000 and 1{,}000; then 1,000, but not in brackets: (100,200) is a point; then 1 4/5; then 1\frac{4}{5}
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{,\}|,?\\[,!;: ]|,\\!\s+|[ ~])[0-9]{3})+(?![0-9])",
     lambda m: re.sub(r"[^0-9]", "", m[0]), ",!;: ~"),
    (r"(?<![0-9.,}])[1-9][0-9]{0,2}(?:,[0-9]{3}){1,7}(?![0-9])(?!,[0-9])(?![^()\[\]{}]*(?:[)\]]|\\\}))",
     lambda m: m[0].replace(",", ""), ","),
    (r"(?<![0-9./^_a-zA-Z})])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![0-9./^])", mixed_number, "/"),
    (r"(?<![0-9.^_])(?<![0-9] )(?<!frac)(?<!sqrt)(?<!binom)([0-9]{1,9})(?:[ ~]|\\[,;: ])*\\?[dtc]?frac\s*"
     + INTEGER + r"\s*" + INTEGER + r"(?!\s*\^)", mixed_number, "f"),
    (r"(\([^(),]*,[^()]*\))(?=\s*(?:\\left\s*)?\([^(),]*,[^()]*\))", r"\1,", ","),             # (2,3)(2,7)
)]
# 1e-5 and 3.61e-10 are numbers, 24e-32 is 24e - 32.
SCIENTIFIC = r"(?:(?<![0-9.(a-zA-Z])[0-9]|[0-9]+\.[0-9]+)[eE][+-][0-9]{1,4}(?![0-9.])"
GREEKS = "(?:" + "|".join(t[1:] for t in GREEK) + ")"
SUBSCRIPT = r"\s*_\s*(?:\{[^{}]*\}|\([0-9]+\)|[0-9]+|[A-Za-z]|\\[a-z]+)"
NAME = r"[0-9A-F]{2,20}(?=\s*_[\s{(]*1[1-6])|[0-9]+|\([0-9]+\)|[A-Za-z]"                # AB3_{16}, 52_8, x_1
TOKEN = re.compile(rf"(?P<name>(?:{NAME}|\\(?:var)?{GREEKS}){SUBSCRIPT})"
                   rf"|(?P<num>{SCIENTIFIC}|[0-9]+(?:\.[0-9]+)?(?:[eE][0-9]{{1,4}}(?![0-9.]))?)"
                   r'|(?P<cmd>\\(?:(?:begin|end)\{[A-Za-z]+\}|[A-Za-z]+|.))|"(?P<text>[^"]*)"'
                   r"|(?P<run>log(?=\s*_)|[A-Za-z]+(?:(?![A-Za-z]|\s*_)|(?=[A-Za-z]\s*_)))"
                   r"|(?P<cjk>[\u4e00-\u9fff]+)|\s+|(?P<op>.)", re.DOTALL)
# y' and f(2), a value of a function and not f times 2, on tokens joined by blanks.
CALL = re.compile(rf"(?<!\S)(?:\\(?={GREEKS} )|(?![ei] )(?=[A-Za-z]))(\S+) \( (\w+|\\{GREEKS}) \)(?!\S)")
INNER_FUNCTION = re.compile("(arcsin|arccos|arctan|sqrt|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|pi)")
UNIT = f'"(?:{"|".join(UNITS - {"C", "F"})})' + r'(?: \^ (?:\{ -? ?[0-9]+ \}|-? ?[0-9]+))?(?!\S)'
UNIT = rf"(?:{UNIT}|\\frac \{{ {UNIT} \}} \{{ {UNIT} \}})"
# What a phrase means, on tokens joined by blanks, in this order.  Units behind a value go, with their powers.
PHRASES = [(re.compile(pattern), new) for pattern, new in (
    (r'^(?:"the )?(?:"final |"correct )?"(?:answer|ans|solution|value)s?(?: "is)?(?: :| =)? (?=.)', ""),
    (r'^"(?:option|choice) ', ""), (r'(?: ,)? "only$', ""), (r'^"the "empty "set$', r"\\emptyset"),
    (r'^(?:"for )?"(?:all|any|every) (?:"the )?"reals?(?: "numbers?| "values?)?(?: "of)?(?: "?[a-z](?= |$))?',
     r"\\reals"),
    (r'^(?:[a-z] \\in )?\\reals ,? ?"(?:exc\S+|but "not|other "than)(?: "for| "when)?(?: [a-z] =)? (.*)$',
     r"\\reals \\setminus \\{ \1 \\}"),
    (r'^(?:"there )?(?:"is |"are |"exists? |"has )?"no (?:"real )?(?:"solutions?|"roots?)(?: "exists?)?$',
     r"\\emptyset"),
    (r'(?:^|(?<=\\cup ))\\{ ([A-Za-z])(?: \\in \\reals)? [|:] (?=.*\1)(.*?) \\}(?= \\cup|$)', r"{ \2 }"),
    (r'\\{ \\begin{(?:array|cases)} (.*) \\end{(?:array|cases)}$', r"\\begin{cases} \1 \\end{cases}"),
    (r' \( (?:"about|"approximately|"roughly|"approx|\\approx) ([0-9.]+)(?: "[a-z]+)? \)$', r" \\approx \1"),
    (r' \( ((?:"[^ ]+ ?)+) \)$', r" \1"),                                                      # 5 (days)
    (r'"(?:degrees?|deg)(?!\S)', r"\\degree"), (r'(?<=\\degree) "?(?:C|c|F|f)(?!\S)', ""),
    (rf'(?<!\S)([^"\s]*[^"\s(\[{{,=<>+*/^_&:;\\-]|"(?:{"|".join(FACTORS)}))(?:(?: [/*])? {UNIT})+', r"\1"),
)]


def tokenize(source):
    r"""Text to a list of tokens; commands that only format disappear, phrases get one form.

    >>> tokenize(r"\left( \dfrac12\,\text{ cm}\right), 2cosx.")
    ['(', '\\frac', '1', '2', ')', ',', '2', '\\cos', 'x']
    """
    refuse(len(source) > MAX_CHARS, "too long")
    source = extract_answer(source, False) or "" if "\\boxed" in source else source
    source = " ".join(source.translate(UNICODE).split())     # in runs of blanks patterns would backtrack
    if "\\begin" not in source:                          # elsewhere `\\frac` was escaped twice in the data
        source = re.sub(r"\\\\(?=[A-Za-z])", r"\\", source)
    seen = {*source}
    for pattern, new, needs in REWRITES:
        if not seen.isdisjoint(needs):
            source = pattern.sub(new, source)
            seen = {*source}
    wordy, tokens = not PROSE.isdisjoint(re.findall("[a-z]+", source.lower())), []
    for m in TOKEN.finditer(source):
        if m.lastgroup in ("text", "cjk"):
            tokens += itertools.chain(*map(spoken, WORD.findall(m[0].strip('"'))))
        elif m.lastgroup == "run":
            tokens += letters(m, tokens[-1] if tokens else "", wordy)
        elif m.lastgroup == "name":                      # x_1, \\theta_{n+1}, 52_8
            parts = re.findall(r'\\[A-Za-z]+|[^\s{}()"]', m[0])
            name, below = "".join(ALIAS.get(t, t) for t in parts).replace("\\", "").split("_", 1)
            tokens.append(name + "_" + COUNTS.get(below, below))
        elif m.lastgroup and (t := ALIAS.get(m[0], m[0])):         # \\frac12 as TeX reads it
            tokens += t if t.isdigit() and tokens[-1:] in (["\\frac"], ["\\binom"]) else [t]
    joined = CALL.sub(r"\1(\2)", " ".join(tokens).rstrip(" .,;:\\").replace(" '", "'"))
    for pattern, new in PHRASES if any(t in joined for t in ('"', "\\approx", "\\{", "\\degree")) else ():
        joined = pattern.sub(new, joined)
    return joined.split()


def spoken(word):
    """One word of a \\text as tokens: number words are numbers, `and` is a comma of lists."""
    if not word[0].isalpha():
        return ['"' + word if ":" in word[1:] else word]
    word = word.replace(".", "").lower() if len(word) > 1 else word
    tens, _, ones = word.partition("-")
    if tens in COUNTS and (len(COUNTS.get(ones or "zero", "10")) == 1 or ones in FACTORS):   # two-thirds
        return [str(int(COUNTS[tens]) + int(COUNTS.get(ones, 0))), *(['"' + ones] if ones in FACTORS else [])]
    return [("\\" if word in ("and", "or") else '"') + word]


def letters(m, before, wordy):
    """`abc` is a product, `xsinx` has a function, `cm` behind a number is a unit, `parabola` a name."""
    run, word, source = m[0], m[0].lower(), m.string
    if len(run) == 1 or word in NAMED:
        return [NAMED.get(word, run)]
    behind = before[-1:] in (*DIGITS, "}", ")", "/") or before[:1] == '"'
    is_word = word in VOCABULARY and (len(run) > 3 or wordy or word in COUNTS)
    if is_word or behind and run in SHORT_UNITS:
        return spoken(word)
    parts = INNER_FUNCTION.split(run)
    if len(parts) > 1 and max(map(len, parts[::2])) < 3:
        return [t for i, part in enumerate(parts) for t in ([NAMED[part]] if i % 2 else part)]
    after = source[m.end():m.end() + 9].lstrip(" ")[:1]
    whole = before in ("", ",", "\\and", "\\or", *RELATIONS) and after in ("", *"=<>,.;\\$")
    return [run] if len(run) > 3 and (run.isupper() or whole) else list(run)


# ---- tree: nested tuples.  Leaves ('num', Fraction) ('var', name) ('const', 'pi') ('word', text); else
#   (operation, tree, ...)            + * / ^ ! binom ln sin abs floor ..., deg for degrees
#   (structure, [label,] tree, ...)   list, or, set, steps; tuple: the label is its brackets; matrix: its rows
#   (rel, operators, tree, ...) (assign, name, value) (mod, value, modulus) (base, '52_8') (ratio, a, b)
#   (builder, element, condition) (pair, value, condition) of a list of cases
#   (cup | cap | setminus, a, b) (big, 'sum' | 'prod' | 'int', variable, low, high, body)

OPEN = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
ZERO, ONE, MINUS_ONE, TWO, TEN, HALF_TURN = (("num", Fraction(k)) for k in (0, 1, -1, 2, 10, 180))
E, PI, INFINITY, DOTS = ("const", "e"), ("const", "pi"), ("const", "inf"), ("var", "...")
MINUS_INFINITY, RADIAN = ("*", MINUS_ONE, INFINITY), ("/", PI, HALF_TURN)
REALS = ("tuple", "()", MINUS_INFINITY, INFINITY)
RELATIONS = {"=": "="} | table(r"<=< >=> \le=<= \ge=>= \ne=!= \in=in \approx=~")
FLIP = {">": "<", ">=": "<="}
LIST, UNION, RELATION, RATIO, SUM, PRODUCT, POWER, EXPONENT, ATOM = range(9)   # how tightly an operator binds
INFIX = {operator: level for level, operators in enumerate((
    (",", ";", "\\and", "\\or"), ("\\cup", "\\cap", "\\setminus"), (*RELATIONS, "\\pmod"), ":",
    ("+", "-"), ("*", "/"), ("!", "\\degree"), "^")) for operator in operators}
CONSTANTS = {"i": ("const", "i"), "e": E, "\\pi": PI, "\\infty": INFINITY, "\\reals": REALS,
             "\\emptyset": ("set",), "\\ldots": DOTS}
CONSTANTS |= {name: ("word", name) for name in ("\\integers", "\\naturals", "\\rationals", "\\complexes")}
BIG = table(r"\sum=sum \prod=prod \int=int")
CASE = re.compile(r'&|(?:[,;]|(?="(?:if|for|when) ))(?!.*&)')       # between a value and its condition
ENVIRONMENTS = {f"\\begin{{{t}}}" for t in words("pmatrix bmatrix Bmatrix matrix smallmatrix array cases")}
ATOMS = (GREEK | FUNCTIONS | MARKS | CONSTANTS.keys() | OPEN.keys() | BIG.keys() | ENVIRONMENTS | words(
    r"\frac \binom \sqrt")) - {"|"}


def times(a, b):
    if b[0] == "matrix" or b[0] == "tuple" and is_literal(a):
        return (*b[:2], *(calculated(times(a, t)) if is_literal(t) else times(a, t) for t in b[2:]))
    return ("num", a[1] * b[1]) if a[0] == b[0] == "num" and MINUS_ONE in (a, b) else ("*", a, b)


def combined(operator, a, b):
    """The tree of two operands.  A congruence forgets the name, and a number all but its remainder."""
    if operator in "+-":
        b = times(MINUS_ONE, b) if operator == "-" else b
        return b if a == ZERO else ("+", *(a[1:] if a[0] == "+" else [a]), b)
    if operator == "*":
        return times(a, b)
    if operator == ":":
        return ("ratio", *(a[1:] if a[0] == "ratio" else [a]), b)
    if operator == "\\pmod":
        a = a[2] if a[0] == "assign" else a
        return ("mod", ("num", a[1] % b[1]) if a[0] == b[0] == "num" else a, b)
    return (operator.lstrip("\\"), a, b)


class Parser:
    """Precedence climbing over the whole answer, lists and sets included.

    >>> Parser(["2", "x", ",", "y"]).whole()
    ('list', ('*', ('num', Fraction(2, 1)), ('var', 'x')), ('var', 'y'))
    """

    def __init__(self, tokens, depth=0):
        self.tokens = [*tokens, "", "", "", ""]                      # so that peeking needs no check
        self.at, self.depth, self.inside = 0, depth, ""

    def whole(self):
        tree = self.tree()
        refuse(self.peek(), "more than an answer")
        return tree

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead]

    def take(self):
        refuse(not self.peek(), "more expected")
        self.at += 1
        return self.peek(-1)

    def accept(self, *wanted):
        return self.take() if self.peek() in wanted else ""

    def tree(self, level=LIST):
        """The longest expression whose operators all bind at least as tightly as `level`."""
        self.depth += 1                          # every recursion passes here: nothing exceeds Python's stack
        refuse(self.depth > MAX_DEPTH, "too deep")
        if sign := self.accept("+", "-") if level < ATOM else "":
            tree = self.tree(max(level, POWER))
            tree = times(MINUS_ONE, tree) if sign == "-" else tree
        else:
            tree = self.primary()
        while (longer := self.extended(tree, level)) is not None:
            tree = longer
        self.depth -= 1
        return tree

    def extended(self, left, level):
        """`left` with the operator that follows it, or None.  Juxtaposition multiplies."""
        t = self.peek()
        factor = t[:1].isalnum() or t[:1] == '"' or t in ATOMS or t == "|" and self.inside not in ("|", "\\{")
        binding = INFIX.get(t, PRODUCT if factor else -1)
        if binding < level or t == ":" and self.inside == "\\{":
            return None
        if binding == LIST:
            return self.elements(left)
        if t[0] == '"':                          # number words multiply
            factor = FACTORS.get(self.take()[1:])
            refuse(factor is None, "a word that changes the value")
            return ("num", left[1] * factor) if left[0] == "num" else times(left, ("num", factor))
        if t not in INFIX:
            number = is_literal(left[-1] if left[0] == "*" else left)    # not 2 3, 30^\circ 15; but 2^6 3^5
            refuse(t[0] in DIGITS and number and self.peek(1) != "^", "two numbers side by side")
            return times(left, self.tree(POWER))
        if t in RELATIONS:
            ops, sides = [], [left]
            while op := self.accept(*RELATIONS):
                ops.append(RELATIONS[op])
                sides.append(self.tree(RATIO))
            return relation(ops, sides)
        self.at += 1
        if binding != POWER:
            return combined(t, left, self.tree(min(binding + 1, EXPONENT)))
        return ("!" if t == "!" else "deg", left)

    def elements(self, left):
        """A list, which commas, `and` and `or` separate."""
        items, kind = [left], "list"
        while separator := self.accept(",", ";", "\\and", "\\or"):
            separator = self.accept("\\and", "\\or") or separator    # 1, 2, and 3
            kind = "or" if separator == "\\or" else kind
            items.append(self.tree(UNION))
        if items[0][:2] == ("rel", "!="):                                               # x \ne 1, 2
            items = [x if x[0] in STRUCTURES else (*items[0][:3], x) for x in items]
        if items[-1][0] == "mod":                                                   # n = 0, 2 (mod 6)
            items = [x if x[0] == "mod" else combined("\\pmod", x, items[-1][2]) for x in items]
        at = items.index(DOTS) if DOTS in items else 0
        if at > 1 and all(x[0] == "num" for x in items[:at]):        # 1, 2, 3, \ldots, 9 as 1, 2, \ldots, 9
            steps = {y[1] - x[1] for x, y in itertools.pairwise(items[:at])}
            kind, items = "steps", items[:2] + items[at:] if len(steps) == 1 else items
        return (kind, *items)

    def group(self, opening):
        """What stands in brackets, whose opening token was just taken: a group, tuple or set."""
        outer, self.inside = self.inside, opening
        tree = ("list",) if opening == "\\{" and self.peek() == "\\}" else self.tree()
        if opening == "{" and self.peek() in ("\\choose", "\\over"):
            tree = ("binom" if self.take() == "\\choose" else "/", tree, self.tree())
        if opening == "\\{" and self.accept("|", ":"):
            condition = self.tree()
            if condition[0] == "assign" and condition[1][0] == "var":               # 2k and 2n, whole numbers
                tree, condition = (substituted(t, condition[1], ("var", "#")) for t in (tree, condition))
            tree = ("builder", tree, condition)
        self.inside = outer
        closing = self.take()
        if opening in ("(", "[") and closing in (")", "]") and tree[0] == "list":
            return ("tuple", opening + closing, *tree[1:])
        refuse(closing != OPEN[opening], "brackets")
        if opening == "\\{" and tree[0] not in ("rel", "builder", "or", "steps"):
            return ("set", *(tree[1:] if tree[0] == "list" else [tree]))
        return {"|": ("abs", tree), "\\lfloor": ("floor", tree), "\\lceil": ("ceil", tree)}.get(opening, tree)

    def primary(self):
        """What needs no operator: a number, name, word, bracket, function, fraction, root or matrix."""
        t = self.take()
        if t[0] in DIGITS:
            return ("base", t) if "_" in t else ("num", Fraction(int(t) if t.isdigit() else t))
        if t in CONSTANTS:
            return CONSTANTS[t]
        if t[0] == '"':
            while self.peek()[:1] == '"':
                t += " " + self.take()[1:]
            return ("word", t[1:])
        if t[0].isalpha() or t in GREEK:
            return ("var", t)
        if t in OPEN:
            return self.group(t)
        if t in FUNCTIONS:
            return self.function(t[1:])
        if t in ("\\frac", "\\binom"):
            top = self.tree(ATOM)
            refuse(len(self.peek()) > 1 and self.peek()[0] in DIGITS, "not as TeX reads it")
            return ("/" if t == "\\frac" else "binom", top, self.tree(ATOM))
        if t == "\\sqrt":
            index = self.group(self.take()) if self.peek() == "[" else TWO
            return ("^", self.tree(ATOM), ("/", ONE, index))
        if t in MARKS:                           # \overline z is a name of its own; a segment is a product
            tree = self.tree(ATOM)
            segment = t == "\\overline" and tree[0] == "*" and all(map(str.isupper, variables(tree)))
            return tree if tree[0] == "num" or segment else ("var", f"{t} {tree}")
        if t in BIG:
            return self.big(BIG[t])
        refuse(t not in ENVIRONMENTS, "no factor")
        return self.environment(t)

    def function(self, name):
        r"""sin, log_2, ln^2 and the like with their argument: a bracket, else factors: \sin 2x \cos y."""
        base = power = None
        for _ in range(2):                       # in either order
            base = self.tree(ATOM) if self.accept("_") else base
            power = self.tree(EXPONENT) if self.accept("^") else power
        bracket = self.accept("(", "[", "{", "\\{")
        tree = self.group(bracket) if bracket else self.tree(POWER)
        while not bracket and (self.peek() in ATOMS - FUNCTIONS - OPEN.keys() or self.peek()[:1].isalnum()):
            tree = times(tree, self.tree(POWER))
        tree = in_degrees(tree, RADIAN) if name in TRIG else tree
        if name == "exp":
            return ("^", E, tree)
        base = TEN if name == "lg" else base
        name = "ln" if name in ("lg", "log") else name
        tree = (name, *(tree[1 + (tree[0] == "tuple"):] if tree[0] in ("tuple", "list", "set") else [tree]))
        tree = ("/", tree, ("ln", base)) if base else tree
        return tree if power is None else ("^", tree, power)

    def big(self, kind):
        r"""\sum_{k=a}^{b} body, \int_a^b body dx.  Only built: sympy evaluates it."""
        name = low = ZERO
        if self.accept("_") and kind == "int":
            low = self.tree(EXPONENT)
        elif kind != "int":
            opening, name, equals, low = self.take(), self.primary(), self.take(), self.tree(SUM)
            refuse((opening, equals, self.take()) != ("{", "=", "}"), "bounds")
        high = self.tree(EXPONENT) if self.accept("^") else ZERO
        if kind == "int":
            end = max((i for i in range(self.at, len(self.tokens) - 1) if self.tokens[i] == "d"), default=0)
            body, self.at = Parser(self.tokens[self.at:end], self.depth).whole(), end + 1
            name = self.primary()
        else:
            body = self.tree(PRODUCT)
        bound = ("var", f"#{str(body).count('#')}")                  # renamed: \sum_i and \sum_k are one tree
        return ("big", kind, bound, low, high, substituted(body, name, bound))

    def environment(self, name):
        r"""\begin{xmatrix} or \begin{cases}; the bracket style does not matter, but \vmatrix is no matrix."""
        end = self.tokens.index(name.replace("begin", "end"), self.at)
        inner, self.at = " ".join(self.tokens[self.at:end]).replace("& =", "="), end + 1
        rows = [CASE.split(row, 1) if "cases" in name else row.split("&")
                for row in inner.split("\\\\") if row.strip()]
        rows = [[self.cell(part) for part in row] for row in rows]
        refuse(len({len(row) for row in rows}) != 1, "ragged")
        if "cases" in name:                      # one column: a system, x = 1, y = 2
            return ("list", *(row[0] if len(row) == 1 else ("pair", *row) for row in rows))
        return ("matrix", str(len(rows)), *itertools.chain(*rows))

    def cell(self, text):
        """A tree; or words, as in: n is even."""
        text = re.sub(r'^[ ,;]*(?:"(?:if|for|when) )?|[ .,;]+$', "", text)
        return ("word", text.replace('"', "")) if '"' in text else Parser(text.split(), self.depth).whole()


def is_name(tree):
    r"""May this be the left side of `name = value`?  x, f(x), AB, (p,q), \frac{NO}{BO}, words; never 2x."""
    kind, *parts = tree
    if kind in ("var", "word"):
        return ":" not in parts[0]
    parts = [part for part in parts if isinstance(part, tuple)]
    capitals = kind in ("tuple", "abs") or all(part[0] != "var" or part[1].isupper() for part in parts)
    return kind in ("*", "/", "tuple", "abs") and capitals and all(map(is_name, parts))


def relation(ops, sides):
    """A chain of relations; names before an equals sign only say what is meant."""
    if ops[-1] == "~" and not is_name(sides[-2]):        # x = 1/3 \approx 0.33 says 1/3
        refuse(sides[-1][0] != "num", "not a rounding")
        decimal = sides.pop()[1]
        error = abs(inexact(value(sides[-1], {})) - inexact(decimal))
        refuse(error * decimal.denominator > 1, "not a rounding")
        ops.pop()
    if ops == ["in"]:
        refuse(not is_name(sides[0]) or sides[1][0] not in STRUCTURES, "element of what is no set")
    if ops in (["in"], ["~"]):
        return ("assign", *sides)
    refuse(not ORDER.keys() >= set(ops), "a chain of other relations")
    if FLIP.keys() >= set(ops):                  # 3 > x as x < 3
        ops, sides = [FLIP[op] for op in reversed(ops)], sides[::-1]
    if set(ops) - {"="}:
        return ("rel", " ".join(ops), *sides)
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        sides = sides[::-1]
    values = sides[sum(1 for _ in itertools.takewhile(is_name, sides[:-1])):]
    if len(sides) == 2 and (len(values) == 2 and any(map(variables, values)) or all(map(is_name, sides))):
        return ("rel", "=", *sides)              # SRAC = LRAC is a statement, not the value of a name
    empty = len(values) > 1 and (values[0] == values[-1] or not all(agree(v, values[-1]) for v in values))
    refuse(empty, "a false or an empty equation")
    return ("assign", sides[0], values[-1]) if len(values) < len(sides) else values[-1]


def nodes(tree):
    found = [tree]
    for node in found:                           # which grows
        found += [part for part in node[1:] if type(part) is tuple]
    return found


def variables(tree):
    return {t[1] for t in nodes(tree) if t[0] == "var"}


def mapped(function, tree):
    return tuple(function(part) if isinstance(part, tuple) else part for part in tree)


def substituted(tree, leaf, new):
    return new if tree == leaf else mapped(lambda part: substituted(part, leaf, new), tree)


def in_degrees(tree, unit=ONE):
    return ("*", tree[1], unit) if tree[0] == "deg" else mapped(lambda part: in_degrees(part, unit), tree)


def every_sign(tokens, tied):
    r"""The tree of tokens with \pm as the list of its values: signs are independent, or all tied together."""
    marks, found = [t for t in tokens if t in ("\\pm", "\\mp")], {}
    together = [["+-"[way ^ (t == "\\mp")] for t in marks] for way in (0, 1)]
    for signs in map(iter, together if tied else itertools.product("+-", repeat=len(marks))):
        tree = Parser([next(signs) if t in ("\\pm", "\\mp") else t for t in tokens]).whole()
        found |= dict.fromkeys(map(calculated, items(tree)))
    return ("list", *found)


def calculated(tree):
    r"""A tree with rational parts as numbers: 3 \pm 1 is finished."""
    if tree[0] != "num" and {t[0] for t in nodes(tree)} <= {"num", "+", "*", "/"}:
        return ("num", value(tree, {}))
    return mapped(calculated, tree)


# ---- value of a tree: a Fraction while everything is rational, else an mpmath number

# One lock for everything that evaluates: mpmath's precision and its constants are not safe between threads.
_lock = threading.RLock()
_deadline, _ticks = math.inf, 0                  # of the comparison that holds the lock


@functools.cache
def mp():
    """A private mpmath context.  Imported here, so that importing this file stays fast."""
    import mpmath
    context = mpmath.mp.clone()
    context.dps = PRECISION
    return context


def tick(work=1):
    """Time is up only after some work: a busy machine may stall the first steps for a second."""
    global _ticks
    _ticks += work
    refuse(_ticks > 300 and time.monotonic() > _deadline, "out of time", Undecided)


def exact(*values):
    return {*map(type, values)} == {Fraction}


def bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def inexact(x):
    """As an mpmath number; a Fraction with too many digits would be cut, and what is cut could matter."""
    if not isinstance(x, Fraction):
        return x
    refuse(bits(x) > SEEN_BITS, "too many digits", Undecided)
    return mp().mpf(x.numerator) / x.denominator


def real(x):
    x = inexact(x)
    refuse(mp().im(x) and mp().mag(mp().im(x)) > mp().mag(x) - 800, "not real")
    return mp().re(x)


def natural(x, limit):
    refuse(not exact(x) or x.denominator != 1 or x < 0, "not a natural number")
    refuse(x > limit, "argument", Undecided)
    return int(x)


def binomial(n, k):
    n, k = natural(n, 10 ** 9), natural(k, 10 ** 9)      # k > n is undefined
    rest = natural(Fraction(n - k), n)
    refuse(rest and min(k, rest) * n.bit_length() > MAX_BITS, "binomial", Undecided)
    return math.comb(n, k)


def add(*terms):
    """A sum.  A term too small to be seen, or digits lost in a difference, decide nothing."""
    if exact(*terms):
        refuse(sum(map(bits, terms)) > 4 * MAX_BITS, "sum", Undecided)
        return sum(terms)
    terms = [inexact(t) for t in terms if t]
    total, sizes = sum(terms), [mp().mag(t) for t in terms]
    size = mp().mag(total) - max(sizes) if total else -math.inf
    refuse(min(sizes) < max(sizes) - 200 or -930 < size < -330, "digits lost", Undecided)
    return total if size > -930 else Fraction(0)


def power(x, n):
    if exact(n) and n.denominator == 1:
        large = abs(n) * (bits(x) if exact(x) else 1) > MAX_BITS
        refuse(large and x not in (0, 1, -1), "power", Undecided)
        return x ** n.numerator
    if x == 0:
        return 0 if mp().re(inexact(n)) > 0 else 1 / Fraction(0)
    if exact(x, n) and n == Fraction(1, 2):  # as exact, a tenth of the time
        refuse(x != 1 and abs(x - 1) < Fraction(1, 2 ** 200), "exponent", Undecided)
        return mp().sqrt(inexact(x))
    if exact(n) and n.denominator % 2 and not mp().im(inexact(x)) and x < 0:
        return power(-x, n) * (-1) ** n.numerator        # odd roots of negatives are real, as at school
    exponent = inexact(n) * mp().ln(inexact(x))
    refuse(exponent and not -200 < mp().mag(exponent) < 20, "exponent", Undecided)
    return mp().exp(exponent)


def floor(x):
    if exact(x):
        return math.floor(x)
    x = real(x)
    refuse(mp().mag(x) > 300, "floor of a large number", Undecided)
    near = mp().nint(x)                                  # log_2 8 comes out a hair below 3
    return int(near if abs(x - near) < mp().mpf(10) ** -100 else mp().floor(x))


def elementary(name, x):
    """A function of mpmath, where 300 digits show what it does: sin x is x for a tiny x."""
    x = inexact(x)
    limit = 7 if name[-1] == "h" else 200 if name.startswith("arc") else 40
    refuse(name != "ln" and x and not -200 < mp().mag(x) < limit, "argument", Undecided)
    result = getattr(mp(), name.replace("arc", "a"))(x)
    if not mp().isfinite(result) or result and mp().mag(result) > 900:
        raise ZeroDivisionError                          # tan 90 degrees, ln 0
    return result if result and mp().mag(result) > -900 else Fraction(0)                # sin pi


COUNTING = {"!": lambda n: math.factorial(natural(n, 4_000)), "binom": binomial}       # of whole numbers only
DIVISORS = {"gcd": lambda *xs: math.gcd(*(natural(abs(x), 10 ** 100) for x in xs)),
            "lcm": lambda *xs: math.lcm(*(natural(abs(x), 10 ** 100) for x in xs))}
STEPS = {"floor": floor, "ceil": lambda x: -floor(-x)}             # agree at some points, differ at others
SIGNED = {"abs": abs, "max": lambda *xs: max(xs, key=real), "min": lambda *xs: min(xs, key=real)}
OPERATIONS = COUNTING | DIVISORS | STEPS | SIGNED | {
    "+": add, "*": lambda x, y: x * y, "/": lambda x, y: x / y, "^": power, "deg": lambda x: x}
SEVERAL = ("+", "*", "/", "^", "binom", "gcd", "lcm", "max", "min")    # arguments
JUMPS = frozenset((*COUNTING, *DIVISORS, *STEPS, *SIGNED))


def value(tree, point):
    """The value of a tree where its variables have the values of `point`.

    >>> value(("+", ("var", "x"), ("/", ONE, TWO)), {"x": Fraction(1)})
    Fraction(3, 2)
    """
    kind, parts = tree[0], tree[1:]
    if kind == "num":
        return parts[0]
    if kind == "var":
        refuse(parts[0] not in point, "a variable")
        return point[parts[0]]
    if kind == "const":
        return {"pi": mp().pi, "e": mp().e, "i": mp().j, "inf": mp().inf}[parts[0]] * 1
    tick()
    if kind not in OPERATIONS:
        refuse(kind == "big", "sum, product, integral or limit", Undecided)
        refuse("\\" + kind not in FUNCTIONS, "no value")
    refuse(len(parts) != 1 and kind not in SEVERAL, "arguments")
    values = [value(part, point) for part in parts]
    values = [inexact(v) for v in values] if kind in "*/" and not exact(*values) else values
    result = OPERATIONS[kind](*values) if kind in OPERATIONS else elementary(kind, *values)
    result = Fraction(result) if isinstance(result, int) else result
    if not isinstance(result, Fraction):
        return result if mp().isfinite(result) else 1 / 0
    tick(bits(result) // 200)
    refuse(bits(result) > MAX_BITS, "number", Undecided)
    return result


def same(x, y):
    if exact(x, y):
        return x == y
    x, y = inexact(x), inexact(y)
    return abs(x - y) <= mp().mpf(10) ** -200 * max(abs(x), abs(y))


@functools.lru_cache(maxsize=500)
def sample(names, kinds, constants):
    """Points at which to compare: positive unless signs matter; whole numbers for functions that jump."""
    rng = random.Random(0)
    tops = (2000, 9000, 30000, 400, 5000, 90000)
    rows = [[Fraction(rng.randrange(1, top), 1013) for _ in names] for top in tops]
    whole = [[rng.randrange(1, top) for _ in names] for top in (6, 9, 14, 24, 40, 80, 200, 999) * 2]
    if kinds - COUNTING.keys():        # large ones, of many divisors, beside the constants
        smooth = math.prod((64, 81, 125, 49, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47))
        bases = [(smooth, smooth), (smooth * 53 * 59 * 61 * 67 * 71, 1), (10 ** 4, 7), (10 ** 6 - 1, 1)]
        bases += [(max(c + d, 1), c) for c in (123456, *constants) for d in (-1, 0, 1)]
        whole += [[first + i * step for i, _ in enumerate(names)] for first, step in bases]
        whole += [[smooth // (i + 2) for i, _ in enumerate(names)]]
    if kinds & {*COUNTING, *DIVISORS} or kinds and set(names) <= set("klmnKMN"):
        rows = whole
    elif kinds & STEPS.keys():
        rows += whole
    if kinds & SIGNED.keys():
        rows += [[x if rng.random() < 0.4 else -x for x in row] for row in rows]
        rows += [[-x for x in row] for row in rows]
    return [dict(zip(names, map(Fraction, row))) for row in rows]


def sampled(b, a):
    """[(value of b, point)], where b is real first: elsewhere the branches of roots differ."""
    parts = nodes(a) + nodes(b)
    names = tuple(sorted({t[1] for t in parts if t[0] == "var"}))
    if not names or len(names) > 40:
        return [(value(b, {}), {})]
    kinds = JUMPS & {t[0] for t in parts}
    if any(t[0] == "^" and t[1][0] == "num" and t[1][1] < 0 and variables(t[2]) for t in parts):
        kinds |= {"!"}                                   # (-1)^n has a meaning for whole numbers only
    large, reals, others = sorted({int(t[1]) for t in parts if t[0] == "num" and 4 < t[1] < 10 ** 9}), [], []
    for point in sample(names, kinds, tuple(large[:6]) if kinds else ()):
        try:
            y = value(b, point)
            (reals if exact(y) or mp().im(y) == 0 else others).append((y, point))
        except (ArithmeticError, ValueError) as error:
            tick()
            reason = str(error)
        if len(reals) == 3 and not kinds:
            break
    found = reals + others
    refuse(not found, "" if found else reason, Undecided)        # defined nowhere, or too large there
    return found if kinds else found[:3]


# ---- equality by kind: a is always the answer, b the gold

LISTS = words("list or set")
SETS = words("rel cup cap setminus")
STRUCTURES = LISTS | SETS | words("tuple matrix ratio assign base word builder steps mod pair")


def spelled(tokens):
    r"""`(C)`, `\text{C}` and `c` as "c"; "" if there is more than letters and brackets."""
    text = "".join(t.strip('"(){}').lower() for t in tokens).replace(" ", "")
    return text if text.replace("-", "").replace("'", "").isalpha() else ""


def equal(a, b):
    """Do two trees say the same?  Another kind is different, except where a convention joins kinds.

    >>> equal(("list", ONE, TWO), ("set", TWO, ONE)), equal(("ratio", ONE, TWO), ("ratio", TWO, ONE))
    (True, False)
    """
    tick()
    if a == b:
        return True
    kinds = {a[0], b[0]}
    if "assign" in kinds and not kinds & LISTS:
        return equal_assign(a, b)
    if "word" in kinds:
        return equal_words(a, b)
    if "ratio" in kinds and kinds != {"ratio"}:                      # 5:8 is 5/8
        a, b = (("/", *t[1:]) if t[0] == "ratio" and len(t) == 3 else t for t in (a, b))
        return STRUCTURES.isdisjoint((a[0], b[0])) and equal_values(a, b)
    if a[0] == b[0] == "rel" and equal_relation(a, b) or kinds & LISTS and equal_lists(a, b):
        return True
    if {a[0], b[0], *(t[0] for t in (*a[1:], *b[1:]) if isinstance(t, tuple))} & SETS and "pair" not in kinds:
        return equal_sets(a, b)
    if kinds <= {"matrix", "tuple"} and a[:2] != b[:2]:              # a column, a row, a tuple as vectors
        vectors = [t[1] in ("()", "1", str(len(t) - 2)) for t in (a, b)]
        row = a[1] == "[]" and b[0] == "matrix"
        return (vectors[0] or row) and vectors[1] and all_equal(a[2:], b[2:])
    if kinds & STRUCTURES:
        return a[0] == b[0] and not kinds & LISTS and all_equal(a[1:], b[1:])
    return equal_values(a, b)


def all_equal(xs, ys):
    return len(xs) == len(ys) and all(equal(x, y) if isinstance(x, tuple) else x == y for x, y in zip(xs, ys))


def equal_words(a, b):
    """The same letters, whatever their case; of clock times, am or pm may be missing, but not differ."""
    x, y = ("".join(part[1] if part[0] in ("word", "var", "const") else "?"
                    for part in (t[1:] if t[0] == "*" else [t])) for t in (a, b))
    if ":" in y and not (x.endswith("m") and y.endswith("m")):
        return x.rstrip("apm") == y.rstrip("apm")
    return spelled([x]) == spelled([y]) != ""


def equal_values(a, b):
    r"""Two values, where 30^\circ is 30 and also \pi/6.  A plain gold wants a finished answer."""
    ours, theirs = nodes(a), nodes(b)
    degrees = [any(t[0] == "deg" for t in parts) for parts in (ours, theirs)]
    plain = is_finished(b, False) and not variables(b)
    unfinished = plain and not is_finished(a, is_literal(b) and not degrees[1])
    if unfinished or INFINITY in ours + theirs:          # of infinities, the same tree is equal
        return False
    return agree(a, b) if not any(degrees) else agree(in_degrees(a), in_degrees(b)) or (
        not all(degrees) and agree(in_degrees(a, RADIAN), in_degrees(b, RADIAN)))


def agree(a, b):
    """The same value at every sample point where the gold b is defined; sympy where digits do not decide."""
    try:
        points = [] if a == b else sampled(b, a)
    except Undecided as error:                   # of a tower of powers sympy knows no more
        provable = str(error) in ("digits lost", "too many digits", "sum, product, integral or limit")
        proved = _sympy.ask([a, b]) if provable and time.monotonic() < _deadline else None
        refuse(proved is None, "out of time" if provable else str(error), Undecided)
        return proved
    try:
        return all(same(value(a, point), y) for y, point in points)
    except ArithmeticError:
        return False


def is_literal(tree):
    """7, -7, 7/2: what a plain number looks like."""
    while tree[0] == "*" and tree[1] == MINUS_ONE or tree[0] == "deg":
        tree = tree[-1]
    return tree[0] == "num" or tree[0] == "/" and tree[1][0] == tree[2][0] == "num"


def is_finished(tree, rational, depth=0):
    r"""No sums, functions or nested operations: 2^{10}, \binom{25}2, 3 \cdot 10^5, \frac{\sqrt3}2, 2^6 3^5.

    For a `rational` gold a product of two plain numbers or anything with e, i, \pi is unfinished, too.

    >>> is_finished(("+", ONE, ONE), True), is_finished(("^", TWO, TEN), True)
    (False, True)
    """
    literals, bases, counts, stack = 0, [], 0, [tree]
    while stack:
        t = stack.pop()
        if is_literal(t):
            literals += t not in (ONE, MINUS_ONE)
        elif t[0] in ("*", "deg") or t[0] == "/" and "/" not in (t[1][0], t[2][0]):
            stack += [t[1]] if t[0] == "/" and is_literal(t[2]) else t[1:]
        elif t[0] in ("^", "!", "binom") and not depth and all(is_finished(p, rational, 1) for p in t[1:]):
            counts += t[0] != "^"
            bases += [t[1]] if t[0] == "^" else []
        elif t[0] != "const" or rational:        # e^{i\pi} for -1
            return False
    return (literals < 2 or not rational) and counts < 2 and len(set(bases)) == len(bases)


def items(tree):
    """The elements of a list or set and of the lists in it (not of sets); x = 1, 2 or x in {1, 2} as 1, 2."""
    tree = tree[2] if tree[0] == "assign" and tree[2][0] in LISTS else tree
    if tree[0] not in LISTS:
        return [tree]
    named = len({t[1] for t in tree[1:] if t[0] == "assign"}) > 1        # A = {1}, B = {2, 3}
    return [x for t in tree[1:] for x in ([t] if t[0] == "set" or named else items(t))]


def equal_lists(a, b):
    """Unordered elements; names that differ (x=2, y=3) belong to their values; (x,y)=(1,2) is x=1, y=2."""
    xs, ys = ([("assign", *pair) for pair in zip(t[1][2:], t[2][2:])] if t[0] == "assign" and
              t[1][0] == t[2][0] == "tuple" and len(t[1]) == len(t[2]) else items(t) for t in (a, b))
    names = {y[1] for y in ys if y[0] == "assign" and y[1][0] == "var"}
    xs = a[2:] if len(names) > 1 and a[0] == "tuple" and a[1] == "()" else xs
    if len(names) == len(ys) > 1 and not any(x[0] == "assign" for x in xs):    # 2, 3 for x=2, y=3; not 3, 2
        return all_equal(xs, [y[2] for y in ys])
    rest = list(ys)                                      # every element of the gold once, none extra
    for x in xs if len(xs) == len(ys) else ():
        i = next((i for i, y in enumerate(rest) if equal(x, y)), len(rest))
        del rest[i:i + 1]
    return not rest and len(xs) == len(ys)


# ---- equations and inequalities

def ratio(a, b):
    """The constant factor between left - right of two equations between values, or None."""
    chain = any(t[0] == "rel" and len(t) > 4 for t in (a, b))
    a, b = (("+", t[-2], times(MINUS_ONE, t[-1])) for t in (a, b))
    if chain or STRUCTURES & {t[0] for t in (*nodes(a), *nodes(b))}:
        return None
    points = sampled(b, a) if variables(a) == variables(b) != set() else ()
    ratios = [value(("/", a, b), point) for y, point in points if y]
    return ratios[0] if ratios and ratios[0] and all(same(r, ratios[0]) for r in ratios) else None


def equal_assign(a, b):
    """x=5 against x=5, against 5, or against another equation where the gold says more than a number."""
    if a[0] == b[0]:
        names = [t[1][1] if t[1][0] == "var" else "" for t in (a, b)]
        functions = "y" in names and all(re.fullmatch(r"y|[A-Za-z]\([a-z]\)", name) for name in names)
        if (functions and variables(b[2]) or equal(a[1], b[1])) and equal(a[2], b[2]):
            return True                          # y = x+1 and f(x) = x+1 define one function
    elif "rel" in (a[0], b[0]) and {a[-1][0], b[-1][0]} & (SETS | {"tuple"}):
        return equal_sets(a, b)                  # x in (0,1)
    elif "rel" not in (a[0], b[0]):
        return equal(*(t[2] if t[0] == "assign" else t for t in (a, b)))
    if b[0] == "assign" and not variables(b[2]) or any(t[0] == "rel" and t[1] != "=" for t in (a, b)):
        return False                             # 2x = 10 restates the problem whose answer is x = 5
    return ratio(a, b) is not None


def equal_relation(a, b):
    """Chains term by term, or one relation up to a factor, which is positive if it is an inequality."""
    sides, both_ways = b[2:], a[1] in ("=", "!=")
    if a[1] != b[1] or all_equal(a[2:], sides) or both_ways and all_equal(a[:1:-1], sides):
        return a[1] == b[1]
    if " " in a[1] or solved(b):
        return False                             # x < 2 is asked for: 3x - 6 < 0 is the problem, no answer
    factor = ratio(a, b)
    return factor is not None and (both_ways or real(factor) > 0)


# ---- sets of real numbers

ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
         "!=": operator.ne}


def ends(tree):
    """The values in a structure: ends of intervals, elements, sides of relations."""
    parts = [part for part in tree[1:] if isinstance(part, tuple)]
    return [end for part in parts for end in ends(part)] if tree[0] in STRUCTURES else [tree]


def solved(tree):
    """Does each relation compare a variable with constants?"""
    return all(t[0] == "var" or not variables(t) for t in ends(tree)) and \
        all(variables(t) for t in nodes(tree) if t[0] == "rel")


def number_at(tree, x):
    """An end point, to 200 digits so that equal ones are the same number, where the variable is x."""
    if tree[0] == "var":
        return x
    infinity = (tree == INFINITY) - (tree == MINUS_INFINITY)
    return infinity * mp().inf if infinity else mp().mpf(mp().nstr(real(value(in_degrees(tree), {})), 200))


def places(*trees):
    """Every end point of sets, places between them and beyond: numbers that show how the sets differ."""
    points = sorted(filter(mp().isfinite, (number_at(t, mp().inf) for tree in trees for t in ends(tree))))
    between = [(x + y) / 2 for x, y in itertools.pairwise(points)]
    return [*points, *between, points[0] - 1, points[-1] + 1] if points else [mp().mpf(0)]


def equal_sets(a, b):
    names, kinds = variables(a) | variables(b), {t[0] for tree in (a, b) for t in nodes(tree)} & STRUCTURES
    known = len(names) < 2 and kinds <= LISTS | SETS | {"tuple", "assign"}     # x > 2 is (2,oo), not y > 2
    finished = [all(is_finished(t, False) for t in ends(tree) if t[0] != "var") for tree in (a, b)]
    return known and solved(a) and solved(b) and finished != [False, True] and all(
        contains(a, x) == contains(b, x) for x in places(a, b))


def contains(tree, x):
    tick()
    kind, *parts = tree
    if kind in LISTS or kind == "cup":               # x > 2, x < 5: both, unless nothing is left
        refuse(kind == "list" and {"rel"} < {part[0] for part in parts}, "a relation and a number")
        together = kind == "list" and parts[0][0] == "rel" and any(
            all(contains(part, y) for part in parts) for y in places(tree))
        return (all if together else any)(contains(part, x) for part in parts)
    if kind in ("cap", "setminus"):
        return contains(parts[0], x) and contains(parts[1], x) == (kind == "cap")
    if kind == "assign":
        return contains(parts[1], x)
    if kind == "tuple" and len(parts) == 3:
        ops = ["<=" if bracket in "[]" else "<" for bracket in parts[0]]
        sides = [number_at(parts[1], x), x, number_at(parts[2], x)]
    else:
        refuse(kind == "tuple" or kind != "rel" and variables(tree), "no set")
        ops, sides = (parts[0].split(), parts[1:]) if kind == "rel" else (["="], [tree, ("var", "")])
        sides = [number_at(t, x) for t in sides]
    return all(ORDER[op](*pair) for op, pair in zip(ops, itertools.pairwise(sides)))


# ---- sympy: a worker process that can be killed

class Worker:
    """`python reward.py --worker`: one JSON line in, one out, killed when it takes too long.

    A fresh interpreter: forking a process with torch, CUDA or threads is unsafe, spawn would import the
    caller's __main__ again, SIGALRM works only in the main thread and not inside a long C call.
    """

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def ask(self, job):
        """The worker's answer; None after a timeout, which also ends the worker."""
        with self.lock:
            try:
                if self.process is None:
                    command = [sys.executable, os.path.abspath(__file__), "--worker"]
                    self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                                    start_new_session=True)
                    self.read(30)
                print(json.dumps(job, default=str), file=self.process.stdin, flush=True)
                return json.loads(self.read(SYMPY_SECONDS))
            except (OSError, ValueError):
                if self.process is not None:
                    self.process.kill()
                    self.process.wait()
                self.process = None

    def read(self, seconds):
        """One line, or nothing when time is up."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""


_sympy = Worker()
# A fork may happen while another thread holds the lock; the child must not share the worker's pipes.
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock(), _sympy=Worker()))
SYMPY_NAMES = table("""!=factorial ceil=ceiling binom=binomial abs=Abs ln=log max=Max min=Min +=Add *=Mul
    ^=Pow sum=Sum prod=Product int=Integral""")


def sympy_tree(node, sp):
    """The sympy expression of a JSON tree.  Built node by node: sympy never sees a string to parse."""
    kind = node[0]
    if kind == "num":
        return sp.Rational(*map(int, node[1].split("/")))
    if kind in ("var", "const"):
        constants = {"pi": sp.pi, "e": sp.E, "i": sp.I, "inf": sp.oo}
        return constants[node[1]] if kind == "const" else sp.Symbol(node[1], positive=True)
    parts = [sympy_tree(t, sp) for t in node[1:] if isinstance(t, list)]
    if kind in ("/", "deg"):
        return parts[0] / parts[1] if kind == "/" else parts[0]
    if kind != "big":
        return getattr(sp, SYMPY_NAMES.get(kind) or kind.replace("arc", "a"))(*parts)
    name, low, high, body = parts
    return getattr(sp, SYMPY_NAMES[node[1]])(body, name if low == high else (name, low, high)).doit()


def serve_sympy():
    """Say of each line whether its two trees are equal: the same, or of a difference that sympy makes 0."""
    sys.path.pop(0)                    # a random.py next to this file must not shadow the library
    import sympy as sp
    with contextlib.suppress(ValueError, OSError):       # a number may grow faster than a clock can stop it
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    k, n = sp.symbols("k n")
    sp.simplify(sp.Sum(k, (k, 1, n)).doit())             # the first sum takes long: on nobody's time
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHAN_SECONDS)                     # should nobody be left to kill it
        try:
            a, b = (sympy_tree(tree, sp) for tree in json.loads(line))
            proved = bool(a == b or sp.expand(a - b) == 0 or sp.simplify(a - b) == 0)
        except Exception:              # noqa: BLE001  whatever sympy raises, it is no proof
            proved = False
        signal.alarm(0)
        print(json.dumps(proved), flush=True)


# ---- reading and comparing two texts

# What a text says.  tree: None outside the grammar; tied: the tree with every \pm of a tuple the same sign;
# said: the words of the qualifier behind the answer.
Reading = collections.namedtuple("Reading", "tokens tree tied said")
QUALIFIER = re.compile(r' (?:, )?(?:"(?:where|with|for)|\\forall|'
                       r'[,(](?= \S+ "?(?:\\in|is|an|any|integer|constant|arbitrary) )) ')


@functools.lru_cache(maxsize=1500)
def parsed(text):
    """The Reading of a text; a qualifier (`for all real x`, `c is a constant`) is no part of its tree."""
    tokens = []
    try:
        tokens = tokenize(text)
        tail = [*itertools.takewhile(lambda t: t.strip('"') in QUALIFIERS, tokens[:0:-1])][::-1]
        m = QUALIFIER.search(f" {' '.join(tail)} ")
        said = m.string[m.start():].replace('"', "").split() if m else []
        body = tokens[:len(tokens) - len(said)]
        signs = {"\\pm", "\\mp"} & {*body}
        tied = every_sign(body, True) if signs else None
        single = "\\mp" in signs or body.count("\\pm") > 4
        tree = tied if single else every_sign(body, False) if signs else Parser(body).whole()
        return Reading(tokens, tree, tied, said)
    except REFUSALS:
        return Reading(tokens, None, None, [])


def read(text):
    """A gold is read often, so Readings are remembered: 1500 of at most 80 characters, 400 bytes for each."""
    return parsed(text) if len(text) <= 80 else parsed.__wrapped__(text)


def compare(answer, gold, problem=None):
    a, b = read(answer), read(gold)
    if a.tokens and a.tokens == b.tokens:
        return "equal"
    name, tokens = spelled(b.tokens), a.tokens + b.tokens
    option = name in [*"abcdefgh"] and re.fullmatch(r'\( "?([A-H]) \) [^A-H"]+', " ".join(a.tokens))
    choice = option or name and any(r.tokens in map(list, "ABCDEFGH") for r in (a, b))
    if choice or name and any(t[0] == '"' or len(t) > 3 and t.isalpha() for t in tokens):
        return "equal" if name == (option[1].lower() if option else spelled(a.tokens)) else "different"
    if a.tree is None or b.tree is None:
        return "unparsed_gold" if b.tree is None else "unparsed_answer"
    if not matches(a, b, answer.strip(), problem):
        return "different"
    return "restated" if problem and restates(a, b, problem) else "equal"


def matches(a, b, answer, problem):
    x, y = a.tree, b.tree
    ours, theirs = (DOMAINS & {t.strip("\\").removesuffix("s") for t in r.said} for r in (a, b))
    if not ours ^ theirs <= words("integer whole real") or ours and theirs and ours != theirs:
        return False                                 # only of these nothing need be said
    if y[0] == "or" and STRUCTURES.isdisjoint(t[0] for t in y[1:]) and all(agree(t, y[1]) for t in y[2:]):
        y = y[1]                                     # the gold gives one value in two forms: 30.4 or 152/5
    if x[0] == "num" and y[0] in LISTS and re.fullmatch(r"[1-9][0-9]{0,2}(,[1-9][0-9]{2})+", answer):
        x = ("list", *(("num", Fraction(part)) for part in answer.split(",")))
    if equal(x, y) or a.tied and not b.tied and equal(a.tied, y):
        return True
    ours, theirs = ({re.sub(r".+\(([a-z])\)$", r"\1", name) for name in variables(t) - variables(other)}
                    for t, other in ((x, y), (y, x)))
    if len(ours) != 1 or len(theirs) != 1 or theirs <= variables(x):
        return False
    (p,), (q,) = ours, theirs                        # f(z) = z for f(x) = x; k\pi, k \in \mathbb{Z} for n\pi
    turns = {p, q} <= set("jklmn") and re.search(rf"\\pi {q}\b|\b{q} \\pi", " ".join(b.tokens)) and not (
        problem and re.search(rf"(?<![A-Za-z\\]){q}(?![A-Za-z])", problem))
    bound = any(t[0] in ("assign", "rel") and str(t[-2]).endswith(f"({p})')") for t in nodes(x))
    if not (turns or bound or p in a.said or q in b.said or {p, q} == {"c", "C"}):
        return False
    for name in variables(x):
        x = substituted(x, ("var", name), ("var", q if name == p else name.replace(f"({p})", f"({q})")))
    return equal(x, y)


# ---- the problem's own formulas

FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)", re.DOTALL)


def bare(tokens):
    """Tokens in one string, without what may be written or not."""
    return " " + " ".join(t for t in tokens if t not in ("{", "}", "*", "\\times")) + " "


@functools.lru_cache(maxsize=256)
def formulas(problem):
    """The problem's tokens in one string, and every tree that stands in one of its formulas."""
    problem = problem[:MAX_CHARS].replace("\\boxed", "")         # "put your answer within \boxed{}"
    found = [read(next(filter(None, m.groups()))).tree for m in FORMULA.finditer(problem)]
    trees = {sorted_form(t) for tree in found if tree for t in nodes(tree) if is_operation(t)}
    return bare(tokenize(problem)), {*filter(is_operation, trees)}


def is_operation(tree):
    """Is there something to calculate: more than a number, a name, or a number times a name?"""
    if is_literal(tree) or tree[0] in STRUCTURES | {"var", "const", "num", "deg"}:
        return False
    scaled = tree[0] == "*" and len(tree) == 3 and is_literal(tree[1]) and tree[2][0] in ("var", "const")
    return not scaled and (tree[0] != "*" or not is_name(tree))


def sorted_form(tree):
    r"""Terms and factors in one order, without 1 \cdot, + 0, / 1, ^ 1, so that these disguise no formula.

    >>> sorted_form(read("1(x+2)+0").tree) == sorted_form(read("2+x").tree)
    True
    """
    kind, *parts = mapped(sorted_form, tree)
    if kind in ("+", "*"):
        neutral = ONE if kind == "*" else ZERO
        flat = itertools.chain(*(t[1:] if t[0] == kind else [t] for t in parts))
        parts = sorted((t for t in flat if t != neutral), key=str) or [neutral]           # 1 \times 1
    elif kind in ("/", "^") and parts[1] == ONE:
        del parts[1]
    return parts[0] if kind in ("+", "*", "/", "^") and len(parts) == 1 else (kind, *parts)


def restates(a, b, problem):
    r"""Does the answer, or an element of it, stand in the problem's formulas, and is no part of the gold?

    >>> restates(read("45x+30"), read("15(3x+2)"), "Factor $45x+30$.")
    True
    """
    run, trees = formulas(problem)
    repeated = trees & {sorted_form(x[2] if x[0] == "assign" else x) for x in items(a.tree)}
    if repeated and not repeated <= {*map(sorted_form, nodes(b.tree))}:
        return True
    text, gold = bare(a.tokens), bare(b.tokens)
    in_gold = a.tree == b.tree or text in gold or text.endswith(gold)    # x^2 for f(x) = x^2, AB = 5 for 5
    inner = (text.rpartition(" = ")[2] if a.tree[0] == "assign" else text).strip("( )")
    return not in_gold and f" {inner} " in run and any(map(is_operation, nodes(a.tree)))


# ---- public interface

def gold_texts(gold):
    r"""The accepted texts of a gold: a text (forms separated by \text{OR}), a number, or a list of them."""
    if isinstance(gold, str):
        return [*dict.fromkeys([gold, *re.split(r"\\text\s*\{\s*OR\s*\}", gold)])]
    if isinstance(gold, (list, tuple)):
        return [text for g in gold if not isinstance(g, (list, tuple)) for text in gold_texts(g)]
    with contextlib.suppress(ValueError, OverflowError):             # more digits than Python converts
        if isinstance(gold, (int, float, Fraction)) and not isinstance(gold, bool) and math.isfinite(gold):
            return [str(gold)]
    return []


def judge(found, gold, problem=None):
    """The Verdict on the last boxes of a response: equal if any text of the gold is.

    The last box is the answer; but boxes in a row, one for each part, together answer a gold that is a list.
    """
    global _deadline, _ticks
    verdicts = [Verdict(0.0, "unparsed_gold", found[-1], gold)]
    for text in gold_texts(gold):
        with _lock:
            _deadline, _ticks, answer = time.monotonic() + SECONDS, 0, found[-1]
            try:
                if len(found) > 1:
                    lists = [(read(part).tree or " ")[0] in LISTS for part in (text, *found)]
                    answer = ", ".join(found) if lists[0] and not any(lists[1:]) else answer
                reason = compare(answer, text, problem)
            except Undecided as error:
                reason = "timeout" if "time" in str(error) else "too_large"
            except REFUSALS:
                reason = "different"
            except Exception as error:               # noqa: BLE001  a fault of this file, said aloud
                reason = f"error: {type(error).__name__}: {error}"
                warnings.warn(f"grading {answer[:200]!r} against {text[:200]!r}: {reason}", RuntimeWarning)
        verdicts.append(Verdict(float(reason == "equal"), reason, answer, gold))
    return max(verdicts, key=lambda v: (v.reward, v.reason != "unparsed_gold"))


def grade(answer, gold, problem=None):
    r"""Does `answer` (the text inside the box) equal `gold`, a text, a number, or a list of which any counts?

    What cannot be read is wrong.  The conventions, by example:

    >>> def check(right, *pairs):
    ...     assert all(grade(*pair) is right for pair in pairs)
    >>> check(True, (r"\dfrac12", "0.5"), ("3*sqrt(13)", r"3\sqrt{13}"), (r"0.\overline{3}", "1/3"))
    >>> check(False, ("3.14", r"\pi"), ("0.33", r"\frac13"), ("10001", "10000"))             # no tolerance
    >>> check(True, (r"1,\!000", "1000"), ("025", "25"), ("8e7", r"8\cdot10^7"), (r"1\frac45", "9/5"))
    >>> check(True, (r"50\%", "50"), (r"90^\circ", r"\pi/2"), (r"\$36", r"36 \text{ dollars}"))
    >>> check(False, ("0.5", r"50\%"), (r"5 \text{ million}", "5"), (r"\text{odd}", r"\text{even}"))
    >>> check(True, ("x=5", "5"), ("f(z)=2z", "f(x)=2x"), ("(p,q)=(3,2)", "(3,2)"), ("y-3=2x", "y=2x+3"))
    >>> check(False, ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"), ("2x=10", "x=5"))
    >>> check(True, ("2, 1", r"\{1,2\}"), ("1 and 2", r"2 \text{ or } 1"), (r"3 \pm 1", "2, 4"))
    >>> check(False, ("5 or 6", "5"), ("4,5,6", "5"), ("1", "1,2"), ("1,2,3", "1,2"), (r"\pm 2", "2"))
    >>> check(True, ("x > 2", r"(2,\infty)"), (r"x \in [-2,7)", r"-2 \le x < 7"), ("all reals", r"\mathbb R"))
    >>> check(True, (r"\textbf{(C)}", "C"), ("yes", r"\text{Yes}"), ("52_{8}", "52_8"), ("5/8", "5:8"))
    >>> check(False, ("52_9", "52_8"), ("4:1", "1:4"), ("2:8", "1:4"), ("B", r"\text{(C)}"), ("3/30", "3:30"))
    >>> check(False, ("3+4", "7"), (r"\log_2 8", "3"), ("45x+30", "15(3x+2)", "Factor $45x+30$."))
    """
    return explain_answer(answer, gold, problem).reward == 1.0


def explain_answer(answer, gold, problem=None):
    """`explain` for the text inside the box."""
    return judge([answer if isinstance(answer, str) else ""], gold, problem)


def explain(response, gold, problem=None, require_think=True):
    r"""The `Verdict` on a whole response; with the problem, repeating a formula of it earns nothing.

    >>> explain(r"<think>...</think> \boxed{x+1}", r"1+x")
    Verdict(reward=1.0, reason='equal', answer='x+1', gold='1+x')
    >>> explain(r"</think> \boxed{1}, \boxed{2} and \boxed{3}", "3, 2, 1").answer, explain("5", "5").reason
    ('1, 2, 3', 'no_close')
    """
    if found := last_boxes(response, require_think):
        return judge(found, gold, problem)
    closed = isinstance(response, str) and ("</think>" in response or not require_think)
    return Verdict(0.0, "no_box" if closed else "no_close", None, gold)


def compute_reward(response, gold, problem=None, require_think=True):
    r"""1.0 if the last box after the last </think> holds the gold, else 0.0.

    >>> compute_reward(r"</think> \boxed{8!-7!}", "35280", problem="Find $8!-7!$.")
    0.0
    """
    return explain(response, gold, problem, require_think).reward


def compute_rewards(responses, golds, problems=None, workers=0, require_think=True):
    r"""Rewards of many responses, in order; from any thread, under fork and spawn.

    One process grades thousands a second and bounds the time of each: `workers` is accepted, not needed.

    >>> compute_rewards([r"</think>\boxed{1}", r"</think>\boxed{2}"], ["1", "1"])
    [1.0, 0.0]
    """
    rows = zip(responses, golds, problems or [None] * len(golds), strict=True)
    return [compute_reward(*row, require_think) for row in rows]


def main():
    parser = argparse.ArgumentParser(description="Grade one answer, or a file of JSON lines.")
    parser.add_argument("file", nargs="?", help='rows {"response" or "answer", "gold", "problem"}')
    parser.add_argument("--answer", help="text inside the box")
    parser.add_argument("--gold", help="the right answer")
    parser.add_argument("--problem", help="the problem's text, so that repeating it earns nothing")
    args = parser.parse_args()
    if not args.file:
        if args.answer is None or args.gold is None:
            parser.error("give FILE.jsonl, or --answer and --gold")
        verdict = explain_answer(args.answer, args.gold, args.problem)
        return print("\n".join(f"{name:8s} {shown}" for name, shown in verdict._asdict().items()))
    reasons = collections.Counter()
    try:
        with open(args.file) as file:
            for n, row in enumerate(map(json.loads, file), 1):
                if not isinstance(row, dict) or "gold" not in row or not row.keys() & {"response", "answer"}:
                    raise ValueError(f'line {n} of {args.file} needs "gold", and "response" or "answer"')
                explained, text = (explain, "response") if "response" in row else (explain_answer, "answer")
                reasons[explained(row[text], row["gold"], row.get("problem")).reason] += 1
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for reason, n in reasons.most_common():
        print(f"{n:8d}  {reason}")
    print(f"{reasons['equal']} of {reasons.total()} right")


if __name__ == "__main__":
    serve_sympy() if sys.argv[1:] == ["--worker"] else main()
