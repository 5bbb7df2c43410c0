// Text reaches the document by textContent only; elements are made by name.
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const PAGE = 25, RENDER = 60000, NEST = 40;
const OUTCOMES = {right: "\u2713 right", wrong: "\u2717 wrong", truncated: "\u2026 truncated"};
const state = {shown: [], open: 0};

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Control characters and those that reorder text are shown as what they are
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f\u202a-\u202e\u2066-\u2069]/g;
// A slice may cut a surrogate pair in two
const HALVES = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const visible = text => text.replace(HALVES, "\ufffd").replace(CONTROLS,
  c => c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "[U+"
      + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "]");

// ---- TeX to MathML -------------------------------------------------------------------------------------------
const WORDS =
  "alpha \u03b1 beta \u03b2 gamma \u03b3 delta \u03b4 epsilon \u03f5 varepsilon \u03b5 zeta \u03b6 eta " +
  "\u03b7 theta \u03b8 vartheta \u03d1 iota \u03b9 kappa \u03ba lambda \u03bb mu \u03bc nu \u03bd xi " +
  "\u03be pi \u03c0 rho \u03c1 sigma \u03c3 tau \u03c4 upsilon \u03c5 phi \u03d5 varphi \u03c6 chi " +
  "\u03c7 psi \u03c8 omega \u03c9 Gamma \u0393 Delta \u0394 Theta \u0398 Lambda \u039b Xi \u039e Pi " +
  "\u03a0 Sigma \u03a3 Phi \u03a6 Psi \u03a8 Omega \u03a9 infty \u221e emptyset \u2205 varnothing " +
  "\u2205 ell \u2113 hbar \u210f partial \u2202 nabla \u2207 angle \u2220 triangle \u25b3 degree \u00b0 " +
  "prime \u2032 aleph \u2135 Re \u211c Im \u2111 ldots \u2026 dots \u2026 dotsc \u2026 cdots \u22ef " +
  "dotsb \u22ef vdots \u22ee ddots \u22f1 checkmark \u2713 square \u25a1 blacksquare \u25a0";
const SIGNS =
  "cdot \u22c5 times \u00d7 div \u00f7 pm \u00b1 mp \u2213 le \u2264 leq \u2264 leqslant \u2264 ge " +
  "\u2265 geq \u2265 geqslant \u2265 ne \u2260 neq \u2260 ll \u226a gg \u226b approx \u2248 equiv " +
  "\u2261 sim \u223c simeq \u2243 cong \u2245 propto \u221d to \u2192 rightarrow \u2192 longrightarrow " +
  "\u27f6 leftarrow \u2190 gets \u2190 Rightarrow \u21d2 Longrightarrow \u27f9 implies \u27f9 Leftarrow " +
  "\u21d0 iff \u27fa Leftrightarrow \u21d4 leftrightarrow \u2194 mapsto \u21a6 in \u2208 notin \u2209 " +
  "ni \u220b subset \u2282 subseteq \u2286 supset \u2283 supseteq \u2287 cup \u222a cap \u2229 setminus " +
  "\u2216 backslash \\ forall \u2200 exists \u2203 perp \u27c2 parallel \u2225 mid \u2223 nmid \u2224 " +
  "circ \u2218 bullet \u2022 star \u22c6 ast \u2217 oplus \u2295 otimes \u2297 land \u2227 wedge \u2227 " +
  "lor \u2228 vee \u2228 neg \u00ac lnot \u00ac langle \u27e8 rangle \u27e9 lfloor \u230a rfloor \u230b " +
  "lceil \u2308 rceil \u2309 lvert | rvert | vert | lVert \u2016 rVert \u2016 Vert \u2016 lbrace { " +
  "rbrace } lbrack [ rbrack ] colon : therefore \u2234 because \u2235 uparrow \u2191 downarrow \u2193";
const LARGE =
  "sum \u2211 prod \u220f int \u222b iint \u222c oint \u222e bigcup \u22c3 bigcap \u22c2 bigoplus " +
  "\u2a01 bigotimes \u2a02 coprod \u2210";
const LIMITS = "lim max min sup inf gcd limsup liminf argmax argmin Pr det";
const NAMES =
  "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp deg dim ker arg lcm hom " +
  "bmod mod";
