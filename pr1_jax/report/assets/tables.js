// Headline, evaluations with their intervals, benchmarks, and configs as differences.

// What the last evaluation is compared with: the one after SFT, else the first one.
function baseline(evaluations) {
  const before = evaluations.slice(0, -1);
  const sft = before.filter((e) => /_sft$/.test(e.name)).pop();
  return sft ? { values: sft.values, words: "after SFT" }
    : before.length ? { values: before[0].values, words: "at the start" } : null;
}

function headline() {
  const run = RUNS[0], root = byId("headline");
  const evaluations = SINGLE ? run.evaluations.filter((e) => e.name.startsWith("eval_")) : [];
  root.hidden = !evaluations.length;
  if (root.hidden) return;
  const v = evaluations[evaluations.length - 1].values, before = baseline(evaluations);
  const box = (label, metric, ...notes) => {
    const was = before && before.values[metric];
    const from = was !== null && was !== undefined
      ? `from ${say(metric, was)} ${before.words}` : "";
    root.append(el("div", {}, el("span", { class: "label" }, label),
      el("strong", {}, say(metric, v[metric])),
      ...[from, ...notes].filter(Boolean).map((note) => el("small", {}, note))));
  };
  const bounds = [v["eval/accuracy_low"], v["eval/accuracy_high"]];
  const banned = v["eval/sequential_steps_banned"];
  box("Held-out accuracy", "eval/accuracy", bounds.every((x) => typeof x === "number")
    && `95 % interval ${bounds.map((x) => digits(100 * x, 1)).join("\u2013")}`);
  box("With a block", "eval/parallel_ratio");
  box("Tokens", "eval/total_tokens", typeof v["eval/self_parallelism"] === "number"
    && `${digits(v["eval/self_parallelism"], 2)} a sequential step`);
  box("Sequential steps", "eval/sequential_steps", typeof banned === "number"
    && `${write(banned, "count")} with blocks banned`);
}

const COLUMNS = [
  ["accuracy", (v) => interval(v, "eval/accuracy")],
  ["blocks banned", (v) => interval(v, "eval/accuracy_banned")],
  ["pass@k", (v) => interval(v, "eval/pass_at_k")],
  ["with a block", (v) => [write(v["eval/parallel_ratio"], "share")]],
  ["tokens", (v) => [write(v["eval/total_tokens"], "count")]],
  ["steps", (v) => [write(v["eval/sequential_steps"], "count")]],
  ["tokens a sequential step", (v) => [v["eval/self_parallelism"] ? digits(v["eval/self_parallelism"], 2) : NONE]],
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
