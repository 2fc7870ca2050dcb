"use strict";
// The capacity plan, computed like servegrid.analysis.capacity and servegrid.analysis.queueing.
// tests/integration/test_report_page.py compares both.
const SHARE_USED = 0.9;
const SHARE_USED_MIXED = 0.85;
const SAME_PROMPT_FACTOR = 1.5;
const MAX_USERS = 1e6;
const YEAR_S = 8766 * 3600;
const KWH_J = 3.6e6;

// Pool adjacent violators: the non-decreasing times nearest to `seconds` by least squares.
function isotonicFit(seconds) {
  const pools = [];
  for (const value of seconds) {
    let [mean, count] = [value, 1];
    while (pools.length && pools.at(-1)[0] > mean) {
      const [previousMean, previousCount] = pools.pop();
      mean = (previousMean * previousCount + mean * count) / (previousCount + count);
      count += previousCount;
    }
    pools.push([mean, count]);
  }
  return pools.flatMap(([mean, count]) => Array(count).fill(mean));
}

function interpolateCurve(loads, values, requests) {
  if (requests <= loads[0]) return values[0];
  const above = loads.findIndex((n) => n >= requests);
  const [n, m] = [loads[above - 1], loads[above]];
  const [s, t] = [values[above - 1], values[above]];
  return s + ((t - s) * (requests - n)) / (m - n);
}

// The most requests in flight at which each takes at most `limit` seconds; 0 if there are none.
function maxInFlight(seconds, limit) {
  const first = seconds.findIndex((each) => each > limit);
  return first < 0 ? seconds.length : first;
}

// The probabilities of 0, 1, … `users` requests in flight (machine repairman's model).
function inFlight(seconds, users, thinkTime) {
  const logarithms = [0];
  const lastRate = seconds.length / seconds.at(-1);
  for (let n = 0; n < users; n++) {
    const rate = n < seconds.length ? (n + 1) / seconds[n] : lastRate;
    logarithms.push(logarithms[n] + Math.log((users - n) / thinkTime) - Math.log(rate));
  }
  const largest = logarithms.reduce((a, b) => Math.max(a, b));
  const weights = logarithms.map((each) => Math.exp(each - largest));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}

// The probability that a request of one of `users` meets the SLO.
function sloProbability(seconds, allowed, users, thinkTime) {
  const seen = inFlight(seconds, users - 1, thinkTime);
  const upTo = (limit) => seen.slice(0, limit).reduce((a, b) => a + b, 0);
  return allowed.reduce((sum, [limit, share]) => sum + share * upTo(limit), 0);
}

// See analysis.queueing.ROUNDING.
const ROUNDING = 1e-9;

function usersCarried(seconds, allowed, thinkTime, sloAttainment) {
  const meetsSlo = (users) => sloProbability(seconds, allowed, users, thinkTime) >= sloAttainment - ROUNDING;
  if (!meetsSlo(1)) return 0;
  let [low, high] = [1, 2];
  while (high <= MAX_USERS && meetsSlo(high)) [low, high] = [high, 2 * high];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (meetsSlo(middle)) low = middle;
    else high = middle;
  }
  return low;
}

function meanInFlight(seconds, users, thinkTime) {
  return inFlight(seconds, users, thinkTime).reduce((sum, p, n) => sum + n * p, 0);
}

function nearestLength(lengths, wanted) {
  const ratio = (length) => Math.max(length, wanted) / Math.min(length, wanted);
  const nearest = lengths.reduce((a, b) => (ratio(b) < ratio(a) ? b : a));
  return ratio(nearest) <= SAME_PROMPT_FACTOR ? nearest : null;
}

function weightedMean(rows, shares) {
  return rows[0].map((_, n) => rows.reduce((sum, row, index) => sum + row[n] * shares[index], 0));
}

const lengthsIn = (cells) => [...new Set(cells.map((cell) => cell.input_len))].sort((a, b) => a - b);

// The cells that say how much load meets the SLO; see analysis.summary.tried_cells.
function triedCells(cells, timeScale, slo) {
  const run = cells.filter((cell) => cell.trials[2] > 0);
  if (run.length === cells.length) return cells;
  const isKnown = (length) => {
    const column = cells.filter((cell) => cell.input_len === length);
    if (column.every((cell) => cell.trials[2] > 0)) return true;
    const lowest = Math.min(...column.map((cell) => cell.intensity));
    const isFast = (cell) => (cell.seconds_per_100_tokens[0] / timeScale / 100) * slo.tokens_per_s_per_user <= 1;
    return column.some((cell) => cell.trials[0] > 0 && (cell.intensity === lowest || (cell.seconds_per_100_tokens && isFast(cell))));
  };
  const known = new Set(lengthsIn(cells).filter(isKnown));
  return known.size ? run.filter((cell) => known.has(cell.input_len)) : run;
}