const ACCENTS = {bar: "\u203e", hat: "^", widehat: "^", vec: "\u2192", overrightarrow: "\u2192",
    dot: "\u02d9", ddot: "\u00a8", tilde: "~", widetilde: "~", overbrace: "\u23de", check: "\u02c7", overarc:
    "\u2312", wideparen: "\u2312"};
const SPACES = {",": .17, ":": .22, ";": .28, "!": 0, " ": .25, quad: 1, qquad: 2, enspace: .5, thinspace: .17, "~":
    .25};
const SKIP = ("displaystyle textstyle scriptstyle limits nolimits big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr " +
  "Biggl Biggr bigm Bigm middle hline rm bf it nonumber notag hfill centering").split(" ");
const TEXTS = ("text textbf textit textrm texttt mathrm mathtt mbox hbox operatorname operatorname* textnormal " +
  "mathsf textsf").split(" ");
const table = line => new Map(line.split(" ").reduce((pairs, word, i, all) => i % 2 ? pairs : [...pairs, [word,
    all[i + 1]]], []));
const words = table(WORDS), signs = table(SIGNS), large = table(LARGE);
const limits = new Set(LIMITS.split(" ")), names = new Set(NAMES.split(" "));
const blackboard = {C: "\u2102", H: "\u210d", N: "\u2115", P: "\u2119", Q: "\u211a", R: "\u211d", Z: "\u2124", F:
    "\ud835\udd3d", E: "\ud835\udd3c"};

function m(tag, ...children) {
  const node = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag);
  for (const child of children) typeof child === "string" ? node.append(document.createTextNode(visible(child))) :
      node.append(child);
  return node;
}
function marked(node, name, value) { node.setAttribute(name, value); return node; }

