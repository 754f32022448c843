// Headline, evaluations with their intervals, benchmarks, and configs as differences.

function headline() {
  const run = RUNS[0], root = byId("headline");
  if (!SINGLE || !run.evaluations.length) { root.hidden = true; return; }
  const evaluations = run.evaluations.filter((e) => e.name.startsWith("eval_"));
  const last = evaluations[evaluations.length - 1], first = evaluations[0];
  if (!last) { root.hidden = true; return; }
  const box = (label, value, note) => el("div", {}, el("span", { class: "label" }, label),
    el("strong", {}, value), el("small", {}, note));
  const v = last.values, was = first.values;
  const bounds = [v["eval/accuracy_low"], v["eval/accuracy_high"]];
  const from = (text) => (first === last ? "" : `from ${text} at the start`);
  const hasBounds = bounds.every((x) => x !== undefined && x !== null);
  root.append(
    box("Held-out accuracy", write(v["eval/accuracy"], "share"), [
      hasBounds ? `95 % interval ${bounds.map((x) => digits(100 * x, 1)).join("\u2013")}` : "",
      first === last ? "" : `${hasBounds ? ", " : ""}${from(write(was["eval/accuracy"], "share"))}`,
    ].join("")),
    box("With a block", write(v["eval/parallel_ratio"], "share"),
      from(write(was["eval/parallel_ratio"], "share"))),
    box("Tokens", write(v["eval/total_tokens"], "count"),
      `in ${write(v["eval/sequential_steps"], "count")} sequential steps`),
    box("Tokens a step", `${digits(v["eval/self_parallelism"] || 1, 2)}\u00d7`,
      from(`${digits(was["eval/self_parallelism"] || 1, 2)}\u00d7`)));
}

const COLUMNS = [
  ["accuracy", (v) => interval(v, "eval/accuracy")],
  ["blocks banned", (v) => interval(v, "eval/accuracy_banned")],
  ["pass@k", (v) => interval(v, "eval/pass_at_k")],
  ["with a block", (v) => [write(v["eval/parallel_ratio"], "share")]],
  ["tokens", (v) => [write(v["eval/total_tokens"], "count")]],
  ["steps", (v) => [write(v["eval/sequential_steps"], "count")]],
  ["tokens a step", (v) => [v["eval/self_parallelism"] ? digits(v["eval/self_parallelism"], 2) : NONE]],
  ["well formed", (v) => [write(v["eval/format_ok"], "share")]],
  ["undecided", (v) => [write(v["eval/undecided"], "share")]],
];

function table(head, rows) {
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, ...rows.map(([first, ...cells]) => el("tr", {},
      el("th", { scope: "row" }, first), ...cells.map((c) => el("td", {}, c)))))));
}

function evaluationTables() {
  const root = byId("evaluations");
  const all = RUNS.flatMap((run, number) => run.evaluations
    .filter((e) => !e.name.startsWith("benchmark_")).map((e) => ({ run, number, ...e })));
  const isFinal = (e) => e.name === lastName(e.run);
  const shown = SINGLE ? all : all.filter(isFinal);
  if (shown.length) {
    const used = COLUMNS.filter(([, cell]) => shown.some((e) =>
      cell(e.values).some((x) => x !== NONE)));
    const name = (e) => (SINGLE ? e.name : [runDot(e.number), `${e.run.name}, ${e.name}`]);
    root.append(table([SINGLE ? "evaluation" : "run, last evaluation", ...used.map(([h]) => h)],
      shown.map((e) => [name(e), ...used.map(([, cell]) => cell(e.values))])));
    root.append(el("p", { class: "note" },
      "Small figures are 95 % intervals over problems, by bootstrap."));
  } else {
    root.append(el("p", { class: "note" }, "Nothing has been evaluated yet."));
  }
  RUNS.forEach((run, number) => benchmarkTable(root, run, number));
}

function lastName(run) {
  const names = run.evaluations.map((e) => e.name).filter((n) => !n.startsWith("benchmark_"));
  return names[names.length - 1];
}

function runDot(number) {
  const dot = el("i", { class: "dot" });
  dot.style.background = `var(--run${number % 6})`;
  return dot;
}

function benchmarkTable(root, run, number) {
  const modes = Object.entries(run.benchmarks || {});
  if (!modes.length) return;
  const rows = [];
  for (const [mode, found] of modes) {
    for (const [name, v] of Object.entries(found || {})) {
      rows.push([`${mode} \u00b7 ${name}`, interval(v, "accuracy"), interval(v, "pass_at_k"),
        write(v.parallel_ratio, "share"), write(v.total_tokens, "count"),
        write(v.sequential_steps, "count"), write(v.accuracy_string, "share")]);
    }
  }
  root.append(el("h3", {}, SINGLE ? "Benchmarks" : [runDot(number), `Benchmarks of ${run.name}`]),
    table(["mode \u00b7 benchmark", "mean@k", "pass@k", "with a block", "tokens", "steps",
      "string checker"], rows));
}

function configTable() {
  const root = byId("fields");
  const code = (text) => el("code", {}, text);
  if (SINGLE) {
    const run = RUNS[0];
    root.append(el("p", {}, run.fields.length
      ? `What differs from ${run.base}. The rest is in config.json.`
      : `Exactly ${run.base}.`));
    if (run.fields.length) {
      root.append(table(["field", "this run", "base"],
        run.fields.map(([name, ...values]) => [code(name), ...values.map(code)])));
    }
    return;
  }
  root.append(el("p", {}, DATA.fields.length
    ? "Fields in which the runs are not all equal." : "The runs have one and the same config."));
  if (DATA.fields.length) {
    root.append(table(["field", ...RUNS.map((run, i) => [runDot(i), run.name])],
      DATA.fields.map(([name, ...values]) => [code(name), ...values.map(code)])));
  }
}
