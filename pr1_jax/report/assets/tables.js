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
    const from = isNumber(was) ? `from ${say(metric, was)} ${before.words}` : "";
    root.append(el("div", {}, el("span", { class: "label" }, label),
      el("strong", {}, say(metric, v[metric])),
      ...[from, ...notes].filter(Boolean).map((note) => el("small", {}, note))));
  };
  const bounds = [v["eval/accuracy_low"], v["eval/accuracy_high"]];
  const banned = (metric) => isNumber(v[`${metric}_banned`]) &&
    `${say(metric, v[`${metric}_banned`])} with blocks banned`;
  box("Held-out accuracy", "eval/accuracy", bounds.every(isNumber)
    && `95 % interval ${bounds.map((x) => digits(100 * x, 1)).join("\u2013")}`,
  banned("eval/accuracy"));
  box("Responses with a block", "eval/parallel_ratio");
  box("Blocks with identical paths", "eval/identical_paths");
  box("Distinct work in paths", "eval/work_division");
  box("Sequential steps", "eval/sequential_steps", banned("eval/sequential_steps"),
    isNumber(v["eval/total_tokens"]) && `${say("eval/total_tokens", v["eval/total_tokens"])} tokens`);
}

const COLUMNS = ["accuracy", "accuracy_banned", "pass_at_k", "parallel_ratio", "num_paths",
  "identical_paths", "work_division", "total_tokens", "sequential_steps",
  "sequential_steps_banned", "format_ok", "undecided", "accuracy_string"];

// Rows of [name, values]; of an evaluation, names of values begin with `prefix`.
function figureTable(first, rows, prefix) {
  const used = COLUMNS.filter((c) => rows.some(([, v]) => isNumber(v[prefix + c])));
  const heads = used.map((c) => el("span", { title: figure(`eval/${c}`).about },
    figure(`eval/${c}`).label));
  return table([first, ...heads], rows.map(([name, v]) =>
    [name, ...used.map((c) => interval(v, prefix + c, `eval/${c}`))]));
}

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
    const name = (e) => (SINGLE ? e.name : [runDot(e.number), `${e.run.name}, ${e.name}`]);
    root.append(figureTable(SINGLE ? "evaluation" : "run, last evaluation",
      shown.map((e) => [name(e), e.values]), "eval/"));
    root.append(el("p", { class: "note" },
      "Small figures are 95 % intervals over problems."));
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
  const rows = Object.entries(run.benchmarks || {}).flatMap(([mode, found]) =>
    Object.entries(found || {}).map(([name, v]) => [`${mode} \u00b7 ${name}`, v]));
  if (!rows.length) return;
  root.append(el("h3", {}, SINGLE ? "Benchmarks" : [runDot(number), `Benchmarks of ${run.name}`]),
    figureTable("mode \u00b7 benchmark", rows, ""));
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
