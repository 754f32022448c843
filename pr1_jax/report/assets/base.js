"use strict";
// Small helpers. Text from models and data only ever becomes text nodes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SINGLE = RUNS.length === 1;
const byId = (id) => document.getElementById(id);

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, props = {}, ...children) =>
  fill(document.createElement(tag), props, children);
const svg = (tag, props = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

// --- Words -------------------------------------------------------------------------

const MINUS = "\u2212", NONE = "\u2013";

function digits(value, most) {
  return value
    .toLocaleString("en", { maximumFractionDigits: most, minimumFractionDigits: most })
    .replace("-", MINUS);
}

function write(value, form) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (form === "share") return digits(100 * value, 1) + "\u202f%";
  if (form === "small" || (size > 0 && size < 1e-3)) {
    if (size === 0) return "0";
    if (size >= 0.01 && size < 1000) return digits(value, size >= 100 ? 0 : size >= 1 ? 2 : 3);
    return value.toExponential(1).replace("-", MINUS).replace("e+", "e");
  }
  if (form === "seconds") return digits(value, size < 10 ? 2 : 1) + "\u202fs";
  if (form === "count") return digits(value, size >= 1000 || size % 1 === 0 ? 0 : 1);
  return digits(value, size >= 100 ? 1 : size >= 10 ? 2 : 3);
}

const figure = (metric) =>
  DATA.metrics[metric] ||
  { label: metric, form: "number", about: "", better: "", short: metric };
const say = (metric, value) => write(value, figure(metric).form);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

const isNumber = (x) => typeof x === "number";

// A value as `metric` is written, and its interval where it has one.
function interval(values, name, metric) {
  const [value, low, high] = ["", "_low", "_high"].map((end) => values[name + end]);
  if (!isNumber(low) || !isNumber(value)) return [say(metric, value)];
  const bounds = [low, high].map((x) => digits(100 * x, 1));
  return [el("b", {}, say(metric, value)), el("small", {}, ` ${bounds.join("\u2013")}`)];
}

// --- Theme -------------------------------------------------------------------------

function themeButton() {
  const button = byId("theme"), root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
    document.dispatchEvent(new Event("theme"));
  });
  dark.addEventListener("change", () => {
    name();
    document.dispatchEvent(new Event("theme"));
  });
  name();
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const scrollTo = (node) =>
  node.scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });

// --- Steps -------------------------------------------------------------------------

// All runs lie on one axis: the stages one after another, each as long as its longest.
const STAGES = [];
for (const run of RUNS) {
  run.rows = new Map();
  for (const stage of run.stages) {
    const rows = new Map();
    for (let i = stage.first; i < stage.first + stage.count; i++) rows.set(run.steps[i], i);
    run.rows.set(stage.name, rows);
    const known = STAGES.find((s) => s.name === stage.name);
    const steps = run.steps[stage.first + stage.count - 1];
    if (known) known.steps = Math.max(known.steps, steps);
    else {
      // Before the next stage of this run that others have, too.
      const later = run.stages.slice(run.stages.indexOf(stage) + 1).map((s) => s.name);
      const next = STAGES.findIndex((s) => later.includes(s.name));
      STAGES.splice(next < 0 ? STAGES.length : next, 0, { name: stage.name, steps });
    }
  }
}

const rowOf = (run, at) => at && run.rows.get(at.stage) && run.rows.get(at.stage).get(at.step);
const stageOf = (run, row) =>
  run.stages.find((s) => row >= s.first && row < s.first + s.count).name;

// What is looked at: `at` the step under the pointer, `open` that of the panel.
const state = { view: "", at: null, open: null, run: 0 };
const onStep = [];
function look(at) {
  state.at = at;
  for (const f of onStep) f(at);
}
