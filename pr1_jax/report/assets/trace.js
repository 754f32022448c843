// A response as what it is: a main stream that forks into paths and joins again.
//
// Time is the sequential step: paths of a block run side by side, so that token k of each
// is at one height. Rows hold some steps each; in a row text wraps, between rows it aligns.

const TAGS = /(<\/?(?:Parallel|Path|Summary)>)/;
const PLANNED_TAGS = /(<\/?(?:Parallel|Plan|Path|Summary)>)/; // where blocks are planned
const CHUNK = 48; // tokens of the main stream in a row, at least

// --- From a record to tokens -------------------------------------------------------

function tokensOf(record, grammar) {
  if (record.tokens_made) return record.tokens_made;
  const tags = grammar.planned ? PLANNED_TAGS : TAGS;
  const tokens = record.trace ? traced(record.trace)
    : fromText(record.response || "", grammar.labels, tags);
  for (const token of tokens) token.isTag = tags.test(token.text);
  let time = 0, block = 0, longest = 0, inPath = 0, path = 0;
  for (const token of tokens) {
    if (token.path) {
      if (token.block !== block) { block = token.block; longest = 0; path = 0; }
      if (token.path !== path) { path = token.path; inPath = 0; }
      token.time = time + inPath++;
      longest = Math.max(longest, inPath);
    } else {
      time += longest;
      longest = 0;
      token.time = time++;
    }
  }
  tokens.steps = time + longest;
  tokens.isExact = Boolean(record.trace);
  tokens.prompt = record.trace ? record.trace.prompt : 0;
  record.tokens_made = tokens;
  return tokens;
}

function traced(trace) {
  const tokens = [];
  for (const [count, position, block, path, forced] of trace.spans) {
    for (let i = 0; i < count; i++) {
      const index = tokens.length;
      const text = trace.pieces[index], before = tokens[index - 1];
      // What the runtime writes behind <Path> is the path's label.
      const isLabel = Boolean(path && forced && before && before.path === path &&
        before.block === block && (isTag(before, "<Path>") || before.isLabel) && !isTag({ text }, "</Path>"));
      tokens.push({ index, text, surprise: trace.surprise[index] / 100, position: position + i, block,
        path, forced, isLabel });
    }
  }
  return tokens;
}

// Without a trace words stand for tokens, and tags alone tell what is a path.
function fromText(text, labels, tags) {
  const tokens = [];
  let block = 0, path = 0, isInside = false, isInPath = false;
  const add = (piece, isLabel = false) => tokens.push({ index: tokens.length, text: piece,
    surprise: null, position: null, block: isInPath ? block : 0, path: isInPath ? path : 0, forced: 0,
    isLabel });
  for (let piece of text.split(tags)) {
    if (!piece) continue;
    const label = isInPath && isTag(tokens[tokens.length - 1], "<Path>") && labels[path - 1];
    if (label && piece.startsWith(label)) {
      add(label, true);
      piece = piece.slice(label.length);
    }
    if (piece === "<Parallel>") { add(piece); block++; path = 0; isInside = true; continue; }
    if (piece === "<Path>" && isInside) { path++; isInPath = true; }
    if (piece === "</Parallel>") isInside = isInPath = false;
    if (tags.test(piece)) add(piece);
    else for (const word of piece.match(/\s*\S+|\s+$/g) || []) add(word);
    if (piece === "</Path>") isInPath = false;
  }
  return tokens;
}

const isTag = (token, name) => token.text.trim() === name;

// Main stream, block, main stream, …: each with its tokens, and what joins them.
function partsOf(tokens) {
  const parts = [];
  let part = null;
  const open = (kind, more = {}) => parts.push((part = { kind, tokens: [], ...more }));
  for (const token of tokens) {
    if (token.path) {
      if (!part || part.kind !== "block" || part.block !== token.block) {
        open("block", { block: token.block, paths: [], join: [], ...takeFork(parts) });
      }
      (part.paths[token.path - 1] = part.paths[token.path - 1] || []).push(token);
    } else if (part && part.kind === "block" && isTag(token, "</Parallel>")) {
      part.join.push(token);
    } else if (part && part.kind === "block" && part.join.length === 1 && !token.text.trim()) {
      part.join.push(token);
    } else if (isTag(token, "<Summary>")) {
      open("summary");
      part.tokens.push(token);
    } else {
      const isOver = part && part.kind === "summary" && part.isClosed;
      if (!part || part.kind === "block" || isOver) open("main");
      part.tokens.push(token);
      if (part.kind === "summary" && isTag(token, "</Summary>")) part.isClosed = true;
    }
  }
  for (const p of parts) if (p.paths) p.paths = p.paths.filter(Boolean);
  return parts.filter((p) => p.tokens.length || p.kind === "block");
}

