// Small multiples over one axis; a step that is looked at is marked in all of them.

const HEIGHT = 150, TOP = 8, BOTTOM = 22, LEFT = 40, RIGHT = 10;
const charts = [];

// --- Axis --------------------------------------------------------------------------

// In "all" a stage's width follows the square root of its steps: many steps of SFT leave
// space for few of RL.
function segments() {
  const shown = STAGES.filter((s) => state.view === "all" || s.name === state.view);
  const weights = shown.map((s) => (shown.length > 1 ? Math.sqrt(s.steps) : 1));
  const total = weights.reduce((a, b) => a + b, 0);
  let start = 0;
  return shown.map((stage, i) => {
    const from = start;
    start += weights[i] / total;
    return { ...stage, from, to: start };
  });
}

function axisShare(parts, stage, step) {
  const part = parts.find((p) => p.name === stage);
  return part ? part.from + ((part.to - part.from) * (step - 0.5)) / part.steps : null;
}

function nearest(parts, share) {
  const part = parts.find((p) => share <= p.to) || parts[parts.length - 1];
  const inside = (share - part.from) / (part.to - part.from);
  const wanted = Math.min(Math.max(Math.round(inside * part.steps + 0.5), 1), part.steps);
  let best = null;
  for (const run of RUNS) {
    const rows = run.rows.get(part.name);
    if (!rows) continue;
    if (rows.has(wanted)) return { stage: part.name, step: wanted };
    for (const step of rows.keys()) {
      if (best === null || Math.abs(step - wanted) < Math.abs(best - wanted)) best = step;
    }
  }
  return best === null ? null : { stage: part.name, step: best };
}

function niceStep(span, count) {
  const raw = span / count, unit = 10 ** Math.floor(Math.log10(raw));
  return unit * ([1, 2, 5, 10].find((m) => m * unit >= raw) || 10);
}

// --- Values ------------------------------------------------------------------------

// A moving mean. It narrows towards the ends and towards a sharp change: a cliff stays one.
function smooth(values, log, breaks) {
  const width = Math.max(Math.floor(values.length / 30), 1);
  if (values.length < 24) return values;
  const part = [0];
  for (let i = 1; i < values.length; i++) part.push(part[i - 1] + (breaks.has(i) ? 1 : 0));
  const known = values.map((v) => (v === null || (log && v <= 0) ? null : log ? Math.log(v) : v));
  return known.map((_, i) => {
    let by = 0, sum = 0, count = 0;
    while (by < width && part[i - by - 1] === part[i] && part[i + by + 1] === part[i]) by++;
    for (let j = i - by; j <= i + by; j++) {
      if (known[j] !== null) { sum += known[j]; count++; }
    }
    return count ? (log ? Math.exp(sum / count) : sum / count) : null;
  });
}

function seriesOf(spec, parts) {
  const out = [];
  RUNS.forEach((run, number) => {
    spec.metrics.forEach((metric, order) => {
      const values = run.values[metric];
      if (!values || run.hidden) return;
      const pieces = [];
      for (const part of parts) {
        const stage = run.stages.find((s) => s.name === part.name);
        if (!stage) continue;
        const raw = values.slice(stage.first, stage.first + stage.count);
        if (!raw.some((v) => v !== null)) continue;
        const xs = raw.map((_, i) => axisShare(parts, part.name, run.steps[stage.first + i]));
        const breaks = new Set(run.events.filter((e) => e.metrics.includes(metric))
          .map((e) => e.row - stage.first));
        pieces.push({ xs, raw, smoothed: smooth(raw, spec.scale === "log", breaks) });
      }
      if (pieces.length) out.push({ run, number, metric, order, pieces });
    });
  });
  return out;
}

function heldOut(spec, parts) {
  if (!spec.held_out) return [];
  const out = [];
  RUNS.forEach((run, number) => {
    if (run.hidden) return;
    for (const evaluation of run.evaluations) {
      const value = evaluation.values[spec.held_out];
      if (value === undefined || value === null) continue;
      const at = (end) => evaluation.values[spec.held_out + end];
      for (const part of parts) {
        const stage = run.stages.find((s) => s.name === part.name);
        if (!stage) continue;
        const isStart = evaluation.at === stage.first;
        if (!isStart && evaluation.at !== stage.first + stage.count) continue;
        // Between two stages that are both shown it is drawn once, at the first's end.
        if (isStart && part !== parts[0]) continue;
        const steps = run.steps[stage.first + stage.count - 1];
        const x = isStart ? part.from : axisShare(parts, part.name, steps + 0.5);
        out.push({ x, value, low: at("_low"), high: at("_high"), number, name: evaluation.name });
        break;
      }
    }
  });
  return out;
}