// A parser of what models write; throws at what it cannot match up, and the caller shows the source
function parseTex(source, display) {
  const tokens = source.match(/\\[a-zA-Z]+\*?|\\[\s\S]|[\s\S]/gu) || [];
  let at = 0, depth = 0;
  const blank = () => { while (at < tokens.length && /^\s$/.test(tokens[at])) at++; };
  const peek = () => tokens[at];
  const fail = why => { throw new Error(why); };

  function row(stops) {
    if (++depth > NEST) fail("too deep");
    const out = m("mrow");
    for (blank(); at < tokens.length && !stops.includes(peek()); blank()) out.append(scripted());
    depth--;
    return out;
  }
  function group() {  // the source text between braces, for \text and environments
    blank();
    if (peek() !== "{") return tokens[at++] || fail("argument missing");
    let open = 0, text = "";
    for (; at < tokens.length; at++) {
      if (tokens[at] === "{" && open++ === 0) continue;
      if (tokens[at] === "}" && --open === 0) { at++; return text; }
      text += tokens[at];
    }
    fail("brace not closed");
  }
  function argument() {
    blank();
    if (at >= tokens.length || "}&^_".includes(peek())) fail("argument missing");
    return /^\d$/.test(peek()) ? m("mn", tokens[at++]) : atom();  // \frac12 is one half
  }
  function optional() {
    blank();
    if (peek() !== "[") return null;
    at++;
    const inner = row(["]"]);
    if (peek() !== "]") fail("bracket not closed");
    at++;
    return inner;
  }
  function scripted() {
    const token = peek();
    const base = "^_'".includes(token) ? m("mrow") : atom();
    let sub = null, sup = null;
    for (blank(); at < tokens.length && ["^", "_", "'", "\\limits", "\\nolimits"].includes(peek()); blank()) {
      const mark = tokens[at++];
      if (mark === "_") sub = sub ? fail("two subscripts") : argument();
      else if (mark === "^") sup = sup && !sup.prime ? fail("two superscripts") : sup ? m("mrow", sup, argument()) :
          argument();
      else if (mark === "'") { sup = m("mrow", ...(sup ? [sup] : []), m("mo", "\u2032")); sup.prime = true; }
    }
    const stacked = base.stacked || (base.large && display);
    if (sub && sup) return m(stacked ? "munderover" : "msubsup", base, sub, sup);
    return sub ? m(stacked ? "munder" : "msub", base, sub) : sup ? m(stacked ? "mover" : "msup", base, sup) : base;
  }
  function delimiter() {
    blank();
    const token = tokens[at++] || fail("delimiter missing");
    const sign = token === "." ? "" : token.startsWith("\\") ? signs.get(token.slice(1)) || (token === "\\|"
        ? "\u2016" : token.slice(1)) : token;
    return marked(marked(m("mo", sign), "stretchy", "true"), "fence", "true");
  }
  function grid(name) {
    const plain = name.replace("*", "");
    if (["array", "tabular", "alignat"].includes(plain)) group();
    const out = m("mtable");
    let line = m("mtr");
    for (;;) {
      const cell = m("mtd", row(["&", "\\\\", "\\cr", "\\end"]));
      const place = /^(align|split|eqnarray)/.test(plain) ? (line.children.length % 2 ? "left" : "end") :
          plain.endsWith("cases") ? "left" : "";
      line.append(place ? marked(cell, "class", place) : cell);
      const stop = tokens[at++];
      if (stop === undefined) fail("\\end missing");
      if (stop === "&") continue;
      if (line.textContent.trim() || stop !== "\\end") out.append(line);
      if (stop === "\\end") { if (group() !== name) fail("\\end of something else"); break; }
      if (peek() === "[") optional();
      line = m("mtr");
    }
    // fences are borders: a font without stretching brackets cannot spoil them
    const fence = {pmatrix: "round", bmatrix: "square", Bmatrix: "brace both", vmatrix: "bars", Vmatrix: "double",
        cases: "brace"}[plain];
    return fence ? marked(out, "class", fence) : out;
  }
  function atom() {
    const token = tokens[at++];
    if (token === "{") {
      const inner = row(["}"]);
      if (tokens[at++] !== "}") fail("brace not closed");
      return inner;
    }
    if (token === "}" || token === "&" || token === "^" || token === "_") fail("unexpected " + token);
    if (/^\d$/.test(token)) {
      let digits = token;
      while (at < tokens.length && (/^\d$/.test(peek()) || (peek() === "." && /^\d$/.test(tokens[at + 1]
          || "")))) digits += tokens[at++];
      return m("mn", digits);
    }
    if (/^\p{L}$/u.test(token)) return m("mi", token);
    if (token === "~") return marked(m("mspace"), "width", ".25em");
    if (!token.startsWith("\\")) {
      const sign = m("mo", token === "-" ? "\u2212" : token === "*" ? "\u2217" : token);
      return "()[]|/".includes(token) ? marked(sign, "stretchy", "false") : sign;
    }
    return command(token.slice(1), token);
  }
  function command(name, token) {
    if (words.has(name)) return m("mi", words.get(name));
    if (signs.has(name)) return marked(m("mo", signs.get(name)), "stretchy", "false");
    if (large.has(name)) { const node = m("mo", large.get(name)); node.large = !/int$/.test(name); return node; }
    if (limits.has(name)) { const node = m("mo", name.replace(/^(lim|arg)(?=.)/, "$1 ")); node.stacked = display;
        return marked(marked(node, "lspace", "0"), "rspace", ".17em"); }
    if (names.has(name)) return m("mrow", m("mi", name.replace("bmod", "mod")), marked(m("mspace"), "width", ".17em"));
    if (Object.hasOwn(SPACES, name)) return marked(m("mspace"), "width", SPACES[name] + "em");
    if (SKIP.includes(name)) return m("mrow");
    if (TEXTS.includes(name)) return m("mtext", group().replace(/\\([ $%&#_{}])/g, "$1").replace(/^ | $/g, "\u00a0"));
    if (Object.hasOwn(ACCENTS, name)) return marked(m("mover", argument(), m("mo", ACCENTS[name])), "accent", "true");
    if ("%$#&_{}".includes(name)) return m(name === "%" ? "mi" : "mo", name);
    if (name === "|") return m("mo", "\u2016");
    if (name === "\\" || name === "newline") return marked(m("mspace"), "width", "1em");
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": return m("mfrac", argument(), argument());
      case "binom": case "dbinom": case "tbinom":
        return m("mrow", m("mo", "("), marked(m("mfrac", argument(), argument()), "linethickness", "0"), m("mo", ")"));
      case "sqrt": { const index = optional(), inner = argument(); return index ? m("mroot", inner, index) :
          m("msqrt", inner); }
      case "boxed": case "fbox": return marked(m("mrow", argument()), "class", "boxed");
      case "mathbf": case "boldsymbol": case "bm": case "pmb": return marked(m("mrow", argument()), "class", "bold");
      case "mathcal": case "mathfrak": case "mathscr": case "mathit": case "mathop": case "mathbin": case "mathrel":
          case "ensuremath": return argument();
      case "mathbb": case "Bbb": { const letter = group(); return m("mi", blackboard[letter] || letter); }
      case "overline": return marked(m("mrow", argument()), "class", "over");
      case "underline": return marked(m("mrow", argument()), "class", "under");
      case "underbrace": return m("munder", argument(), m("mo", "\u23df"));
      case "overset": case "stackrel": { const top = argument(); return m("mover", argument(), top); }
      case "underset": { const low = argument(); return m("munder", argument(), low); }
      case "pmod": return m("mrow", m("mo", "("), m("mi", "mod"), marked(m("mspace"), "width", ".25em"), argument(),
          m("mo", ")"));
      case "not": return m("mrow", m("mo", "\u0338"), argument());
      case "tag": return m("mtext", "\u2003(" + group() + ")");
      case "left": {
        const open = delimiter(), inner = row(["\\right"]);
        if (tokens[at++] !== "\\right") fail("\\right missing");
        return m("mrow", open, inner, delimiter());
      }
      case "begin": return grid(group());
    }
    return marked(m("mtext", token), "class", "unknown");
  }
  return row([]);
}

function mathNode(source, tex, display) {
  try {
    const node = m("math", parseTex(tex, display));
    if (display) node.setAttribute("display", "block");
    node.setAttribute("title", visible(source));
    return node;
  } catch (error) {
    return element("code", "", visible(source));
  }
}

// The end of a brace group, or -1. Bounded: hostile text must not make this quadratic
function braceEnd(text, at, most) {
  for (let open = 0, i = at; i < text.length && i < at + most; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "{") open++;
    else if (text[i] === "}" && --open === 0) return i + 1;
  }
  return -1;
}

const BLOCKS = /^(align|aligned|gather|gathered|equation|eqnarray|[pbBvV]?matrix|cases|array|split|multline)\*?$/;

// Plain text with TeX in it, into `node`
function renderText(node, text, plain) {
  if (plain) { node.append(document.createTextNode(visible(text))); return; }
  const opener = /\\\[|\\\(|\\begin\{([a-zA-Z]+\*?)\}|\\(?:boxed|fbox)\s*(?=\{)|\\[\s\S]|\$\$|\$/g;
  const known = new Map(), MOST = 4000;
  const find = (what, from) => {  // indexOf that remembers, so that openers without an end stay cheap
    const old = known.get(what);
    if (old !== undefined && (old === -1 || old >= from)) return old;
    const hit = text.indexOf(what, from);
    known.set(what, hit);
    return hit;
  };
  let done = 0, boxes = 0;
  for (let hit; (hit = opener.exec(text));) {
    const [open, env] = hit, start = hit.index, inner = start + open.length;
    let end = -1, tex, display = false;
    if (open === "\\[" || open === "\\(" || open === "$$") {
      const close = {"\\[": "\\]", "\\(": "\\)", "$$": "$$"}[open], stop = find(close, inner);
      display = open !== "\\(";
      if (stop > inner && stop - inner <= MOST) { end = stop + 2; tex = text.slice(inner, stop); }
    } else if (open === "$") {
      let stop = find("$", inner);
      while (stop > 0 && text[stop - 1] === "\\" && stop - inner <= MOST) stop = find("$", stop + 1);
      const body = stop > inner && stop - inner <= 1000 ? text.slice(inner, stop) : "";
      // "$5 and $6" is money: no space inside the dollars, no digit behind them, no empty line between them
      if (body && !/^\s|\s$|\n\s*\n/.test(body) && !/\d/.test(text[stop + 1] || "")) { end = stop + 1; tex = body; }
    } else if (env && BLOCKS.test(env)) {
      const close = "\\end{" + env + "}", stop = find(close, inner);
      if (stop > 0 && stop - inner <= MOST) {
        end = stop + close.length;
        tex = /^(equation|multline)/.test(env) ? text.slice(inner, stop) : text.slice(start, end);
        display = true;
      }
    } else if (/^\\(boxed|fbox)/.test(open) && boxes++ < 500) {
      end = braceEnd(text, inner, MOST);
      tex = text.slice(start, end);
    }
    if (end < 0) continue;
    node.append(document.createTextNode(visible(text.slice(done, start))), mathNode(text.slice(start, end), tex,
        display));
    done = opener.lastIndex = end;
  }
  node.append(document.createTextNode(visible(text.slice(done))));
}

function textBlock(text, plain, className) {
  const node = element("div", className === undefined ? "text" : className);
  renderText(node, text.slice(0, RENDER), plain);
  if (text.length > RENDER) {
    const more = element("button", "", "show the other " + (text.length - RENDER).toLocaleString("en") + " characters");
    more.addEventListener("click", () => more.replaceWith(document.createTextNode(visible(text.slice(RENDER)))));
    node.append(more);
  }
  return node;
}

function lastBox(text) {
  let at = text.length;
  for (let tries = 0; at > 0 && tries < 50; tries++) {
    at = text.lastIndexOf("\\boxed", at - 1);
    if (at < 0) break;
    const open = text.slice(at + 6, at + 10).search(/\S/);
    const end = open >= 0 && text[at + 6 + open] === "{" ? braceEnd(text, at + 6 + open, 4000) : -1;
    if (end > 0) return text.slice(at + 7 + open, end - 1);
  }
  return "";
}

// ---- The page ------------------------------------------------------------------------------------------------
function setUp() {
  $("run").textContent = data.run;
  $("note").textContent = data.note
      + " A truncated sample was cut off at the limit; right and wrong are those that ended by themselves."
      + " Keys: j next, k previous.";
  const count = {all: data.samples.length};
  for (const s of data.samples) count[s.outcome] = (count[s.outcome] || 0) + 1;
  for (const name of ["all", ...Object.keys(OUTCOMES)]) {
    const box = element("input"), text = element("label", name);
    box.type = "radio"; box.name = "filter"; box.value = name; box.defaultChecked = name === "all";
    text.append(box, " " + (OUTCOMES[name] || "all") + " (" + (count[name] || 0).toLocaleString("en") + ")");
    $("outcomes").append(text);
  }
  const places = [...new Set(data.samples.map(s => s.where))];
  for (const place of ["", ...places]) {
    const option = element("option", "", place || "everywhere");
    option.value = place;
    $("where").append(option);
  }
  $("filters").addEventListener("input", delayed);
  $("filters").addEventListener("submit", event => { event.preventDefault(); apply(); });
  $("filters").addEventListener("reset", () => setTimeout(apply));
  for (const id of ["source", "think"]) $(id).addEventListener("change", detail);
  $("next").addEventListener("click", () => move(1));
  $("prev").addEventListener("click", () => move(-1));
  $("forth").addEventListener("click", () => go((Math.floor(state.open / PAGE) + 1) * PAGE));
  $("back").addEventListener("click", () => go((Math.floor(state.open / PAGE) - 1) * PAGE));
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey
        || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "j" || event.key === "ArrowRight") move(1);
    if (event.key === "k" || event.key === "ArrowLeft") move(-1);
  });
  window.addEventListener("hashchange", fromHash);
  fromHash();
}

let timer = 0;
function delayed() { clearTimeout(timer); timer = setTimeout(apply, 150); }

const FIELDS = ["min", "max", "from", "to", "where", "q"];
function fromHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const id of FIELDS) $(id).value = wanted.get(id) || "";
  for (const id of ["source", "think"]) if (wanted.has(id)) $(id).checked = wanted.get(id) === "1";
  for (const box of document.getElementsByName("filter")) box.checked = box.value === (wanted.get("filter") || "all");
  const boxes = [...document.getElementsByName("filter")];
  if (!boxes.some(box => box.checked)) boxes[0].checked = true;
  apply(Number(wanted.get("open") || 1) - 1);
}
function toHash() {
  const now = new URLSearchParams();
  const filter = document.querySelector("input[name=filter]:checked").value;
  if (filter !== "all") now.set("filter", filter);
  for (const id of FIELDS) if ($(id).value) now.set(id, $(id).value);
  if (state.open) now.set("open", state.open + 1);
  try { history.replaceState(null, "", "#" + now); } catch (error) { /* some browsers refuse it for files */ }
}

