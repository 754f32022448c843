// What happened, and the panel that says it all about one step.

const KINDS = { alarm: "alarm", skipped: "skipped", change: "change", stage: "stage" };
const FEW = 8;

// --- The list ----------------------------------------------------------------------

function eventRow(run, number, event) {
  const at = { stage: event.stage, step: event.step };
  return el("li", {},
    el("a", { href: `#step=${event.stage}:${event.step}`, class: "event",
      onclick: (click) => { click.preventDefault(); openStep(at, number); },
      onpointerenter: () => look(at), onpointerleave: () => look(state.open) },
    el("i", { class: `sign ${KINDS[event.kind] || "change"}` }),
    el("span", { class: "where" }, `${event.stage} ${event.step}`),
    el("span", {}, event.text)));
}

// One line for all alarms that begin at a step.
function gathered(events) {
  const found = new Map();
  for (const event of events) {
    const key = `${event.row} ${event.kind === "stage" ? event.name : event.kind}`;
    const known = found.get(key);
    if (known) known.text += `; ${event.text[0].toLowerCase()}${event.text.slice(1)}`;
    else found.set(key, { ...event });
  }
  return [...found.values()];
}

function makeEvents() {
  const root = byId("event-list");
  RUNS.forEach((run, number) => {
    if (!SINGLE) root.append(el("h3", {}, run.name));
    const events = gathered(run.events), weight = { alarm: 0, skipped: 0, change: 1, stage: 2 };
    const important = [...events].sort((a, b) => weight[a.kind] - weight[b.kind]);
    const shown = new Set(important.slice(0, SINGLE ? FEW : 4));
    const list = el("ol", { class: "events" });
    const fillList = (isAll) => list.replaceChildren(...events
      .filter((e) => isAll || shown.has(e)).map((e) => eventRow(run, number, e)));
    fillList(false);
    root.append(...run.facts.map((fact) => el("p", { class: "fact" }, fact)), list);
    const news = events.filter((e) => e.kind !== "stage").length;
    if (!news) {
      root.append(el("p", { class: "note" }, run.steps.length
        ? "No alarm, no skipped update, no sharp change." : "No step has been logged yet."));
    }
    if (events.length > shown.size) {
      root.append(el("button", { type: "button", class: "quiet", onclick: (event) => {
        fillList(true);
        event.currentTarget.remove();
      } }, `All ${events.length}`));
    }
  });
}

// --- The panel ---------------------------------------------------------------------

function openStep(at, number = state.run, keepHash = false) {
  const runs = [number, ...RUNS.keys()].filter((i) => rowOf(RUNS[i], at) !== undefined);
  if (!runs.length) return;
  state.run = runs[0];
  state.open = at;
  if (state.view !== "all" && state.view !== at.stage) setView(at.stage);
  look(at);
  if (!keepHash) history.replaceState(null, "", `#step=${at.stage}:${at.step}`);
  const panel = byId("step"), wasHidden = panel.hidden;
  panel.replaceChildren(...stepPanel(RUNS[state.run], at).filter(Boolean));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.body.classList.add("with-step");
  if (wasHidden) panel.querySelector("h2").focus({ preventScroll: true });
}

function closeStep() {
  if (byId("step").hidden) return;
  byId("step").hidden = true;
  document.body.classList.remove("with-step");
  state.open = null;
  look(null);
  history.replaceState(null, "", location.pathname + location.search);
  byId("charts").focus({ preventScroll: true });
}

function stepPanel(run, at) {
  const row = rowOf(run, at);
  const go = (by) => () => openStep(neighbour(at, by));
  const head = el("header", {},
    el("h2", { id: "step-title", tabindex: "-1" }, `Step ${at.step}`,
      el("small", {}, ` of ${at.stage}`)),
    el("div", { class: "switch" },
      el("button", { type: "button", "aria-label": "Step before", onclick: go(-1) }, "\u2190"),
      el("button", { type: "button", "aria-label": "Step after", onclick: go(1) }, "\u2192"),
      el("button", { type: "button", "aria-label": "Close", onclick: closeStep }, "\u00d7")));
  const rows = run.moves[row] || [];
  return [head, runSwitch(run, at), rows.length
    ? el("p", { class: "sentence" }, sentence(run, row, rows)) : null,
  ...why(run, row), rewardInForce(run, row), moved(run, row, rows),
  ...stepResponses(run, at, row)];
}

function runSwitch(run, at) {
  if (SINGLE) return null;
  return el("p", { class: "switch" }, ...RUNS.map((other, number) =>
    rowOf(other, at) === undefined ? null : el("button", { type: "button",
      "aria-pressed": String(other === run), onclick: () => openStep(at, number) }, other.name)));
}