function range(spec, series, points) {
  let low = Infinity, high = -Infinity, least = Infinity;
  for (const { pieces } of series) {
    for (const piece of pieces) {
      for (const v of piece.raw) {
        if (v === null) continue;
        low = Math.min(low, v);
        high = Math.max(high, v);
        if (v > 0) least = Math.min(least, v);
      }
    }
  }
  for (const p of points) {
    low = Math.min(low, p.low ?? p.value);
    high = Math.max(high, p.high ?? p.value);
  }
  if (spec.scale === "log") {
    if (least === Infinity) return [1e-9, 1];
    const from = Math.floor(Math.log10(least)), to = Math.ceil(Math.log10(Math.max(high, least)));
    return [10 ** from, 10 ** Math.max(to, from + 1)];
  }
  if (spec.scale === "share") return [0, high > 0.25 ? 1 : Math.max(high * 1.15, 0.02)];
  if (spec.scale === "zero") return [Math.min(low, 0), high > 0 ? high * 1.08 : 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - pad, high + pad];
}

function tickValues(spec, [low, high]) {
  if (spec.scale === "log") {
    const from = Math.log10(low), count = Math.round(Math.log10(high) - from);
    const every = Math.ceil(count / 3);
    const powers = [];
    for (let i = 0; i <= count; i += every) powers.push(10 ** (from + i));
    return powers;
  }
  const step = niceStep(high - low, spec.scale === "free" ? 4 : 3), ticks = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) ticks.push(v);
  return ticks;
}

function tickLabel(spec, value) {
  if (spec.scale === "log" && (value < 1e-3 || value >= 1e4)) {
    return `1e${Math.round(Math.log10(value))}`.replace("-", MINUS);
  }
  if (spec.scale === "share") return `${+(100 * value).toFixed(1)}%`;
  if (Math.abs(value) >= 1000) return `${+(value / 1000).toFixed(1)}k`;
  return String(+value.toPrecision(3)).replace("-", MINUS);
}

// --- One chart ---------------------------------------------------------------------

const stroke = (series) =>
  SINGLE ? `var(--line${series.order})` : `var(--run${series.number % 6})`;

function makeChart(spec) {
  const read = el("p", { class: "read" });
  const picture = svg("svg", { role: "img", height: HEIGHT });
  const about = spec.metrics.map((m) => figure(m).about).filter(Boolean).join(" ");
  const node = el("figure", { class: "chart" },
    el("figcaption", {}, el("h4", { title: about }, spec.title), read), picture);
  const chart = { spec, node, read, picture };
  picture.addEventListener("pointermove", (event) => look(stepUnder(chart, event)));
  picture.addEventListener("pointerleave", () => look(state.open));
  picture.addEventListener("click", (event) => {
    const at = stepUnder(chart, event);
    if (at) openStep(at);
  });
  return chart;
}

function stepUnder(chart, event) {
  const box = chart.picture.getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
  return nearest(chart.parts, Math.min(Math.max(share, 0), 1));
}

function draw(chart) {
  const { spec, picture } = chart;
  const parts = (chart.parts = segments());
  const series = (chart.series = seriesOf(spec, parts));
  const points = heldOut(spec, parts);
  chart.node.hidden = !series.length;
  if (!series.length) return;
  const width = Math.max(chart.node.clientWidth, 120), inner = width - LEFT - RIGHT;
  const [low, high] = range(spec, series, points);
  const log = spec.scale === "log";
  const scaled = (v) => (log ? Math.log(Math.max(v, low) / low) / Math.log(high / low)
    : (v - low) / (high - low));
  const x = (share) => LEFT + inner * share;
  const y = (v) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - scaled(v));
  chart.x = x;
  chart.y = y;
  const base = HEIGHT - BOTTOM;
  picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  picture.replaceChildren();
  shade(picture, parts, x, base);
  for (const v of tickValues(spec, [low, high])) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(v) + 3.5, "text-anchor": "end" },
        tickLabel(spec, v)));
  }
  drawSteps(picture, parts, x, base, inner);
  for (const s of series) {
    const dash = !SINGLE && s.order ? "4 3" : null;
    for (const piece of s.pieces) {
      const isSmoothed = piece.smoothed !== piece.raw;
      const line = (values, props) => picture.append(svg("path", {
        d: pathOf(piece.xs, values, x, y, log), fill: "none", stroke: stroke(s),
        "stroke-dasharray": dash, ...props }));
      if (isSmoothed) line(piece.raw, { "stroke-width": 1, opacity: SINGLE ? 0.35 : 0.16 });
      line(piece.smoothed, { "stroke-width": 1.75 });
    }
  }
  for (const p of points) {
    const tint = SINGLE ? "var(--ink)" : `var(--run${p.number % 6})`;
    const mark = svg("g", { class: "held", stroke: tint },
      svg("title", {}, `${p.name}: ${say(spec.held_out, p.value)}`));
    if (p.low !== undefined && p.low !== null) {
      mark.append(svg("line", { x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high) }));
    }
    mark.append(svg("circle", { cx: x(p.x), cy: y(p.value), r: 3.5 }));
    picture.append(mark);
  }
  drawEvents(picture, parts, x, base);
  chart.cursor = svg("g", { class: "cursor" });
  picture.append(chart.cursor);
  describe(chart);
}

