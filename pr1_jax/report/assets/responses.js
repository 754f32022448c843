// The viewer: filters, the list of responses, and the one that is read.

const PICTURES = { mask: false, positions: false };
const filter = { run: -1, group: "", verdict: "", blocks: "", text: "" };
let entries = [], shown = [], reading = null, rowSize = null;
const ROW_SIZES = [[1, "1"], [4, "4"], [16, "16"], [64, "64"], [0, "all"]];

const SIGNS = { correct: ["\u2713", "correct"], incorrect: ["\u00d7", "wrong"],
  undecided: ["?", "undecided"] };
function verdictSign(record) {
  const [sign, words] = SIGNS[record.verdict] || ["\u00b7", record.verdict || "no verdict"];
  const kind = SIGNS[record.verdict] ? record.verdict : "undecided";
  return el("i", { class: `verdict ${kind}`, title: words, "aria-label": words }, sign);
}

const responseText = (record) =>
  record.trace ? record.trace.pieces.join("") : record.response || "";
const groupTitle = (group) => (group.step === null ? group.name : `${group.stage} ${group.step}`);

// --- Filters -----------------------------------------------------------------------

function choice(name, label, options) {
  return el("div", { class: "switch", role: "group", "aria-label": label },
    ...options.map(([value, words]) => el("button", { type: "button", "data-filter": name,
      "data-value": value, "aria-pressed": String(filter[name] === value),
      onclick: () => setFilter({ [name]: value }) }, words)));
}

function picker(name, label, options) {
  return el("label", { class: "pick" }, el("span", { class: "label" }, label),
    el("select", { id: `filter-${name}`, onchange: (event) =>
      setFilter({ [name]: name === "run" ? Number(event.target.value) : event.target.value }) },
    ...options.map(([value, words]) => el("option", { value }, words))));
}

function makeResponses() {
  // The newest first: what the trained model says is read before what it said untrained.
  entries = RUNS.flatMap((run, number) => [...run.responses].reverse().flatMap((group) =>
    group.records.map((record) => ({ run, number, group, record }))));
  byId("left-out").textContent = RUNS.map((run) => run.left_out).join(" ");
  if (!entries.length) {
    byId("viewer").hidden = true;
    byId("filters").append(el("p", { class: "note" }, "No responses have been written yet."));
    return;
  }
  const names = [...new Map(entries.map((e) =>
    [`${e.group.stage}/${e.group.step}`, groupTitle(e.group)])).entries()];
  byId("filters").append(
    SINGLE ? "" : picker("run", "Run", [[-1, "all"], ...RUNS.map((run, i) => [i, run.name])]),
    picker("group", "Step", [["", `all ${names.length}`], ...names]),
    choice("verdict", "Verdict", [["", "all"], ["correct", "correct"], ["incorrect", "wrong"],
      ["undecided", "undecided"]]),
    choice("blocks", "Blocks", [["", "all"], ["with", "with blocks"], ["without", "without"]]),
    el("input", { type: "search", id: "filter-text", placeholder: "Search text",
      "aria-label": "Search in questions and responses",
      oninput: (event) => setFilter({ text: event.target.value }) }));
  byId("list").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !shown.length) return;
    event.preventDefault();
    const next = Math.min(Math.max(shown.indexOf(reading) + by, 0), shown.length - 1);
    readEntry(shown[next]);
    byId("list").children[next].firstChild.focus();
  });
  setFilter({});
  const newest = shown.filter((e) => e.group === shown[0].group);
  const isCorrect = (e) => e.record.verdict === "correct";
  readEntry(newest.find((e) => e.record.blocks && isCorrect(e)) || newest.find(isCorrect) ||
    newest.find((e) => e.record.blocks) || newest[0]);
}

function matches(entry) {
  const { record, group } = entry;
  if (filter.run >= 0 && entry.number !== filter.run) return false;
  if (filter.group && `${group.stage}/${group.step}` !== filter.group) return false;
  if (filter.verdict && record.verdict !== filter.verdict) return false;
  if (filter.blocks && (filter.blocks === "with") !== record.blocks > 0) return false;
  const text = filter.text.toLowerCase();
  return !text || responseText(record).toLowerCase().includes(text) ||
    record.question.toLowerCase().includes(text);
}

function setFilter(change) {
  Object.assign(filter, change);
  for (const button of byId("filters").querySelectorAll("[data-filter]")) {
    const isOn = filter[button.dataset.filter] === button.dataset.value;
    button.setAttribute("aria-pressed", String(isOn));
  }
  for (const name of ["group", "run"]) {
    const select = byId(`filter-${name}`);
    if (select) select.value = filter[name];
  }
  shown = entries.filter(matches);
  byId("count").textContent = `${shown.length} of ${plural(entries.length, "response")}`;
  byId("list").replaceChildren(...shown.map(listRow));
  if (reading && shown.includes(reading)) markRead();
  else readEntry(shown[0]);
}

function listRow(entry) {
  const { record } = entry;
  const facts = [groupTitle(entry.group), plural(record.blocks || 0, "block"),
    plural(record.tokens || 0, "token")];
  return el("li", {}, el("button", { type: "button", onclick: () => readEntry(entry, true) },
    verdictSign(record), el("span", { class: "clip" }, record.question || responseText(record)),
    el("small", {}, SINGLE ? null : runDot(entry.number), facts.join(" \u00b7 "))));
}