// Takes <Parallel> and what follows it from the main stream; plans are told apart by their tags.
function takeFork(parts) {
  const { tokens } = parts[parts.length - 1] || { tokens: [] }, plans = [];
  const at = tokens.findLastIndex((t) => t.isTag && isTag(t, "<Parallel>"));
  const next = tokens[at + 1];
  if (at < 0 || (next && !(next.isTag && isTag(next, "<Plan>")))) return { fork: [], plans };
  const [fork, ...rest] = tokens.splice(at);
  for (const token of rest) {
    if (token.isTag && isTag(token, "<Plan>")) plans.push([]);
    plans[plans.length - 1].push(token);
  }
  return { fork: [fork], plans };
}

// --- From tokens to the page -------------------------------------------------------

// Shade by probability: over 0.9 none, below 0.01 full.
const SHADES = [0.105, 0.36, 0.92, 2.3, 4.6];

function tokenNode(token) {
  const shade = token.surprise === null || token.forced ? 0
    : SHADES.filter((limit) => token.surprise > limit).length;
  const names = `t s${shade}${token.forced ? " forced" : ""}${token.isTag ? " tag" : ""}`;
  return el("span", { class: names, "data-i": token.index },
    token.text === "" ? "\u2205" : token.text.replaceAll("\n", "\u21b5\n"));
}

function rowOfTokens(tokens, kind) {
  return el("div", { class: `row ${kind}` },
    el("span", { class: "time" }, tokens.length ? tokens[0].time : ""),
    el("div", { class: "cell" }, ...tokens.map(tokenNode)));
}

// Rows of the main stream end at a line's end, so that text is not torn apart.
function mainRows(tokens, kind) {
  const rows = [];
  let current = [];
  for (const token of tokens) {
    current.push(token);
    if (current.length >= CHUNK && token.text.includes("\n")) {
      rows.push(rowOfTokens(current, kind));
      current = [];
    }
  }
  if (current.length) rows.push(rowOfTokens(current, kind));
  return rows;
}

// A path's label stands in its heading, apart from what the path says.
function labelOf(path) {
  const label = path.filter((t) => t.isLabel);
  return label.length ? [", label ", ...label.map(tokenNode)] : [];
}

// The plans of a block, each below the other.
function plansNode(plans) {
  return el("div", { class: "plans" }, ...plans.map((tokens, i) => {
    const row = rowOfTokens(tokens, "plan");
    row.lastChild.before(el("b", {}, `plan ${i + 1}`));
    return row;
  }));
}

// What a path's plan says, for its heading.
function planOf(plan) {
  const text = (plan || []).filter((t) => !t.isTag).map((t) => t.text).join("").trim();
  return text ? [": ", el("em", { title: text }, text), " \u00b7"] : [];
}

function blockNode(part, stepsPerRow, work) {
  const { paths, plans } = part, start = Math.min(...paths.map((p) => p[0].time));
  const longest = Math.max(...paths.map((p) => p.length));
  const all = paths.reduce((sum, p) => sum + p.length, 0);
  const size = stepsPerRow || longest;
  const grid = el("div", { class: "paths", role: "group", tabindex: "0",
    "aria-label": `Block ${part.block}: ${paths.length} paths side by side` });
  grid.style.setProperty("--paths", paths.length);
  grid.append(el("div", { class: `row heads${plans.length ? " planned" : ""}` }, el("span", { class: "time" }),
    ...paths.map((p, i) => el("div", { class: "cell" }, el("b", {}, `path ${i + 1}`),
      ...planOf(plans[i]), ` ${plural(p.length, "token")}`, ...labelOf(p)))));
  for (let from = 0; from < longest; from += size) {
    const cells = paths.map((p) => {
      const tokens = p.slice(from, from + size);
      const isLast = from < p.length && from + size >= p.length;
      const kind = tokens.length ? (isLast ? "cell ends" : "cell") : "cell over";
      return el("div", { class: kind }, ...tokens.filter((t) => !t.isLabel).map(tokenNode));
    });
    grid.append(el("div", { class: "row" }, el("span", { class: "time" }, start + from), ...cells));
  }
  const words = `${plural(all, "token")} in ${plural(longest, "step")}${work}`;
  return el("div", { class: "block" },
    el("div", { class: "fork" }, ...part.fork.map(tokenNode),
      el("span", {}, plans.length ? `${plural(plans.length, "plan")}, and a path for each`
        : `fork into ${paths.length} paths`)),
    ...(plans.length ? [plansNode(plans)] : []),
    grid,
    el("div", { class: "join" }, ...part.join.filter((t) => t.text.trim()).map(tokenNode),
      el("span", {}, part.join.length ? `join: ${words}` : `never joined: ${words}`)));
}