function pathOf(xs, values, x, y, log) {
  let d = "", isOpen = false;
  values.forEach((v, i) => {
    const isKnown = v !== null && !(log && v <= 0);
    if (isKnown) d += `${isOpen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`;
    isOpen = isKnown;
  });
  // A point between gaps has no line to show it.
  return values.length === 1 && d ? `${d}h3` : d;
}

function shade(picture, parts, x, base) {
  const key = JSON.stringify(RUNS[0].windows);
  if (RUNS.some((run) => JSON.stringify(run.windows) !== key)) return;
  for (const w of RUNS[0].windows) {
    const part = parts.find((p) => p.name === w.stage);
    if (!part) continue;
    const from = x(axisShare(parts, w.stage, w.first - 0.5)), to = x(axisShare(parts, w.stage, w.last + 0.5));
    picture.append(svg("rect", { class: "window", x: from, width: to - from, y: TOP,
      height: base - TOP }));
  }
}

function drawSteps(picture, parts, x, base, inner) {
  picture.append(svg("line", { class: "axis", x1: x(0), x2: x(1), y1: base, y2: base }));
  if (parts.length > 1) {
    for (const part of parts) {
      if (part.from > 0) {
        picture.append(svg("line", { class: "stage", x1: x(part.from), x2: x(part.from),
          y1: TOP, y2: base }));
      }
      picture.append(svg("text", { class: "tick", x: x(part.from) + 2, y: HEIGHT - 7 },
        `${part.name} 1\u2013${part.steps}`));
    }
    return;
  }
  const [part] = parts, every = Math.max(niceStep(part.steps, inner / 60), 1);
  for (let step = every; step <= part.steps; step += every) {
    picture.append(svg("text", { class: "tick", x: x(axisShare(parts, part.name, step)),
      y: HEIGHT - 7, "text-anchor": "middle" }, step));
  }
}

function drawEvents(picture, parts, x, base) {
  RUNS.forEach((run) => {
    if (run.hidden) return;
    for (const event of run.events) {
      const at = axisShare(parts, event.stage, event.step);
      if (at === null || event.kind === "stage") continue;
      if (event.kind === "change") {
        picture.append(svg("circle", { class: "mark", cx: x(at), cy: base, r: 2 }));
        continue;
      }
      const to = axisShare(parts, event.stage, run.steps[event.last_row]);
      picture.append(svg("line", { class: `mark ${event.kind}`, x1: x(at) - 1.5, x2: x(to) + 1.5,
        y1: base, y2: base }));
    }
  });
}

function describe(chart) {
  const words = chart.series.map((s) => {
    const known = s.pieces.flatMap((p) => p.raw).filter((v) => v !== null);
    const name = SINGLE ? figure(s.metric).label : `${s.run.name}, ${figure(s.metric).label}`;
    return `${name} from ${say(s.metric, known[0])} to ${say(s.metric, known[known.length - 1])}`;
  });
  chart.picture.setAttribute("aria-label", `${chart.spec.title}: ${words.join("; ")}`);
}

