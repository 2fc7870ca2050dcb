"use strict";
// Draws the plan and the charts that the forms select. All numbers come from the payload.
const payload = JSON.parse(document.getElementById("payload").textContent);
const charts = payload.charts;
const byId = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const MAX_LINES = 10;
const MAX_LABELS = 160;
const MAX_BAR = 1.5;

function formatNumber(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  return value.toLocaleString("en", size >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
}

function formatInterval(values) {
  return values.length < 3 ? "–" : `${formatNumber(values[1])} to ${formatNumber(values[2])}`;
}

function withInterval(value, low, high) {
  const text = formatNumber(value);
  return low === null || low === undefined ? text : `${text} (${formatNumber(low)} to ${formatNumber(high)})`;
}

function count(number, noun) {
  return `${formatNumber(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function capitalise(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// A text, or a pair of a text and the number behind it.
function fillCell(cell, text, value) {
  cell.textContent = text;
  if (value !== undefined && value !== null) cell.dataset.value = value;
  return cell;
}

function addRow(table, texts, isHead) {
  const line = table.insertRow();
  texts.forEach((text, index) => {
    const cell = document.createElement(isHead || index === 0 ? "th" : "td");
    if (isHead) cell.scope = "col";
    else if (index === 0) cell.scope = "row";
    line.append(cell);
    Array.isArray(text) ? fillCell(cell, ...text) : fillCell(cell, text);
  });
  return line;
}

function theme() {
  const ink = dark.matches ? "#e8e8e8" : "#1b1b1b";
  const line = dark.matches ? "#3a3e46" : "#dddddd";
  return {
    background: "transparent",
    font: "system-ui, DejaVu Sans, sans-serif",
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 12, labelLimit: byId("curves").clientWidth - 60 },
    text: { color: ink },
    view: { stroke: null },
  };
}

function draw(id, spec, datasets) {
  const many = datasets.cells.length > 2000;
  const options = { actions: false, renderer: many ? "canvas" : "svg", config: theme(), tooltip: { theme: dark.matches ? "dark" : "light" } };
  return vegaEmbed(byId(id), { ...structuredClone(spec), datasets }, options);
}

// What the form above the charts selects.
function selection() {
  const form = byId("view").elements;
  const workload = Number(form.workload.value);
  return {
    metric: payload.metrics.find((each) => each.column === form.metric.value),
    deployment: Number(form.deployment.value),
    workload,
    inputLen: Number(form.input_len.value),
    cells: payload.cells.filter((cell) => cell.workload === workload),
  };
}

// Of each deployment, the cells with the prompt length nearest to `inputLen`. Tokenizers count the same text differently.
function cellsNear(cells, inputLen) {
  const nearest = new Map();
  for (const cell of cells) {
    const distance = Math.abs(Math.log(cell.input_len / inputLen));
    if (distance > Math.log(SAME_PROMPT_FACTOR)) continue;
    const best = nearest.get(cell.deployment);
    if (best === undefined || distance < best[0]) nearest.set(cell.deployment, [distance, cell.input_len]);
  }
  return cells.filter((cell) => nearest.has(cell.deployment) && nearest.get(cell.deployment)[1] === cell.input_len);
}

// The value of a metric, followed by the ends of its interval if there is one; empty if not known.
function metricValues(cell, metric) {
  return (cell[metric.column] ?? []).map((value) => value * metric.factor);
}

function chartRow(cell, metric) {
  const values = metricValues(cell, metric);
  return {
    ...cell,
    title: payload.deployments[cell.deployment].title,
    value: values[0] ?? null,
    low: values[1] ?? null,
    high: values[2] ?? null,
    shown: values.length ? `${formatNumber(values[0])} ${metric.unit}` : cell.state,
    reason: cell.reason ?? "",
    interval: formatInterval(values),
  };
}

const MARKS = { "not served": "✕", "not run": "–", "no value": "?", "not valid": "!" };

function cellLabel(cell, metric) {
  const values = metricValues(cell, metric);
  const mark = MARKS[cell.state] ?? "";
  return values.length ? formatNumber(values[0]) + mark : mark || "–";
}

// The signs that occur in the heat map of `rows`, explained.
function signNote(rows, metric) {
  const notes = Object.entries(MARKS).filter(([state]) => rows.some((cell) => cell.state === state)).map(([state, mark]) => `${mark}: ${state}`);
  if (rows.some((cell) => cell.state !== "not run" && cellLabel(cell, metric) === "–")) notes.push("–: value not known");
  if (rows.length < new Set(rows.map((cell) => cell.intensity)).size * lengthsIn(rows).length) notes.push("blank: not part of the study");
  return notes.length ? `${notes.join("; ")}.` : "";
}

const RATIOS = {
  published_ratio: "Blue: faster than published; orange: slower. ",
  measured_over_predicted: "Blue: faster than predicted; orange: slower. ",
};
const isRatio = (metric) => metric.column in RATIOS;

// Text colour on a viridis cell: the page's own colour if the cell has none.
function inkOn(value, metric, least, most, isLog) {
  if (value === null) return "none";
  if (isRatio(metric)) return "dark";
  const position = isLog ? Math.log(value / least) / Math.log(most / least) : (value - least) / (most - least);
  return (metric.more_is_better ? position : 1 - position) > 0.6 ? "dark" : "light";
}

function drawHeatmap({ metric, deployment, workload, cells }) {
  const rows = cells.filter((cell) => cell.deployment === deployment);
  const known = rows.map((cell) => metricValues(cell, metric)[0]).filter((value) => value !== undefined);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const isLog = least > 0 && most / least > 30;
  const data = rows.map((cell) => {
    const shown = chartRow(cell, metric);
    return { ...shown, ink: inkOn(shown.value, metric, least, most, isLog), label: cellLabel(cell, metric), labelled: rows.length <= MAX_LABELS };
  });
  const spec = structuredClone(charts.heatmap);
  const colour = spec.layer[0].encoding.color;
  spec.encoding.y.title = payload.workloads[workload].axis;
  colour.scale.reverse = !metric.more_is_better;
  if (isRatio(metric)) {
    const reach = Math.max(most, 1 / least, 1.1);
    colour.scale = { type: "log", scheme: "blueorange", domain: [1 / reach, reach], interpolate: "lab" };
  } else if (isLog) {
    colour.scale = { ...colour.scale, type: "log", zero: undefined };
    colour.legend = { ...colour.legend, values: [least, Math.sqrt(least * most), most], format: ",.2~r" };
  }
  colour.legend.title = metric.unit;
  if (rows.length > MAX_LABELS) { spec.width = { step: 18 }; spec.height = { step: 12 }; }
  byId("heatmap-caption").textContent =
    `${metric.label} of ${payload.deployments[deployment].title}. ${capitalise(payload.workloads[workload].title)}. ` +
    (RATIOS[metric.column] ?? "Lighter is better. ") +
    signNote(rows, metric);
  fillGrid(rows, metric, workload);
  return draw("heatmap", spec, { cells: data });
}

function fillGrid(rows, metric, workload) {
  const table = byId("grid");
  table.replaceChildren();
  const lengths = lengthsIn(rows);
  const intensities = [...new Set(rows.map((cell) => cell.intensity))].sort((a, b) => a - b);
  table.createCaption().textContent = `${metric.label}. Columns: prompt tokens.`;
  addRow(table.createTHead(), [payload.workloads[workload].axis, ...lengths], true);
  const body = table.createTBody();
  const found = new Map(rows.map((cell) => [`${cell.intensity}/${cell.input_len}`, cell]));
  for (const intensity of intensities) {
    const texts = lengths.map((length) => {
      const cell = found.get(`${intensity}/${length}`);
      return cell === undefined ? "" : [cellLabel(cell, metric), metricValues(cell, metric)[0]];
    });
    addRow(body, [formatNumber(intensity), ...texts]);
  }
}

// At most MAX_LINES deployments, so that the lines can be distinguished. The selected one is always among them.
function drawnDeployments(cells, selected) {
  const all = [...new Set(cells.map((cell) => cell.deployment))];
  const first = [selected, ...all.filter((each) => each !== selected)].slice(0, MAX_LINES);
  return all.length <= MAX_LINES ? all : first;
}

function withColours(spec, indices) {
  const deployments = indices.map((index) => payload.deployments[index]);
  const text = JSON.stringify(spec)
    .replaceAll('"domain":[]', `"domain":${JSON.stringify(deployments.map((each) => each.title))}`)
    .replaceAll('"range":[]', `"range":${JSON.stringify(deployments.map((each) => each.colour))}`);
  return JSON.parse(text);
}

function drawCurves({ metric, deployment, workload, inputLen, cells }) {
  const near = cellsNear(cells, inputLen);
  const drawn = drawnDeployments(near, deployment);
  const data = near.filter((cell) => drawn.includes(cell.deployment)).map((cell) => chartRow(cell, metric));
  const spec = withColours(charts.curves, drawn);
  spec.encoding.x.title = payload.workloads[workload].axis;
  const ticks = [...new Set(data.map((cell) => cell.intensity))].sort((a, b) => a - b);
  if (ticks.length <= 12) spec.encoding.x.axis.values = ticks;
  for (const layer of spec.layer) layer.encoding.y.title = metric.label;
  const hasIntervals = data.some((cell) => cell.low !== null);
  // As in the other figures, an interval must not leave the points without height.
  const highest = Math.max(...data.map((cell) => cell.value ?? 0));
  const isCut = data.some((cell) => cell.high > MAX_BAR * highest);
  if (isCut) {
    spec.layer[0].mark.clip = true;
    for (const layer of spec.layer) layer.encoding.y.scale = { domain: [0, MAX_BAR * highest] };
  }
  if (!hasIntervals) spec.layer.shift();
  const leftOut = new Set(near.map((cell) => cell.deployment)).size - drawn.length;
  byId("curves-caption").textContent =
    `${metric.label} at ${lengthRange(near)} prompt tokens. ${capitalise(payload.workloads[workload].title)}. ` +
    (hasIntervals ? `Bars: 95% intervals${isCut ? ", cut at the edge" : ""}. ` : "") +
    (data.some((cell) => cell.state === "not valid") ? "Hollow markers: not valid. " : "") +
    (leftOut > 0 ? `${leftOut} more deployments are left out; select one above to see it.` : "");
  return draw("curves", spec, { cells: data });
}

function lengthRange(cells) {
  const lengths = lengthsIn(cells);
  return lengths.length > 1 ? `${lengths[0]} to ${lengths.at(-1)}` : `${lengths[0] ?? "no"}`;
}

// Whether an emulated engine is faster than the hardware that it stands for.
function isTimeScaled() {
  return payload.deployments.some((each) => each.time_scale !== null && each.time_scale !== 1);
}

function drawPareto({ deployment, workload, inputLen, cells }) {
  const near = cellsNear(cells, inputLen).filter((cell) => cell.output_tokens_per_s_per_user);
  const drawn = drawnDeployments(near, deployment);
  const points = near.filter((cell) => drawn.includes(cell.deployment)).map((cell) => ({
    ...cell,
    title: payload.deployments[cell.deployment].title,
    per_user: cell.output_tokens_per_s_per_user[0],
    total: cell.output_tokens_per_s[0],
  }));
  const valid = points.filter((point) => point.state !== "not valid");
  for (const point of points) {
    const dominated = valid.some((other) => other.per_user >= point.per_user && other.total >= point.total && (other.per_user > point.per_user || other.total > point.total));
    point.optimal = dominated || point.state === "not valid" ? "no" : "yes";
    point.label = (point.optimal === "yes" ? point.intensity : "") + (MARKS[point.state] ?? "");
  }
  const limit = Number(byId("demand")?.elements.tokens_per_s_per_user.value ?? NaN);
  const hasLimit = Number.isFinite(limit) && !isTimeScaled();
  byId("pareto-caption").textContent = points.length
    ? `Output tokens/s of all users against output tokens/s per user, at ${lengthRange(near)} prompt tokens. ${capitalise(payload.workloads[workload].title)}. ` +
      "Filled markers are Pareto-optimal: no other point is better in both. Numbers: concurrency." + (valid.length < points.length ? " !: not valid, so not compared." : "") + (hasLimit ? " Dashed line: the SLO." : "")
    : isOpenLoop(workload) ? "At a request rate, there are no output tokens/s per user." : "No cell has output tokens/s per user.";
  byId("pareto").hidden = !points.length;
  if (!points.length) return Promise.resolve();
  const spec = withColours(charts.pareto, drawn);
  if (!hasLimit) spec.layer.pop();
  return draw("pareto", spec, { cells: points, limit: [{ limit }] });
}

// Goodput of each SLO class and the answered requests, against the request rate, of the selected deployment.
function drawGoodput({ deployment, workload, inputLen }) {
  const rows = payload.goodput.filter((row) => row.deployment === deployment && row.workload === workload && row.input_len === inputLen);
  byId("goodput-figure").hidden = !rows.length;
  if (!rows.length) return Promise.resolve();
  const classes = [...new Set(rows.map((row) => row.slo_class))];
  const named = (row) => ({ ...row, line: `goodput, ${row.slo_class}`, value: row.goodput, state: row.whole_run ? "whole run" : "stationary" });
  const answered = rows.filter((row) => row.slo_class === classes[0]).map((row) => ({ ...named(row), line: "answered", value: row.answered, low: null, high: null }));
  const offered = [...new Set(rows.map((row) => row.rate))].map((rate) => ({ rate, value: rate, line: "offered" }));
  byId("goodput-caption").textContent =
    `Requests per second against the request rate, at ${inputLen} prompt tokens, of ${payload.deployments[deployment].title}. ` +
    "Dashed: offered requests. Where the answered requests fall below them, the server is saturated. Goodput: requests that meet the SLO. " +
    (rows.some((row) => row.whole_run) ? "Hollow markers: no stationary part, so the whole run counts. " : "") +
    (rows.some((row) => row.low !== null) ? "Bars: 95% intervals." : "");
  return draw("goodput", charts.goodput, { cells: [...rows.map(named), ...answered], offered });
}

function isOpenLoop(workload) {
  return payload.workloads[workload].axis === "requests per second";
}

// A workload that has no value of the selected metric gets the first metric of which it has one.
function chooseMetric() {
  const { metric, cells } = selection();
  const known = (each) => cells.some((cell) => metricValues(cell, each).length);
  const other = known(metric) ? undefined : payload.metrics.find(known);
  if (other) byId("view").elements.metric.value = other.column;
}

function offerLengths() {
  const form = byId("view").elements;
  const { cells, deployment } = selection();
  const ofDeployment = cells.filter((cell) => cell.deployment === deployment);
  const lengths = lengthsIn(ofDeployment.length ? ofDeployment : cells);
  const previous = form.input_len.value;
  form.input_len.replaceChildren(...lengths.map((length) => new Option(length, length)));
  if (lengths.includes(Number(previous))) form.input_len.value = previous;
}

async function drawCharts() {
  offerLengths();
  const selected = selection();
  document.body.dataset.drawn = "no";
  await Promise.all([drawHeatmap(selected), drawCurves(selected), drawPareto(selected), drawGoodput(selected)]);
  document.body.dataset.drawn = "yes";
}

// The assumptions in the form, or null if an entry is missing or out of range.
function readDemand() {
  const form = byId("demand");
  const wrong = [...form.elements].find((each) => !each.checkValidity());
  const message = byId("demand-error");
  message.hidden = !wrong;
  message.textContent = wrong ? `${wrong.closest("label").firstChild.textContent.trim()}: ${wrong.validationMessage}` : "";
  if (wrong) return null;
  const entries = Object.fromEntries([...form.elements].filter((each) => each.name && each.name !== "slo_class").map((each) => [each.name, each.value === "" ? null : Number(each.value)]));
  const prompts = form.elements.input_len.value;
  const prices = Object.fromEntries(Object.entries(entries).filter(([name]) => name.startsWith("price:")).map(([name, value]) => [name.slice(6), value]));
  return {
    workload: entries.plan_workload,
    demand: {
      ...payload.demand, // what the form does not ask, such as the users of a trace
      ...entries,
      slo_class: form.elements.slo_class?.value ?? payload.demand.slo_class,
      prompts: prompts === "" || prompts === "recorded" ? null : prompts === "prompt_mix" ? payload.demand.prompt_mix : { [prompts]: 1 },
      recorded_lengths: prompts === "recorded" ? payload.demand.recorded.input_lens : null,
      logged_in: entries.logged_in === undefined ? payload.demand.logged_in : entries.logged_in / 100,
      load_factor: entries.load_factor / 100,
      slo_attainment: entries.slo_attainment / 100,
    },
    hardware: { ...payload.hardware, prices, electricity_per_kwh: entries.electricity_per_kwh, years_in_use: entries.years_in_use },
  };
}

const atLeast = (row) => (row.max_in_flight_is_lower_bound ? "at least " : "");

const isKnown = (value) => value !== null && value !== undefined;
const hasRate = (row) => isKnown(row.requests_per_s_carried);

const PLAN_COLUMNS = [
  ["deployment", (row) => row.title],
  ["prompt tokens", (row) => row.prompt_tokens ?? "–"],
  ["max. requests in flight within SLO", (row) => atLeast(row) + formatNumber(row.max_in_flight)],
  ["users per replica [range]", (row) => atLeast(row) + withInterval(row.users_carried, row.users_carried_low, row.users_carried_high)],
  ["users at which 50% of requests meet the SLO", (row) => atLeast(row) + formatNumber(row.users_at_50pct_slo)],
  ["replicas", (row) => formatNumber(row.replicas)],
  ["GPUs", (row) => formatNumber(row.gpus)],
  ["price", (row) => formatNumber(row.purchase)],
  ["price per token/s", (row) => formatNumber(row.purchase_per_token_per_s)],
  ["price per million tokens", (row) => formatNumber(row.purchase_per_million_tokens)],
  ["price per million tokens at peak load", (row) => formatNumber(row.purchase_per_million_tokens_at_peak)],
  ["J per output token", (row) => formatNumber(row.energy_j_per_output_token)],
  ["energy cost per million tokens", (row) => formatNumber(row.energy_cost_per_million_tokens)],
  ["requests/s that one replica carries", (row) => formatNumber(row.requests_per_s_carried)],
  ["users at the busiest time (modelled)", (row) => (hasRate(row) ? formatNumber(row.users_logged_in) : "–")],
  ["mean response time, s (modelled)", (row) => (hasRate(row) ? formatNumber(row.response_s_mean) : "–")],
  ["requests with longer prompts than measured, %", (row) => (isKnown(row.requests_not_covered) ? formatNumber(100 * row.requests_not_covered) : "–")],
];
const ALWAYS_SHOWN = 7;

function drawPlan() {
  const entries = readDemand();
  if (!entries) return;
  const { demand, hardware, workload } = entries;
  const rows = planCapacity(payload, workload, demand, hardware);
  const table = byId("plan");
  table.replaceChildren();
  table.createCaption().textContent = `Capacity plan, cheapest first. Prices in ${hardware.currency}. ${capitalise(payload.workloads[workload].title)}.`;
  const planned = rows.filter((each) => each.replicas !== undefined);
  const columns = PLAN_COLUMNS.filter(([, text], index) => index < ALWAYS_SHOWN || planned.some((each) => text(each) !== "–"));
  addRow(table.createTHead(), columns.map(([title]) => title), true);
  const body = table.createTBody();
  for (const each of rows) {
    const isPlanned = each.replicas !== undefined;
    const line = addRow(body, isPlanned ? columns.map(([, text]) => text(each)) : [each.title, each.reason]);
    line.dataset.row = JSON.stringify(each);
    if (isPlanned) continue;
    line.className = "none";
    line.cells[1].colSpan = columns.length - 1;
    line.cells[1].className = "text";
  }
  byId("headline").textContent = headline(rows, demand, hardware);
  byId("rule-of-thumb").textContent = ruleOfThumb(demand);
}

function headline(rows, demand, hardware) {
  const rate = demand.requests_per_s;
  const users = isKnown(rate) ? `${formatNumber(rate)} requests/s` : `${count(demand.users, "registered user")} (${formatNumber(concurrentUsers(demand))} logged in, ${formatNumber(demand.think_time_s)} s think time)`;
  const speed = `${formatNumber(demand.tokens_per_s_per_user)} tokens/s`;
  const best = rows.find((each) => each.replicas !== undefined);
  const unknown = rows.filter((each) => each.replicas === undefined).length;
  if (!best) return `No deployment of this study is known to serve ${users} with ${speed} each.`;
  const gpus = best.gpus ? `, ${count(best.gpus, "GPU")}` : "";
  const cost = best.purchase === null ? "" : `, ${formatNumber(best.purchase)} ${hardware.currency}`;
  const rank = best.purchase === null ? "smallest" : "cheapest";
  return (
    `For ${users}, the ${rank} deployment is ${best.title}: ${count(best.replicas, "replica")}${gpus}${cost}. ` +
    `${formatNumber(100 * demand.slo_attainment)}% of requests get at least ${speed}. ` +
    (isKnown(rate)
      ? `One replica can carry ${atLeast(best)}${formatNumber(best.requests_per_s_carried)} requests/s.`
      : `One replica can carry ${atLeast(best)}${withInterval(best.users_carried, best.users_carried_low, best.users_carried_high)} logged-in users.`) +
    (payload.deployments.find((each) => each.name === best.deployment).lacks_low_loads ? " A search left out lower loads: a full grid can show more users." : "") +
    (unknown ? ` ${count(unknown, "other deployment")} without a plan: the table says why.` : "") +
    (best.emulated ? " These results are emulated: they do not come from hardware." : "") +
    (best.output_len_exact ? "" : " Its outputs may stop early: the plan assumes that every response has the requested number of tokens, each in the measured time per token.")
  );
}

// Bionic's rule: a tenth of the logged-in users are active. Mean and binomial quantiles.
function ruleOfThumb(demand) {
  if (isKnown(demand.requests_per_s)) return ""; // it counts users
  const [trials, share] = [demand.users, demand.logged_in * 0.1];
  let [most, logarithm] = [0, trials * Math.log1p(-share)]; // with many users, the probability itself underflows
  let upTo = Math.exp(logarithm);
  const quantiles = [0.95, 0.99].map((wanted) => {
    while (upTo < wanted && most < trials) {
      logarithm += Math.log(((trials - most) / (most + 1)) * (share / (1 - share)));
      most += 1;
      upTo += Math.exp(logarithm);
    }
    return most;
  });
  return (
    `For comparison, a rule of thumb (Bionic, 2023) counts a tenth of the logged-in users as active: ${formatNumber(trials * share)} requests in flight on average, ` +
    `at most ${quantiles[0]} for 95% and at most ${quantiles[1]} for 99% of the time. The plan above computes this number from think time and measured times instead.`
  );
}

if (byId("view")) {
  byId("view").addEventListener("change", (event) => {
    if (event.target.name === "workload") chooseMetric();
    drawCharts();
  });
  dark.addEventListener("change", drawCharts);
  chooseMetric();
  drawCharts();
}
if (byId("demand")) {
  const choice = byId("demand").elements.slo_class;
  choice?.addEventListener("input", () => {
    for (const [name, limit] of Object.entries(payload.slo_classes[choice.value])) byId("demand").elements[name].value = limit ?? "";
  });
  const redraw = () => { drawPlan(); if (byId("view")) drawPareto(selection()); };
  byId("demand").addEventListener("input", redraw);
  byId("demand").addEventListener("reset", () => setTimeout(redraw));
  byId("demand").addEventListener("submit", (event) => event.preventDefault());
  drawPlan();
}
