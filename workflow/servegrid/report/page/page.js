"use strict";
// Draws what the forms ask for, from the payload alone.
const payload = JSON.parse(document.getElementById("payload").textContent);
const byId = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const MOST_LINES = 10;
const MOST_LABELS = 160;

function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  return value.toLocaleString("en", size >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
}

function interval(values) {
  return values.length < 3 ? "–" : `${figure(values[1])} to ${figure(values[2])}`;
}

function fill(cell, text, value) {
  cell.textContent = text;
  if (value !== undefined && value !== null) cell.dataset.value = value;
  return cell;
}

function row(table, texts, head) {
  const line = table.insertRow();
  texts.forEach((text, place) => {
    const cell = document.createElement(head || place === 0 ? "th" : "td");
    if (head) cell.scope = "col";
    else if (place === 0) cell.scope = "row";
    line.append(cell);
    Array.isArray(text) ? fill(cell, ...text) : fill(cell, text);
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

// What the view's form has chosen.
function chosen() {
  const form = byId("view").elements;
  const load = Number(form.load.value);
  return {
    metric: payload.metrics.find((each) => each.column === form.metric.value),
    deployment: Number(form.deployment.value),
    load,
    inputLen: Number(form.input_len.value),
    cells: payload.cells.filter((cell) => cell.load === load),
  };
}

function lengthsOf(cells) {
  return [...new Set(cells.map((cell) => cell.input_len))].sort((a, b) => a - b);
}

// Of each deployment the cells whose prompts are nearest in length, where tokenizers differ.
function near(cells, inputLen) {
  const nearest = new Map();
  for (const cell of cells) {
    const apart = Math.abs(Math.log(cell.input_len / inputLen));
    if (apart > Math.log(1.5)) continue;
    const best = nearest.get(cell.deployment);
    if (best === undefined || apart < best[0]) nearest.set(cell.deployment, [apart, cell.input_len]);
  }
  return cells.filter((cell) => nearest.has(cell.deployment) && nearest.get(cell.deployment)[1] === cell.input_len);
}

function values(cell, metric) {
  return (cell[metric.column] ?? []).map((value) => value * metric.factor);
}

function shownCell(cell, metric) {
  const of = values(cell, metric);
  return {
    ...cell,
    title: payload.deployments[cell.deployment].title,
    value: of[0] ?? null,
    low: of[1] ?? null,
    high: of[2] ?? null,
    shown: of.length ? `${figure(of[0])} ${metric.unit}` : cell.state,
    interval: interval(of),
  };
}

const MARKS = { "not served": "✕", "no figure": "?", "not valid": "!" };

function label(cell, metric) {
  const of = values(cell, metric);
  const mark = MARKS[cell.state] ?? "";
  return of.length ? figure(of[0]) + mark : mark || "–";
}

function drawHeatmap({ metric, deployment, load, cells }) {
  const own = cells.filter((cell) => cell.deployment === deployment);
  const known = own.map((cell) => values(cell, metric)[0]).filter((value) => value !== undefined);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const log = least > 0 && most / least > 30;
  const data = own.map((cell) => {
    const shown = shownCell(cell, metric);
    const place = log ? Math.log(shown.value / least) / Math.log(most / least) : (shown.value - least) / (most - least);
    const light = metric.more_is_better ? place : 1 - place;
    const ink = shown.value === null ? "none" : metric.column === "published_ratio" || light > 0.6 ? "dark" : "light";
    return { ...shown, ink, label: label(cell, metric), labelled: own.length <= MOST_LABELS };
  });
  const spec = structuredClone(charts.heatmap);
  const colour = spec.layer[0].encoding.color;
  spec.encoding.y.title = payload.loads[load].axis;
  colour.scale.reverse = !metric.more_is_better;
  const ratio = metric.column === "published_ratio";
  if (ratio) {
    const reach = Math.max(most, 1 / least, 1.1);
    colour.scale = { type: "log", scheme: "blueorange", domain: [1 / reach, reach], interpolate: "lab" };
  } else if (log) colour.scale = { ...colour.scale, type: "log", zero: undefined };
  colour.legend.title = metric.unit;
  if (own.length > MOST_LABELS) { spec.width = { step: 18 }; spec.height = { step: 12 }; }
  byId("heatmap-caption").textContent =
    `${metric.title} (${metric.unit}) of ${payload.deployments[deployment].title}; ${payload.loads[load].title}. ` +
    (metric.column === "published_ratio" ? "Blue: faster than published, orange: slower. " : "Light is better. ") +
    `✕: not served; ?: no figure; !: not valid. Blank: not measured.`;
  fillGrid(own, metric, load);
  return draw("heatmap", spec, { cells: data });
}

function fillGrid(own, metric, load) {
  const table = byId("grid");
  table.replaceChildren();
  const lengths = lengthsOf(own);
  const intensities = [...new Set(own.map((cell) => cell.intensity))].sort((a, b) => a - b);
  table.createCaption().textContent = `${metric.title}, ${metric.unit}; columns are prompt tokens`;
  row(table.createTHead(), [payload.loads[load].axis, ...lengths], true);
  const body = table.createTBody();
  const found = new Map(own.map((cell) => [`${cell.intensity}/${cell.input_len}`, cell]));
  for (const intensity of intensities) {
    const texts = lengths.map((length) => {
      const cell = found.get(`${intensity}/${length}`);
      return cell === undefined ? "" : [label(cell, metric), values(cell, metric)[0]];
    });
    row(body, [figure(intensity), ...texts]);
  }
}

// The deployments that lines are drawn of: as many as can be told apart, the chosen one among them.
function lined(cells, deployment) {
  const all = [...new Set(cells.map((cell) => cell.deployment))];
  const few = [deployment, ...all.filter((each) => each !== deployment)].slice(0, MOST_LINES);
  return all.length <= MOST_LINES ? all : few;
}

function coloured(spec, shownDeployments) {
  const looks = shownDeployments.map((place) => payload.deployments[place]);
  const domain = looks.map((each) => each.title);
  const text = JSON.stringify(spec)
    .replaceAll('"domain":[]', `"domain":${JSON.stringify(domain)}`)
    .replaceAll('"range":[]', `"range":${JSON.stringify(looks.map((each) => each.colour))}`);
  return JSON.parse(text);
}

function drawCurves({ metric, deployment, load, inputLen, cells }) {
  const together = near(cells, inputLen);
  const kept = lined(together, deployment);
  const data = together.filter((cell) => kept.includes(cell.deployment)).map((cell) => shownCell(cell, metric));
  const spec = coloured(charts.curves, kept);
  spec.encoding.x.title = payload.loads[load].axis;
  const marks = [...new Set(data.map((cell) => cell.intensity))].sort((a, b) => a - b);
  if (marks.length <= 12) spec.encoding.x.axis.values = marks;
  for (const layer of spec.layer) layer.encoding.y.title = `${metric.title} (${metric.unit})`;
  if (!data.some((cell) => cell.low !== null)) spec.layer.shift();
  const left = new Set(together.map((cell) => cell.deployment)).size - kept.length;
  byId("curves-caption").textContent =
    `${metric.title} at ${spread(together)} prompt tokens; ${payload.loads[load].title}. Bars are 95% intervals where there are several trials; hollow: not valid.` +
    (left > 0 ? ` ${left} more deployments are left out; choose one above to see it.` : "");
  return draw("curves", spec, { cells: data });
}

function spread(cells) {
  const lengths = lengthsOf(cells);
  return lengths.length > 1 ? `${lengths[0]} to ${lengths[lengths.length - 1]}` : `${lengths[0] ?? "no"}`;
}

// Whether times are those of an emulation that goes faster than what it stands for.
function scaled() {
  return payload.deployments.some((each) => each.time_scale !== null && each.time_scale !== 1);
}

function drawPareto({ deployment, load, inputLen, cells }) {
  const together = near(cells, inputLen).filter((cell) => cell.output_tokens_per_s_per_user);
  const kept = lined(together, deployment);
  const points = together.filter((cell) => kept.includes(cell.deployment)).map((cell) => ({
    ...cell,
    title: payload.deployments[cell.deployment].title,
    per_user: cell.output_tokens_per_s_per_user[0],
    total: cell.output_tokens_per_s[0],
  }));
  for (const point of points) {
    const beaten = points.some((other) => other.per_user >= point.per_user && other.total >= point.total && (other.per_user > point.per_user || other.total > point.total));
    point.best = beaten ? "no" : "yes";
  }
  byId("pareto-caption").textContent = points.length
    ? `All users' tokens/s against one user's at ${spread(together)} prompt tokens; ${payload.loads[load].title}. Filled points are not beaten in both by any other; the numbers are the load.` + (scaled() ? "" : " The dashed line is the speed that each user is to have.")
    : "Tokens/s per user are not known of a load that is a rate.";
  const limit = Number(byId("demand")?.elements.tokens_per_s_per_user.value ?? NaN);
  const spec = coloured(charts.pareto, kept);
  if (!Number.isFinite(limit) || scaled()) spec.layer.pop();
  return draw("pareto", spec, { cells: points, limit: [{ limit }] });
}

function offerLengths() {
  const form = byId("view").elements;
  const { cells, deployment } = chosen();
  const own = cells.filter((cell) => cell.deployment === deployment);
  const lengths = lengthsOf(own.length ? own : cells);
  const before = form.input_len.value;
  form.input_len.replaceChildren(...lengths.map((length) => new Option(length, length)));
  if (lengths.includes(Number(before))) form.input_len.value = before;
}

async function drawAll() {
  offerLengths();
  const view = chosen();
  document.body.dataset.drawn = "no";
  await Promise.all([drawHeatmap(view), drawCurves(view), drawPareto(view)]);
  document.body.dataset.drawn = "yes";
}

// What the assumptions' form says; null where an entry is missing or out of its range.
function demanded() {
  const form = byId("demand");
  const wrong = [...form.elements].find((each) => !each.checkValidity());
  const told = byId("demand-error");
  told.hidden = !wrong;
  told.textContent = wrong ? `${wrong.closest("label").firstChild.textContent.trim()}: ${wrong.validationMessage}` : "";
  if (wrong) return null;
  const given = Object.fromEntries([...form.elements].filter((each) => each.name).map((each) => [each.name, each.value === "" ? null : Number(each.value)]));
  const prompts = form.elements.input_len.value;
  const prices = Object.fromEntries(Object.entries(given).filter(([name]) => name.startsWith("price:")).map(([name, value]) => [name.slice(6), value]));
  return {
    load: given.plan_load,
    demand: { ...given, prompts: prompts === "" ? null : prompts === "prompt_mix" ? payload.demand.prompt_mix : { [prompts]: 1 }, logged_in: given.logged_in / 100, slo_attainment: given.slo_attainment / 100 },
    hardware: { ...payload.hardware, prices, electricity_per_kwh: given.electricity_per_kwh, years_in_use: given.years_in_use },
  };
}

function range(value, low, high) {
  return low === null || low === undefined ? figure(value) : `${figure(value)} (${figure(low)} to ${figure(high)})`;
}

const PLAN = [
  ["deployment", (row) => row.title],
  ["prompt tokens", (row) => row.prompt_tokens ?? "–"],
  ["requests in flight at the speed", (row) => (row.is_lower_bound ? "at least " : "") + figure(row.max_in_flight)],
  ["users one replica carries (95% interval)", (row) => (row.is_lower_bound ? "at least " : "") + range(row.users_carried, row.users_carried_low, row.users_carried_high)],
  ["users with half too slow", (row) => (row.is_lower_bound ? "at least " : "") + figure(row.users_at_50pct_slo)],
  ["replicas", (row) => figure(row.replicas)],
  ["GPUs", (row) => figure(row.gpus)],
  ["price", (row) => figure(row.purchase)],
  ["price per token/s", (row) => figure(row.purchase_per_token_per_s)],
  ["price per million tokens", (row) => figure(row.purchase_per_million_tokens)],
  ["J per token", (row) => figure(row.energy_j_per_output_token)],
  ["energy per million tokens", (row) => figure(row.energy_cost_per_million_tokens)],
];

function drawPlan() {
  const asked = demanded();
  if (!asked) return;
  const { demand, hardware, load } = asked;
  const rows = planOf(payload, load, demand, hardware);
  const table = byId("plan");
  table.replaceChildren();
  table.createCaption().textContent = `Capacity plan, cheapest first; money in ${hardware.currency}; ${payload.loads[load].title}.`;
  const planned = rows.filter((each) => each.replicas !== undefined);
  const columns = PLAN.filter(([, of], place) => place < 7 || planned.some((each) => of(each) !== "–"));
  row(table.createTHead(), columns.map(([title]) => title), true);
  const body = table.createTBody();
  for (const each of rows) {
    const known = each.replicas !== undefined;
    const line = row(body, known ? columns.map(([, of]) => of(each)) : [each.title, each.reason]);
    line.dataset.row = JSON.stringify(each);
    if (known) continue;
    line.className = "none";
    line.cells[1].colSpan = columns.length - 1;
    line.cells[1].className = "text";
  }
  byId("headline").textContent = headline(rows, demand, hardware);
  byId("rule-of-thumb").textContent = ruleOfThumb(demand);
}

function counted(number, noun) {
  return `${figure(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function headline(rows, demand, hardware) {
  const users = `${counted(demand.users, "registered user")} (${figure(atOnce(demand))} logged in, ${figure(demand.think_time_s)} s between an answer and the next request)`;
  const best = rows.find((each) => each.replicas !== undefined);
  if (!best) return `No deployment of this study is known to serve ${users} at ${figure(demand.tokens_per_s_per_user)} tokens/s each.`;
  const cost = best.purchase === null ? "" : `, ${figure(best.purchase)} ${hardware.currency}`;
  const gpus = best.gpus ? `, ${counted(best.gpus, "GPU")}` : "";
  const first = best.purchase === null ? "the smallest that was measured" : "the cheapest that was measured";
  return (
    `${figure(100 * demand.slo_attainment)}% of the requests of ${users} get at least ${figure(demand.tokens_per_s_per_user)} tokens/s from ` +
    `${counted(best.replicas, "replica")} of ${best.title}${gpus}${cost}: ${first}. ` +
    `One replica carries ${best.is_lower_bound ? "at least " : ""}${range(best.users_carried, best.users_carried_low, best.users_carried_high)} logged-in users.` +
    (best.emulated ? " These figures are emulated: no hardware was measured." : "")
  );
}

// The mean that a rule of thumb counts with, and what lies above it by chance.
function ruleOfThumb(demand) {
  const [trials, share] = [demand.users, demand.logged_in * 0.1];
  let [most, logarithm] = [0, trials * Math.log1p(-share)]; // of many users, no float holds the chance itself
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
    `A rule of thumb counts a tenth of those logged in as active at once: ${figure(trials * share)} requests in flight on average. ` +
    `By chance there are then up to ${quantiles[0]} in 95% and up to ${quantiles[1]} in 99% of the time; how many really are follows from the time that users think and wait.`
  );
}

const charts = payload.charts;
if (byId("view")) {
  byId("view").addEventListener("change", drawAll);
  dark.addEventListener("change", drawAll);
  drawAll();
}
if (byId("demand")) {
  const changed = () => { drawPlan(); if (byId("view")) drawPareto(chosen()); };
  byId("demand").addEventListener("input", changed);
  byId("demand").addEventListener("reset", () => setTimeout(changed));
  byId("demand").addEventListener("submit", (event) => event.preventDefault());
  drawPlan();
}