function apply(open) {
  const filter = document.querySelector("input[name=filter]:checked").value, where = $("where").value;
  const bound = (id, none) => $(id).value === "" || isNaN($(id).value) ? none : Number($(id).value);
  const min = bound("min", -Infinity), max = bound("max", Infinity), from = bound("from", -Infinity),
      to = bound("to", Infinity);
  const q = $("q").value.toLowerCase(), stepped = from > -Infinity || to < Infinity;
  const haystack = s => s.lower || (s.lower = (s.id + "\n" + s.answer + "\n" + data.problems[s.problem] + "\n"
      + s.response).toLowerCase());
  state.shown = data.samples.filter(s => (filter === "all" || s.outcome === filter) && (!where || s.where === where)
    && s.tokens >= min && s.tokens <= max && (!stepped || (s.step !== null && s.step >= from && s.step <= to))
        && (!q || haystack(s).includes(q)));
  go(typeof open === "number" && open > 0 ? Math.floor(open) : 0);
}

function go(index) {
  state.open = Math.max(0, Math.min(index, state.shown.length - 1));
  list();
  detail();
  toHash();
}
const move = by => { const to = state.open + by; if (to >= 0 && to < state.shown.length) go(to); };
const stepName = s => s.where + (s.step === null ? "" : ", step " + s.step);