// The latency curves of the cells of one deployment and workload, or a text that says why there are none.
function latencyCurves(cells, outputLen, timeScale, prompts, slo) {
  let valid = cells.filter((cell) => cell.trials[0] > 0 && cell.seconds_per_100_tokens);
  const shares = new Map(lengthsIn(cells).map((length) => [length, prompts === null ? 1 : 0]));
  for (const [length, share] of Object.entries(prompts ?? {})) {
    const nearest = nearestLength([...shares.keys()], Number(length));
    if (nearest === null) return `prompts of about ${length} tokens were not measured`;
    shares.set(nearest, shares.get(nearest) + share);
  }
  cells = cells.filter((cell) => shares.get(cell.input_len) > 0);
  valid = valid.filter((cell) => shares.get(cell.input_len) > 0);
  const failed = cells.filter((cell) => cell.trials[1] === 0);
  valid = valid.filter((cell) => !failed.some((each) => each.input_len === cell.input_len && each.intensity <= cell.intensity));
  if (!valid.length) return "there is no valid cell";
  const lengths = lengthsIn(valid);
  const lacking = lengthsIn(cells).filter((length) => !lengths.includes(length));
  if (lacking.length) return `there is no valid cell with prompts of ${lacking[0]} tokens`;
  const byLength = lengths.map((length) => valid.filter((cell) => cell.input_len === length).sort((a, b) => a.in_flight - b.in_flight));
  const total = [...shares.values()].reduce((a, b) => a + b);
  const normalised = lengths.map((length) => shares.get(length) / total);
  const highest = (row) => Math.floor(row.at(-1).in_flight);
  const limit = Math.min(...byLength.map(highest));
  if (limit < 1) return "fewer than one request was in flight on average";
  const curves = (metric, index, factor, fit) => {
    if (byLength.some((row) => row.some((cell) => cell[metric]?.[index] === undefined))) return null;
    return byLength.map((row) => {
      const curve = [row.map((cell) => cell.in_flight), fit(row.map((cell) => cell[metric][index] * factor))];
      return Array.from({ length: limit }, (_, n) => interpolateCurve(...curve, n + 1));
    });
  };
  const seconds = (index) => curves("seconds_per_100_tokens", index, outputLen / 100 / timeScale, isotonicFit);
  const latencies = (metric) => curves(metric, 0, 1 / timeScale, isotonicFit);
  const joules = curves("energy_j_per_output_token", 0, 1, (values) => values);
  const [ttft, e2el, tpot, itlMax] = ["ttft", "e2el", "tpot", "itl_max"].map((name) => latencies(`${name}_s_p50`));
  for (const [rows, limit, title] of [[ttft, slo.ttft_s, "time to first token"], [e2el, slo.e2el_s, "end-to-end latency"], [tpot, slo.tpot_s, "time per output token"], [itlMax, slo.itl_s, "inter-token latency"]]) {
    if (limit !== null && rows === null) return `the SLO limits the ${title}, which is not known for every cell`;
  }
  const ends = new Map(byLength.filter((row) => highest(row) === limit).map((row) => [row[0].input_len, Math.max(...row.map((cell) => cell.intensity))]));
  return {
    promptTokens: [...new Set([lengths[0], lengths.at(-1)])].join(" to "),
    outputLen,
    shares: normalised,
    seconds: seconds(0),
    fast: seconds(1),
    slow: seconds(2),
    ttft,
    e2el,
    tpot,
    itlMax,
    joules: joules && weightedMean(joules, normalised),
    untestedAbove: !cells.some((cell) => cell.intensity > ends.get(cell.input_len)),
  };
}

// `values` at 1, 2, …, interpolated linearly at `position`; the first or last value outside.
function interpolate(values, position) {
  if (values.length === 1) return values[0];
  position = Math.min(Math.max(position, 1), values.length);
  const before = Math.min(Math.floor(position), values.length - 1);
  return values[before - 1] + (values[before] - values[before - 1]) * (position - before);
}

function concurrentUsers(demand) {
  return Math.max(1, Math.ceil(Math.round(demand.users * demand.logged_in * 1e6) / 1e6));
}