function markRead() {
  shown.forEach((entry, i) => {
    const row = byId("list").children[i].firstChild;
    if (entry === reading) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
}

// --- One response ------------------------------------------------------------------

function readStep(number, group, record) {
  setFilter({ run: SINGLE ? -1 : number, group: `${group.stage}/${group.step}`, verdict: "",
    blocks: "", text: "" });
  byId("filter-text").value = "";
  readEntry(shown.find((e) => !record || e.record === record));
  if (innerWidth < 900) closeStep();
  scrollTo(byId("responses"));
}

function readEntry(entry, isAsked = false) {
  reading = entry;
  markRead();
  byId("tip").hidden = true;
  const root = byId("response");
  root.replaceChildren();
  if (!entry) {
    root.append(el("p", { class: "note" }, "No response is of this kind."));
    return;
  }
  const { record } = entry, tokens = tokensOf(record, entry.run.grammar);
  root.append(summary(entry, tokens), taskNode(record));
  const holder = el("div", {});
  root.append(tools(entry, tokens, holder), holder);
  drawTrace(tokens, holder, entry);
  if (isAsked && innerWidth < 900) scrollTo(root);
}

// What was asked, and what counts as right.
function taskNode(record) {
  const part = (label, ...words) => [el("span", { class: "label" }, label), el("p", {}, ...words)];
  return el("div", { class: "question" }, ...part("Question", record.question.trim()),
    ...(record.asked ? part("What is asked", record.asked) : []),
    ...part("What counts as right", "A final answer equal to ", el("b", {}, record.answer || NONE)));
}

function meanOf(values) {
  return values && values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

function summary(entry, tokens) {
  const { record } = entry;
  const [, words] = SIGNS[record.verdict] || ["", record.verdict || "no verdict"];
  const steps = record.steps ?? tokens.steps, count = record.tokens ?? tokens.length;
  const same = (record.identical || []).filter(Boolean).length;
  const fact = (label, value) => el("div", {}, el("span", { class: "label" }, label),
    el("b", {}, value));
  return el("header", {}, el("p", { class: "judged" }, verdictSign(record), el("b", {}, words),
    record.reason ? el("span", {}, ` \u2013 ${record.reason}`) : null),
  el("div", { class: "facts" }, fact("from", groupTitle(entry.group)),
    fact("reward", record.reward === null ? NONE : digits(record.reward, record.saved ? 2 : 1)),
    record.saved ? fact("of it for few steps", digits(record.saved, 2)) : null,
    fact("blocks", record.blocks ?? NONE), fact("tokens", count), fact("sequential steps", steps),
    record.division ? fact("distinct work in paths", write(meanOf(record.division), "share")) : null,
    same ? fact("blocks with identical paths", `${same} of ${record.identical.length}`) : null,
    record.format_ok ? null : fact("format", "faulty"),
    record.finished ? null : fact("ended", "at its budget")));
}

function tools(entry, tokens, holder) {
  const longest = Math.max(0, ...partsOf(tokens).flatMap((p) =>
    p.kind === "block" ? p.paths.map((x) => x.length) : []));
  const preferred = longest > 240 ? 64 : longest > 24 ? 16 : 4;
  const redraw = () => {
    drawTrace(tokens, holder, entry);
    for (const button of box.querySelectorAll("[data-size]")) {
      const isOn = Number(button.dataset.size) === (rowSize ?? preferred);
      button.setAttribute("aria-pressed", String(isOn));
    }
    for (const button of box.querySelectorAll("[data-picture]")) {
      button.setAttribute("aria-pressed", String(PICTURES[button.dataset.picture]));
    }
  };
  holder.preferred = preferred;
  const sizes = longest ? el("div", { class: "switch", role: "group",
    "aria-label": "Sequential steps in a row" }, el("span", { class: "label" }, "Steps a row"),
  ...ROW_SIZES.map(([size, words]) => el("button", { type: "button", "data-size": size,
    "aria-pressed": String(size === (rowSize ?? preferred)),
    onclick: () => { rowSize = size; redraw(); } }, words))) : null;
  const pictures = el("div", { class: "switch", role: "group", "aria-label": "Pictures" },
    ...Object.keys(PICTURES).map((name) => el("button", { type: "button", "data-picture": name,
      "aria-pressed": String(PICTURES[name]),
      onclick: () => { PICTURES[name] = !PICTURES[name]; redraw(); } }, name)));
  const box = el("div", { class: "tools" }, sizes, pictures);
  return box;
}

function drawTrace(tokens, holder, entry) {
  const pictures = [];
  if (PICTURES.mask) pictures.push(maskNode(tokens, entry.run.variant === "structured"));
  if (PICTURES.positions) pictures.push(positionsNode(tokens));
  const shades = ["> 90 %", "", "", "", "", "< 1 %"].map((words, i) =>
    el("span", { class: `t s${i}` }, words || "\u2002"));
  const legend = tokens.isExact
    ? el("p", { class: "legend" }, el("span", {}, "probability ", ...shades),
      el("span", {}, el("span", { class: "t forced" }, "forced"), " by the runtime"),
      el("span", {}, "numbers at the left: sequential step"))
    : el("p", { class: "legend" }, "Text alone: words stand for tokens, steps are those of " +
      "words. Log-probs are in the file if report.traces kept them.");
  holder.replaceChildren(...(pictures.length ? [el("div", { class: "drawings" }, ...pictures)] : []),
    legend, traceNode(tokens, rowSize ?? holder.preferred, entry.record));
}