function list() {
  const n = state.shown.length, first = Math.floor(state.open / PAGE) * PAGE;
  $("count").textContent = n.toLocaleString("en") + " of " + data.samples.length.toLocaleString("en") + " shown";
  $("page").textContent = n ? (first + 1) + "\u2013" + Math.min(first + PAGE, n) : "";
  $("back").disabled = first === 0;
  $("forth").disabled = first + PAGE >= n;
  $("rows").replaceChildren(...state.shown.slice(first, first + PAGE).map((s, i) => {
    const item = element("li"), button = element("button");
    button.type = "button";
    button.append(element("span", "badge " + s.outcome, OUTCOMES[s.outcome]), " " + stepName(s) + ", "
        + s.tokens.toLocaleString("en") + " tokens",
      element("span", "what", visible(data.problems[s.problem].slice(0, 120))));
    if (first + i === state.open) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => go(first + i));
    item.append(button);
    return item;
  }));
  const current = $("rows").querySelector("[aria-current]"), box = $("rows").parentNode;
  if (current) box.scrollTop = Math.max(0, current.offsetTop - box.clientHeight / 2);  // the list scrolls, not the page
}

function detail() {
  const s = state.shown[state.open], box = $("detail"), plain = $("source").checked;
  $("prev").disabled = state.open <= 0;
  $("next").disabled = state.open + 1 >= state.shown.length;
  if (!s) { box.replaceChildren(element("p", "soft", "No sample passes these filters.")); return; }
  const facts = element("dl"), fact = (name, value, math) => {
    if (value === "") return;
    const dd = element("dd");
    math && !plain ? dd.append(mathNode(value, value, false)) : dd.textContent = visible(value);
    facts.append(element("dt", "", name), dd);
  };
  const head = element("p");
  head.append(element("span", "badge " + s.outcome, OUTCOMES[s.outcome]), " \u00b7 " + stepName(s) + " \u00b7 "
      + s.tokens.toLocaleString("en") + " tokens");
  fact("expected", s.answer, true);
  fact("given", s.extracted || lastBox(s.response), true);
  fact("reward", s.reward + (s.reason ? ", " + s.reason : ""));
  fact("finished by", s.finish);
  fact("problem", (s.benchmark ? s.benchmark + ", " : "") + s.id + (s.sample === "" ? "" : ", sample " + s.sample));
  const parts = [head, facts, element("h2", "", "Problem"), textBlock(data.problems[s.problem], plain), element("h2",
      "", "Response")];
  const end = s.response.indexOf("</think>");
  if (end >= 0) {
    const thought = element("details"), cut = end + "</think>".length;
    thought.append(element("summary", "", "Thinking (" + cut.toLocaleString("en") + " characters)"));
    const fill = () => { if (thought.open
        && thought.children.length === 1) thought.append(textBlock(s.response.slice(0, cut), plain)); };
    thought.addEventListener("toggle", fill);
    thought.open = $("think").checked;
    fill();
    parts.push(thought, textBlock(s.response.slice(cut), plain));
  } else parts.push(textBlock(s.response, plain));
  box.replaceChildren(...parts);
}

setUp();
