// Puts the page together.

function intro() {
  const run = RUNS[0];
  const title = SINGLE ? run.experiment || run.name : RUNS.map((r) => r.name).join(" \u00b7 ");
  document.title = `${SINGLE ? run.name : title} \u2013 report`;
  byId("kicker").textContent = SINGLE ? "Run" : `${RUNS.length} runs`;
  byId("title").textContent = title;
  const last = run.steps.length - 1;
  const where = last < 0 ? "not begun" : `at step ${run.steps[last]} of ${stageOf(run, last)}` +
    (run.planned[stageOf(run, last)] ? ` (${run.planned[stageOf(run, last)]} planned)` : "");
  const facts = SINGLE ? [run.workdir, run.finished ? "finished" : where, `${run.variant} variant`,
    run.schedule && `reward ${run.schedule}`] : RUNS.map((r) => r.workdir);
  byId("sub").textContent = facts.filter(Boolean).join("  \u00b7  ");
  byId("foot").textContent = `Written ${DATA.made.replace("T", " ")}. ` +
    "Figures are those of metrics.jsonl; this page asks the network for nothing.";
}

themeButton();
intro();
headline();
makeEvents();
makeCharts();
makeResponses();
evaluationTables();
configTable();
readHash();
addEventListener("hashchange", readHash);
addEventListener("keydown", (event) => { if (event.key === "Escape") closeStep(); });
addEventListener("scroll", () => { byId("tip").hidden = true; }, { passive: true });