// How much hardware the demand needs on one deployment, by the names of the columns of the plan.
function sizeDeployment(curves, demand, hardware, gpu, gpuCount) {
  const seconds = weightedMean(curves.seconds, curves.shares);
  const within = (rows, limit) => {
    const mixed = weightedMean(rows, curves.shares);
    return rows.map((row) => maxInFlight(mixed.map((mean) => mean + (row[0] - mixed[0])), limit));
  };
  const allowed = (times) => {
    const limits = [[times, curves.outputLen / demand.tokens_per_s_per_user], [curves.ttft, demand.ttft_s], [curves.e2el, demand.e2el_s], [curves.tpot, demand.tpot_s], [curves.itlMax, demand.itl_s]];
    const found = limits.filter(([, limit]) => limit !== null).map(([rows, limit]) => within(rows, limit));
    return curves.shares.map((share, index) => [Math.min(...found.map((each) => each[index])), share]);
  };
  const most = Math.min(...allowed(curves.seconds).map(([each]) => each));
  const carried = (times, sloAttainment) =>
    times && usersCarried(weightedMean(times, curves.shares), allowed(times), demand.think_time_s, sloAttainment);
  const [users, low, high] = [curves.seconds, curves.slow, curves.fast].map((times) => carried(times, demand.slo_attainment));
  const row = {
    max_in_flight: most,
    max_in_flight_is_lower_bound: most === seconds.length && curves.untestedAbove,
    users_carried: users,
    users_carried_low: low,
    users_carried_high: high,
    users_at_50pct_slo: carried(curves.seconds, 0.5),
  };
  const safe = low ?? users;
  const shareUsed = curves.shares.length === 1 ? SHARE_USED : SHARE_USED_MIXED;
  const usersPerReplica = safe ? Math.max(1, Math.floor(shareUsed * safe)) : 0;
  if (!usersPerReplica) return { ...row, reason: "too few requests meet the SLO, even with one user" };
  const wanted = concurrentUsers(demand);
  const replicas = Math.ceil(wanted / usersPerReplica);
  const usersEach = Math.ceil(wanted / replicas);
  const busy = meanInFlight(seconds, usersEach, demand.think_time_s);
  const tokens = (((usersEach - busy) / demand.think_time_s) * curves.outputLen * wanted) / usersEach;
  const capacity = most ? (replicas * most * curves.outputLen) / seconds[most - 1] : null;
  const price = hardware.prices[gpu] ?? null;
  const purchase = price === null ? null : price * Math.max(1, gpuCount) * replicas;
  const joules = curves.joules && interpolate(curves.joules, busy);
  const ifKnown = (value, ...inputs) => (inputs.some((input) => input === null || input === undefined) ? null : value());
  const perMillion = ifKnown(() => (purchase / (hardware.years_in_use * YEAR_S) / tokens) * 1e6, purchase, hardware.years_in_use);
  return {
    ...row,
    users_per_replica: usersPerReplica,
    replicas,
    gpus: replicas * gpuCount,
    in_flight_mean: (busy * wanted) / usersEach,
    output_tokens_per_s: tokens,
    purchase,
    purchase_per_token_per_s: ifKnown(() => purchase / capacity, purchase, capacity),
    energy_j_per_output_token: joules,
    purchase_per_million_tokens: perMillion && perMillion / demand.load_factor,
    purchase_per_million_tokens_at_peak: perMillion,
    energy_cost_per_million_tokens: ifKnown(
      () => ((joules * 1e6) / KWH_J) * hardware.electricity_per_kwh, joules, hardware.electricity_per_kwh
    ),
    reason: null,
  };
}

// One row per deployment under one workload, the cheapest first.
function planCapacity(payload, workload, demand, hardware) {
  const outputLen = payload.workloads[workload].output_len;
  const rows = payload.deployments.flatMap((deployment, index) => {
    const all = payload.cells.filter((cell) => cell.deployment === index && cell.workload === workload);
    const cells = triedCells(all, deployment.time_scale ?? 1, demand);
    if (!cells.length) return [];
    const curves = latencyCurves(cells, outputLen, deployment.time_scale ?? 1, demand.prompts, demand);
    const head = { deployment: deployment.name, title: deployment.title, emulated: deployment.emulated, output_len_exact: deployment.output_len_exact, slo_class: demand.slo_class };
    if (typeof curves === "string") return [{ ...head, reason: curves }];
    const size = sizeDeployment(curves, demand, hardware, deployment.gpu, deployment.gpu_count);
    return [{ ...head, prompt_tokens: curves.promptTokens, ...size }];
  });
  const key = (row, name) => row[name] ?? Infinity;
  const order = ["purchase", "gpus", "replicas"];
  return rows
    .map((row, index) => [row, index])
    .sort(([a, i], [b, j]) => {
      for (const name of order) if (key(a, name) !== key(b, name)) return key(a, name) < key(b, name) ? -1 : 1;
      return i - j;
    })
    .map(([row]) => row);
}
