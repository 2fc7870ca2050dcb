"use strict";
// The capacity plan, computed like servegrid.analysis.capacity and servegrid.analysis.queueing.
// tests/integration/test_report_page.py compares both.
const SHARE_USED = 0.9;
const SHARE_USED_MIXED = 0.85;
const SAME_PROMPT_FACTOR = 1.5;
const MAX_USERS = 1e6;
const MAX_NOT_COVERED = 0.05;
const HALVINGS = 50;
const MAX_REPLICAS = 1e6;
const MAX_INT = 2 ** 31 - 1;
const NO_RATE = 1e-6;
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

// The probabilities of 0, 1, … requests in flight at a Poisson process; the last one is of the highest number or more.
function openDistribution(seconds, rate) {
  const highest = seconds.length;
  const load = (rate * seconds.at(-1)) / highest;
  if (load >= 1) return [...Array(highest).fill(0), 1];
  if (!rate) return [1, ...Array(highest).fill(0)];
  const logarithms = [0];
  seconds.forEach((each, index) => logarithms.push(logarithms[index] + Math.log(rate) + Math.log(each / (index + 1))));
  const largest = logarithms.reduce((a, b) => Math.max(a, b));
  const weights = logarithms.map((each) => Math.exp(each - largest));
  weights[highest] /= 1 - load;
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}

// `seconds` at 1, 2, … groups of `size` requests in flight.
function byGroups(seconds, size) {
  if (size > seconds.length) return [(seconds.at(-1) * size) / seconds.length];
  return Array.from({ length: Math.floor(seconds.length / size) }, (_, index) => {
    const position = (index + 1) * size;
    const before = Math.floor(position);
    const [low, high] = [seconds[before - 1], seconds[Math.min(before, seconds.length - 1)]];
    return low + (high - low) * (position - before);
  });
}

function rateCarried(seconds, allowed, sloAttainment, dispersion) {
  const groups = byGroups(seconds, dispersion);
  const limits = allowed.map(([limit, share]) => [limit / dispersion, share]);
  let [low, high] = [0, groups.length / groups.at(-1)];
  const least = NO_RATE * high;
  for (let step = 0; step < HALVINGS; step++) {
    const middle = (low + high) / 2;
    const seen = openDistribution(groups, middle);
    const upTo = (limit) => {
      const [whole, rest] = [Math.floor(Math.min(limit, groups.length)), Math.min(limit, groups.length) % 1];
      return seen.slice(0, whole).reduce((a, b) => a + b, 0) + rest * seen[whole];
    };
    const probability = limits.reduce((sum, [limit, share]) => sum + share * upTo(limit), 0);
    if (probability >= sloAttainment - ROUNDING) low = middle;
    else high = middle;
  }
  return low > least ? dispersion * low : 0;
}

function openMeanInFlight(seconds, rate, dispersion) {
  const groups = byGroups(seconds, dispersion);
  const load = ((rate / dispersion) * groups.at(-1)) / groups.length;
  if (load >= 1) return Infinity;
  const distribution = openDistribution(groups, rate / dispersion);
  const mean = distribution.reduce((sum, p, n) => sum + n * p, 0) + (distribution.at(-1) * load) / (1 - load);
  return dispersion * mean;
}

// The dispersion on one replica, if each request goes to a random one.
const splitDispersion = (dispersion, replicas) => 1 + (dispersion - 1) / replicas;

// How recorded prompt lengths become measured ones; see analysis.latency_curves.cover_lengths.
function coverLengths(recorded, lengths) {
  const counts = new Map(lengths.map((length) => [length, 0]));
  const [shortest, longest] = [lengths[0], lengths.at(-1)];
  let [beyond, missing, total, tokens] = [0, 0, 0, 0];
  for (const [length, count] of recorded) {
    const within = Math.min(Math.max(length, shortest), longest);
    const above = lengths.find((each) => each >= within);
    const below = lengths.findLast((each) => each <= within);
    const upper = above === below ? 0 : (within - below) / (above - below);
    counts.set(above, counts.get(above) + count * upper);
    counts.set(below, counts.get(below) + count * (1 - upper));
    beyond += count * Math.max(0, length - longest);
    missing += length > longest ? count : 0;
    total += count;
    tokens += length * count;
  }
  const shares = new Map(lengths.map((length) => [length, counts.get(length) / total]));
  const mean = lengths.reduce((sum, length) => sum + length * shares.get(length), 0);
  return { shares, longest, mean, requestsMissing: missing / total, tokensMissing: beyond / tokens };
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
function latencyCurves(cells, outputLen, timeScale, prompts, slo, recorded) {
  const failed = cells.filter((cell) => cell.trials[1] === 0);
  let valid = cells.filter((cell) => cell.trials[0] > 0 && cell.seconds_per_100_tokens);
  valid = valid.filter((cell) => !failed.some((each) => each.input_len === cell.input_len && each.intensity <= cell.intensity));
  const coverage = recorded && valid.length ? coverLengths(recorded, lengthsIn(valid)) : null;
  const shares = coverage?.shares ?? new Map(lengthsIn(cells).map((length) => [length, prompts === null ? 1 : 0]));
  if (!coverage) {
    for (const [length, share] of Object.entries(prompts ?? {})) {
      const nearest = nearestLength([...shares.keys()], Number(length));
      if (nearest === null) return `prompts of about ${length} tokens were not measured`;
      shares.set(nearest, shares.get(nearest) + share);
    }
  }
  cells = cells.filter((cell) => shares.get(cell.input_len) > 0);
  valid = valid.filter((cell) => shares.get(cell.input_len) > 0);
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
    coverage,
  };
}