function highlight(chart, at) {
  if (!chart.series || !chart.series.length) return;
  chart.read.replaceChildren();
  chart.cursor.replaceChildren();
  const share = at ? axisShare(chart.parts, at.stage, at.step) : null;
  if (share !== null) {
    chart.cursor.append(svg("line", { x1: chart.x(share), x2: chart.x(share), y1: TOP,
      y2: HEIGHT - BOTTOM }));
  }
  const many = new Set(chart.series.map((s) => s.metric)).size > 1;
  for (const s of chart.series) {
    const values = s.run.values[s.metric];
    const row = share === null ? null : rowOf(s.run, at);
    const last = s.pieces[s.pieces.length - 1].raw;
    const value = share === null ? last[last.length - 1] : row === undefined ? null : values[row];
    const dot = el("i", {});
    dot.style.background = stroke(s);
    const words = many && SINGLE ? `${figure(s.metric).short} ` : "";
    chart.read.append(el("span", {}, SINGLE && !many ? null : dot, words,
      el("b", {}, say(s.metric, value))));
    if (share !== null && value !== null && value !== undefined) {
      chart.cursor.append(svg("circle", { cx: chart.x(share), cy: chart.y(value), r: 3.5,
        fill: stroke(s) }));
    }
  }
}

// --- All charts --------------------------------------------------------------------

function drawAll() {
  for (const chart of charts) draw(chart);
  for (const chart of charts) highlight(chart, state.at);
  for (const group of document.querySelectorAll(".charts")) {
    const isEmpty = [...group.children].every((node) => node.hidden);
    group.hidden = group.previousElementSibling.hidden = isEmpty;
  }
}

function makeViews() {
  if (!STAGES.length) return;
  const trained = STAGES.filter((s) => RUNS.some((r) => r.windows.some((w) => w.stage === s.name)));
  const rl = STAGES.filter((s) => RUNS.some((run) => {
    const stage = run.stages.find((x) => x.name === s.name), reward = run.values["reward/mean"];
    return stage && reward && reward[stage.first] !== null;
  }));
  const names = STAGES.length > 1 ? ["all", ...STAGES.map((s) => s.name)] : [STAGES[0].name];
  state.view = (trained[0] || rl[0] || STAGES[STAGES.length - 1]).name;
  if (names.length === 1) return;
  for (const name of names) {
    byId("views").append(el("button", { type: "button", "data-view": name,
      onclick: () => setView(name) }, name));
  }
}

function setView(name) {
  state.view = name;
  for (const button of byId("views").children) {
    button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }
  drawAll();
}

function makeCharts() {
  makeViews();
  const root = byId("charts");
  if (!STAGES.length) {
    root.append(el("p", { class: "note" }, "No step of training has been logged yet."));
    return;
  }
  for (const { group, charts: specs } of DATA.charts) {
    const grid = el("div", { class: "charts" });
    for (const spec of specs) {
      const chart = makeChart(spec);
      charts.push(chart);
      grid.append(chart.node);
    }
    root.append(el("h3", {}, group), grid);
  }
  makeLegend();
  onStep.push((at) => { for (const chart of charts) highlight(chart, at); });
  let waiting = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  }).observe(root);
  root.addEventListener("keydown", moveByKey);
  setView(state.view);
}

function moveByKey(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) {
    event.preventDefault();
    look(neighbour(state.at || state.open, by));
  } else if (event.key === "Enter" && state.at) {
    openStep(state.at);
  }
}

function neighbour(at, by) {
  const run = RUNS[state.run], stages = run.stages.map((s) => s.name);
  if (!stages.length) return at;
  const row = rowOf(run, at);
  if (row === undefined || row === null) {
    const last = run.steps.length - 1;
    return { stage: stageOf(run, last), step: run.steps[last] };
  }
  const next = Math.min(Math.max(row + by, 0), run.steps.length - 1);
  return { stage: stageOf(run, next), step: run.steps[next] };
}

function makeLegend() {
  const root = byId("legend");
  if (!SINGLE) {
    RUNS.forEach((run, number) => {
      const dot = el("i", {});
      dot.style.background = `var(--run${number % 6})`;
      root.append(el("button", { type: "button", class: "key", "aria-pressed": "true",
        onclick: (event) => {
          run.hidden = !run.hidden;
          event.currentTarget.setAttribute("aria-pressed", String(!run.hidden));
          drawAll();
        } }, dot, run.name));
    });
  }
  const has = (kind) => RUNS.some((run) => run.events.some((e) => e.kind === kind));
  const keys = [];
  if (RUNS[0].windows.length) keys.push(["window", RUNS[0].windows[0].reward + " reward"]);
  if (RUNS.some((run) => run.evaluations.length)) keys.push(["held", "held-out, 95 %"]);
  if (has("alarm")) keys.push(["alarm", "alarm"]);
  if (has("skipped")) keys.push(["skipped", "skipped update"]);
  if (has("change")) keys.push(["change", "sharp change"]);
  root.append(el("span", { class: "keys" }, ...keys.map(([kind, words]) =>
    el("span", {}, el("i", { class: `sign ${kind}` }), words))));
}