function why(run, row) {
  const out = [];
  for (const event of run.events) {
    const isNow = event.row <= row && row <= event.last_row;
    if (!isNow || (event.kind !== "alarm" && event.kind !== "skipped")) continue;
    const words = DATA.alarms[event.name] || { title: event.name, means: "", look: "" };
    const since = event.row < row ? ` since step ${event.step}` : "";
    out.push(el("div", { class: `alarm-box ${event.kind}` },
      el("h3", {}, words.title, el("small", {}, since)),
      el("p", {}, words.means), el("p", { class: "look" }, words.look)));
  }
  return out;
}

function rewardInForce(run, row) {
  if (!run.rewards[row]) return null;
  const names = run.rewards[row].split(" + ");
  const isSaving = run.values["reward/latency"] && run.values["reward/latency"][row] !== null;
  return el("p", { class: "in-force" }, el("span", { class: "label" }, "Reward in force"),
    ...names.map((name) => {
      const weights = run.values[`reward/weight_${name}`];
      const share = names.length > 1 && weights ? ` \u00d7 ${digits(weights[row], 2)}` : "";
      return el("span", {}, el("b", {}, name + share), " ", DATA.rewards[name] || "", " ");
    }),
    isSaving ? el("span", {}, el("b", {}, "+ latency"), " ", DATA.rewards.latency) : null);
}

function moved(run, row, rows) {
  const box = el("div", { class: "moved" },
    el("h3", {}, "What moved", el("small", {}, " against the 20 steps before")));
  if (!rows.length) {
    const before = row - run.stages.find((s) => s.name === stageOf(run, row)).first;
    box.append(el("p", { class: "note" }, before < 8
      ? "Too few steps before it to compare with." : "Nothing out of the ordinary."));
    return box;
  }
  const most = Math.max(...rows.map(([, z]) => Math.min(Math.abs(z), 20)));
  const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Figure"),
    el("th", {}, "before"), el("th", {}, "now"), el("th", {}, "z"))));
  const body = el("tbody", {});
  for (const [metric, z, before] of rows) {
    const bar = el("i", { class: "z" });
    bar.style.width = `${(100 * Math.min(Math.abs(z), 20)) / most}%`;
    const words = figure(metric);
    const judged = words.better && ((words.better === "more") === z > 0 ? "good" : "bad");
    const size = Math.abs(z) >= 99 ? "> 99" : digits(Math.abs(z), Math.abs(z) < 10 ? 1 : 0);
    body.append(el("tr", { title: words.about },
      el("th", { scope: "row" }, words.label, bar), el("td", {}, say(metric, before)),
      el("td", {}, el("b", {}, say(metric, run.values[metric][row]))),
      el("td", { class: judged }, `${z > 0 ? "\u2191" : "\u2193"}\u202f${size}`)));
  }
  table.append(body);
  box.append(table);
  return box;
}

function sentence(run, row, rows) {
  const part = ([metric, z, before], i) => {
    const name = figure(metric).label;
    const words = i ? name[0].toLowerCase() + name.slice(1) : name;
    const verb = z > 0 ? "rose" : "fell";
    return `${words} ${verb} from ${say(metric, before)} to ${say(metric, run.values[metric][row])}`;
  };
  return rows.slice(0, 4).map(part).join(", ") + ".";
}

function stepResponses(run, at, row) {
  const number = RUNS.indexOf(run);
  const group = run.responses.find((g) => g.stage === at.stage && g.step === at.step);
  const title = el("h3", {}, "Responses");
  if (!group) {
    const isTrained = run.rewards[row];
    const file = `rollouts/${at.stage}_${String(at.step).padStart(6, "0")}.jsonl`;
    return isTrained ? [title, el("p", { class: "note" },
      `Those of this step are not in this page; they are in ${file}. To add them: `,
      el("code", {}, `python -m pr1_jax.report ${run.workdir} --steps=${at.step}`))] : [];
  }
  const list = el("ol", { class: "snippets" });
  group.records.slice(0, 5).forEach((record) => list.append(el("li", {},
    el("button", { type: "button", onclick: () => readStep(number, group, record) },
      verdictSign(record), el("span", { class: "clip" }, responseText(record) || "(empty)")))));
  const before = run.responses.find((g) => g.stage === at.stage && g.step === at.step - 1);
  const read = (g, words) => el("button", { type: "button", class: "quiet",
    onclick: () => readStep(number, g, null) }, words);
  return [title, list, el("p", { class: "actions" },
    read(group, `Read ${group.records.length} of this step`),
    before ? read(before, `${before.records.length} of the step before`) : null)];
}

function readHash() {
  const match = /^#step=(?:([^:]+):)?(\d+)$/.exec(decodeURIComponent(location.hash));
  if (!match) return;
  const step = Number(match[2]);
  // Without a stage the last one that has the step: RL rather than SFT.
  const stages = match[1] ? [match[1]] : STAGES.map((s) => s.name).reverse();
  const stage = stages.find((s) => RUNS.some((run) => rowOf(run, { stage: s, step }) !== undefined));
  if (stage) openStep({ stage, step }, 0, true);
}