// Why the measured lengths do not stand for the recorded ones; null if they do.
function findGap(curves, demand) {
  const percent = (share, digits) => (digits === undefined ? `${Number((100 * share).toPrecision(6))}` : (100 * share).toFixed(digits));
  if (curves.coverage) {
    const { requestsMissing, tokensMissing, longest } = curves.coverage;
    const limit = Math.min(MAX_NOT_COVERED, 1 - demand.slo_attainment);
    for (const [share, most, what] of [[requestsMissing, limit, "requests have longer prompts than"], [tokensMissing, MAX_NOT_COVERED, "prompt tokens are beyond"]]) {
      if (share > most + ROUNDING) return `${percent(share, 1)}% of the ${what} the ${longest} tokens that were measured, and the limit is ${percent(most)}%: measure longer prompts`;
    }
  }
  const recordedLen = demand.recorded?.output_len ?? null;
  if (recordedLen === null) return null;
  const ratio = recordedLen / curves.outputLen;
  if (Math.max(ratio, 1 / ratio) <= SAME_PROMPT_FACTOR) return null;
  return `outputs of about ${Math.round(recordedLen)} tokens, the mean of the ${demand.recorded.kind}, were not measured`;
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

// How many measured requests a mean request of recorded users is; see analysis.capacity.request_size.
function requestSize(curves, demand) {
  const recordedLen = demand.recorded?.output_len ?? null;
  return recordedLen === null ? 1 : Math.max(1, recordedLen / curves.outputLen);
}

function meanSeconds(curves, rows, demand) {
  const size = requestSize(curves, demand);
  return weightedMean(rows, curves.shares).map((each) => size * each);
}

// For each prompt length, the most requests in flight that meet the SLO, and its share.
function allowedInFlight(curves, times, demand) {
  const within = (rows, limit) => {
    const mixed = weightedMean(rows, curves.shares);
    return rows.map((row) => maxInFlight(mixed.map((mean) => mean + (row[0] - mixed[0])), limit));
  };
  const e2elLimit = demand.e2el_s === null ? null : demand.e2el_s / requestSize(curves, demand);
  const limits = [[times, curves.outputLen / demand.tokens_per_s_per_user], [curves.ttft, demand.ttft_s], [curves.e2el, e2elLimit], [curves.tpot, demand.tpot_s], [curves.itlMax, demand.itl_s]];
  const found = limits.filter(([, limit]) => limit !== null).map(([rows, limit]) => within(rows, limit));
  return curves.shares.map((share, index) => [Math.min(...found.map((each) => each[index])), share]);
}

// The same, with the requests that are longer than measured: they count as if they missed the SLO.
function allowedWithMissing(curves, times, demand) {
  const pairs = allowedInFlight(curves, times, demand);
  const missing = curves.coverage?.requestsMissing ?? 0;
  if (!missing) return pairs;
  const [limit, share] = pairs.pop();
  return [...pairs, [limit, share - missing], [0, missing]];
}

const shareUsed = (curves) => (curves.shares.length === 1 ? SHARE_USED : SHARE_USED_MIXED);

// The replicas for a number of users, and the load of one of them; null if not even one user can be served.
function sizeByUsers(curves, demand) {
  const carried = (times, sloAttainment) =>
    times && usersCarried(meanSeconds(curves, times, demand), allowedWithMissing(curves, times, demand), demand.think_time_s, sloAttainment);
  const [users, low, high] = [curves.seconds, curves.slow, curves.fast].map((times) => carried(times, demand.slo_attainment));
  const size = { users_carried: users, users_carried_low: low, users_carried_high: high, users_at_50pct_slo: carried(curves.seconds, 0.5) };
  const safe = low ?? users;
  const perReplica = safe ? Math.max(1, Math.floor(shareUsed(curves) * safe)) : 0;
  if (!perReplica) return [size, null];
  const wanted = concurrentUsers(demand);
  const replicas = Math.ceil(wanted / perReplica);
  const each = Math.ceil(wanted / replicas);
  const busy = meanInFlight(meanSeconds(curves, curves.seconds, demand), each, demand.think_time_s);
  return [
    { ...size, users_per_replica: perReplica, users_logged_in: wanted },
    { replicas, rate: (each - busy) / demand.think_time_s, busy, share: wanted / each / replicas },
  ];
}

// The users who send a rate of requests to one replica, by Little's law.
function usersOf(seconds, rate, demand, dispersion) {
  const busy = openMeanInFlight(seconds, rate, dispersion);
  if (demand.cycle_s === null) return rate * demand.followed * demand.think_time_s + busy;
  return Math.max(rate * demand.followed * demand.cycle_s + (1 - demand.followed) * busy, busy);
}

function rateOf(curves, times, demand, sloAttainment, dispersion) {
  return rateCarried(meanSeconds(curves, times, demand), allowedWithMissing(curves, times, demand), sloAttainment, dispersion);
}

// The rate that the plan puts on one replica at most.
function mostPerReplica(curves, demand, dispersion) {
  return shareUsed(curves) * rateOf(curves, curves.slow ?? curves.seconds, demand, demand.slo_attainment, dispersion);
}

// The fewest replicas for a request rate; null if there cannot be enough.
function replicasFor(total, curves, demand) {
  const isEnough = (replicas) => total / replicas <= mostPerReplica(curves, demand, splitDispersion(demand.dispersion, replicas));
  if (!mostPerReplica(curves, demand, 1)) return null;
  let [low, high] = [0, 1];
  while (!isEnough(high)) {
    [low, high] = [high, 2 * high];
    if (high > MAX_REPLICAS) return null;
  }
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (isEnough(middle)) high = middle;
    else low = middle;
  }
  return high;
}