// What the paths of a block did apart, where all blocks of a record say so.
function workInWords(record, blocks) {
  const { division, identical } = record;
  if (!division || division.length !== blocks.length) return blocks.map(() => "");
  return division.map((share, i) => `; ${write(share, "share")} of the work is distinct` +
    (identical[i] ? ", paths are identical" : ""));
}

function traceNode(tokens, stepsPerRow, record) {
  const root = el("div", { class: "trace", tabindex: "0",
    "aria-label": "The response, token by token. Left and right arrow keys move." });
  const parts = partsOf(tokens), blocks = parts.filter((p) => p.kind === "block");
  const work = workInWords(record, blocks);
  for (const part of parts) {
    if (part.kind === "block") root.append(blockNode(part, stepsPerRow, work[blocks.indexOf(part)]));
    else if (part.kind === "summary") {
      root.append(el("div", { class: "summary" }, el("span", { class: "label" }, "summary"),
        ...mainRows(part.tokens, "main")));
    } else root.append(...mainRows(part.tokens, "main"));
  }
  if (!tokens.length) root.append(el("p", { class: "note" }, "The response is empty."));
  reader(root, tokens);
  return root;
}

// --- What one token is -------------------------------------------------------------

function visibleText(text) {
  return text === "" ? "(no text)" : text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u00b7")
    .replaceAll("\t", "\u21e5");
}

function tokenWords(token) {
  const rows = [];
  if (token.forced) rows.push(["written by", "the runtime, not the model"]);
  else if (token.surprise !== null) {
    const p = Math.exp(-token.surprise);
    rows.push(["log-prob", `${MINUS}${digits(token.surprise, 2)}`.replace(`${MINUS}0.00`, "0.00")],
      ["probability", p >= 0.001 ? digits(100 * p, 1) + " %" : p.toExponential(1)]);
  }
  rows.push(["step", token.time]);
  if (token.position !== null) rows.push(["position", token.position]);
  if (token.path) rows.push(["block, path", `${token.block}, ${token.path}`]);
  rows.push(["token", token.index]);
  return rows;
}

function reader(root, tokens) {
  const tip = byId("tip");
  let marked = null;
  const show = (node) => {
    if (marked) marked.classList.remove("on");
    marked = node;
    tip.hidden = !node;
    if (!node) return;
    node.classList.add("on");
    const token = tokens[Number(node.dataset.i)];
    tip.replaceChildren(el("code", {}, visibleText(token.text)),
      el("dl", {}, ...tokenWords(token).flatMap(([a, b]) => [el("dt", {}, a), el("dd", {}, b)])));
    const box = node.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const x = Math.min(Math.max(box.left, 8), innerWidth - size.width - 8);
    const isAbove = box.bottom + size.height + 12 > innerHeight;
    tip.style.left = `${x}px`;
    tip.style.top = `${isAbove ? box.top - size.height - 6 : box.bottom + 6}px`;
  };
  const under = (event) => event.target.closest(".t");
  root.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse") show(under(event));
  });
  root.addEventListener("pointerleave", () => show(null));
  root.addEventListener("click", (event) => show(under(event)));
  root.addEventListener("blur", () => show(null));
  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!by) return;
    event.preventDefault();
    const at = marked ? Number(marked.dataset.i) + by : 0;
    const node = root.querySelector(`[data-i="${Math.min(Math.max(at, 0), tokens.length - 1)}"]`);
    if (node) { node.scrollIntoView({ block: "nearest" }); show(node); }
  });
}