// The same as sizeByUsers for a request rate.
function sizeByRate(curves, demand) {
  const total = demand.requests_per_s;
  const replicas = replicasFor(total, curves, demand);
  const bursts = splitDispersion(demand.dispersion, replicas ?? 1);
  const carried = (times, sloAttainment) => times && rateOf(curves, times, demand, sloAttainment, bursts);
  const users = (times, rate) => (times ? Math.floor(Math.min(usersOf(meanSeconds(curves, times, demand), rate, demand, bursts), MAX_USERS)) : null);
  const [rate, low, high] = [curves.seconds, curves.slow, curves.fast].map((times) => carried(times, demand.slo_attainment));
  const size = {
    users_carried: users(curves.seconds, rate),
    users_carried_low: users(curves.slow, low),
    users_carried_high: users(curves.fast, high),
    users_at_50pct_slo: users(curves.seconds, carried(curves.seconds, 0.5)),
    requests_per_s_carried: rate,
    requests_per_s_carried_low: low,
  };
  if (replicas === null) return [size, null];
  const most = mostPerReplica(curves, demand, bursts);
  const seconds = meanSeconds(curves, curves.seconds, demand);
  const each = total / replicas;
  return [
    {
      ...size,
      users_per_replica: users(curves.seconds, most),
      users_logged_in: Math.ceil(Math.min(replicas * usersOf(seconds, each, demand, bursts), MAX_INT)),
      requests_per_s_per_replica: most,
    },
    { replicas, rate: each, busy: openMeanInFlight(seconds, each, bursts), share: 1 },
  ];
}

// How much hardware the demand needs on one deployment, by the names of the columns of the plan.
function sizeDeployment(curves, demand, hardware, gpu, gpuCount) {
  const most = Math.min(...allowedInFlight(curves, curves.seconds, demand).map(([each]) => each));
  const [size, load] = (demand.requests_per_s === null ? sizeByUsers : sizeByRate)(curves, demand);
  const row = { max_in_flight: most, max_in_flight_is_lower_bound: most === curves.seconds[0].length && curves.untestedAbove, ...size };
  if (!load) return { ...row, reason: "too few requests meet the SLO, even with one user" };
  const { replicas, busy } = load;
  const tokens = load.rate * replicas * load.share * (demand.recorded?.output_len ?? curves.outputLen);
  const measured = weightedMean(curves.seconds, curves.shares);
  const capacity = most ? (replicas * most * curves.outputLen) / measured[most - 1] : null;
  const price = hardware.prices[gpu] ?? null;
  const purchase = price === null ? null : price * Math.max(1, gpuCount) * replicas;
  const joules = curves.joules && interpolate(curves.joules, busy);
  const ifKnown = (value, ...inputs) => (inputs.some((input) => input === null || input === undefined) ? null : value());
  const perMillion = ifKnown(() => (purchase / (hardware.years_in_use * YEAR_S) / tokens) * 1e6, purchase, hardware.years_in_use);
  return {
    ...row,
    replicas,
    gpus: replicas * gpuCount,
    in_flight_mean: busy * replicas * load.share,
    response_s_mean: busy / load.rate,
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
    const curves = latencyCurves(cells, outputLen, deployment.time_scale ?? 1, demand.prompts, demand, demand.recorded_lengths);
    const head = { deployment: deployment.name, title: deployment.title, emulated: deployment.emulated, output_len_exact: deployment.output_len_exact, slo_class: demand.slo_class };
    if (typeof curves === "string") return [{ ...head, reason: curves }];
    const { promptTokens, coverage } = curves;
    const lengths = coverage && { prompt_tokens_mean: coverage.mean, requests_not_covered: coverage.requestsMissing, prompt_tokens_not_covered: coverage.tokensMissing };
    const gap = findGap(curves, demand);
    const size = gap ? { reason: gap } : sizeDeployment(curves, demand, hardware, deployment.gpu, deployment.gpu_count);
    return [{ ...head, prompt_tokens: promptTokens, ...lengths, ...size }];
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
