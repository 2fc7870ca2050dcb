"use strict";
// The capacity plan as servegrid.capacity and servegrid.queueing compute it; tests hold them together.
const SHARE_USED = 0.9;
const SAME_PROMPT_FACTOR = 1.5;
const MOST_USERS = 1e6;
const YEAR_S = 8766 * 3600;
const KWH_J = 3.6e6;

function rising(seconds) {
  const pools = [];
  for (const value of seconds) {
    let [mean, count] = [value, 1];
    while (pools.length && pools.at(-1)[0] > mean) {
      const [before, many] = pools.pop();
      mean = (before * many + mean * count) / (many + count);
      count += many;
    }
    pools.push([mean, count]);
  }
  return pools.flatMap(([mean, count]) => Array(count).fill(mean));
}

function curveAt(inFlight, seconds, requests) {
  if (requests <= inFlight[0]) return seconds[0];
  const above = inFlight.findIndex((n) => n >= requests);
  const [n, m] = [inFlight[above - 1], inFlight[above]];
  const [s, t] = [seconds[above - 1], seconds[above]];
  return s + ((t - s) * (requests - n)) / (m - n);
}

function mostInFlight(seconds, limit) {
  const first = seconds.findIndex((each) => each > limit);
  return first < 0 ? seconds.length : first;
}

function inFlight(seconds, users, think) {
  const logarithms = [0];
  const last = seconds.length / seconds.at(-1);
  for (let n = 0; n < users; n++) {
    const rate = n < seconds.length ? (n + 1) / seconds[n] : last;
    logarithms.push(logarithms[n] + Math.log((users - n) / think) - Math.log(rate));
  }
  const most = logarithms.reduce((a, b) => Math.max(a, b));
  const weights = logarithms.map((each) => Math.exp(each - most));
  const whole = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / whole);
}

function chance(seconds, allowed, users, think) {
  const seen = inFlight(seconds, users - 1, think);
  const upTo = (most) => seen.slice(0, most).reduce((a, b) => a + b, 0);
  return allowed.reduce((sum, [most, share]) => sum + share * upTo(most), 0);
}

function usersCarried(seconds, allowed, think, slo_attainment) {
  const kept = (users) => chance(seconds, allowed, users, think) >= slo_attainment;
  if (!kept(1)) return 0;
  let [low, high] = [1, 2];
  while (high <= MOST_USERS && kept(high)) [low, high] = [high, 2 * high];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (kept(middle)) low = middle;
    else high = middle;
  }
  return low;
}

function meanInFlight(seconds, users, think) {
  return inFlight(seconds, users, think).reduce((sum, p, n) => sum + n * p, 0);
}

function nearestLength(lengths, wanted) {
  const apart = (length) => Math.max(length, wanted) / Math.min(length, wanted);
  const nearest = lengths.reduce((a, b) => (apart(b) < apart(a) ? b : a));
  return apart(nearest) <= SAME_PROMPT_FACTOR ? nearest : null;
}

function meanOf(rows, shares) {
  return rows[0].map((_, n) => rows.reduce((sum, row, place) => sum + row[n] * shares[place], 0));
}

const lengthsIn = (cells) => [...new Set(cells.map((cell) => cell.input_len))].sort((a, b) => a - b);

// What the cells of one deployment under one load say, or in a text why they say nothing.
function served(cells, outputLen, timeScale, prompts) {
  let known = cells.filter((cell) => cell.trials[0] > 0 && cell.seconds_per_100_tokens);
  const shares = new Map(lengthsIn(cells).map((length) => [length, prompts === null ? 1 : 0]));
  for (const [length, share] of Object.entries(prompts ?? {})) {
    const nearest = nearestLength([...shares.keys()], Number(length));
    if (nearest === null) return `prompts of about ${length} tokens were not measured`;
    shares.set(nearest, shares.get(nearest) + share);
  }
  cells = cells.filter((cell) => shares.get(cell.input_len) > 0);
  known = known.filter((cell) => shares.get(cell.input_len) > 0);
  const failed = cells.filter((cell) => cell.trials[1] === 0);
  known = known.filter((cell) => !failed.some((each) => each.input_len === cell.input_len && each.intensity <= cell.intensity));
  if (!known.length) return "no load was served that may be believed";
  const lengths = lengthsIn(known);
  const lacking = lengthsIn(cells).filter((length) => !lengths.includes(length));
  if (lacking.length) return `prompts of ${lacking[0]} tokens were not served in a way that may be believed`;
  const parts = lengths.map((length) => known.filter((cell) => cell.input_len === length).sort((a, b) => a.intensity - b.intensity));
  const whole = [...shares.values()].reduce((a, b) => a + b);
  const parted = lengths.map((length) => shares.get(length) / whole);
  const highest = (own) => own.at(-1).intensity;
  const most = Math.min(...parts.map(highest));
  const factor = outputLen / 100 / timeScale;
  const at = (figure, place, isTime) => {
    if (parts.some((own) => own.some((cell) => cell[figure]?.[place] === undefined))) return null;
    return parts.map((own) => {
      const values = own.map((cell) => cell[figure][place] * (isTime ? factor : 1));
      const curve = [own.map((cell) => cell.intensity), isTime ? rising(values) : values];
      return Array.from({ length: most }, (_, n) => curveAt(...curve, n + 1));
    });
  };
  const joules = at("energy_j_per_output_token", 0, false);
  const short = parts.filter((own) => highest(own) === most).map((own) => own[0].input_len);
  return {
    promptTokens: [...new Set([lengths[0], lengths.at(-1)])].join(" to "),
    outputLen,
    shares: parted,
    seconds: at("seconds_per_100_tokens", 0, true),
    fast: at("seconds_per_100_tokens", 1, true),
    slow: at("seconds_per_100_tokens", 2, true),
    joules: joules && meanOf(joules, parted),
    moreUntried: !cells.some((cell) => cell.intensity > most && short.includes(cell.input_len)),
  };
}

function between(values, place) {
  if (values.length === 1) return values[0];
  place = Math.min(Math.max(place, 1), values.length);
  const before = Math.min(Math.floor(place), values.length - 1);
  return values[before - 1] + (values[before] - values[before - 1]) * (place - before);
}

function atOnce(demand) {
  return Math.max(1, Math.ceil(Math.round(demand.users * demand.logged_in * 1e6) / 1e6));
}

// What the demand needs of a deployment, by the names of the columns of the plan.
function needed(found, demand, hardware, gpu, gpuCount) {
  const limit = found.outputLen / demand.tokens_per_s_per_user;
  const seconds = meanOf(found.seconds, found.shares);
  const allowed = (times) => times.map((each, place) => [mostInFlight(each, limit), found.shares[place]]);
  const most = Math.min(...allowed(found.seconds).map(([each]) => each));
  const carried = (times, slo_attainment) => times && usersCarried(meanOf(times, found.shares), allowed(times), demand.think_time_s, slo_attainment);
  const [users, low, high] = [found.seconds, found.slow, found.fast].map((times) => carried(times, demand.slo_attainment));
  const row = {
    max_in_flight: most,
    is_lower_bound: most === seconds.length && found.moreUntried,
    users_carried: users,
    users_carried_low: low,
    users_carried_high: high,
    users_at_50pct_slo: carried(found.seconds, 0.5),
  };
  const sure = low ?? users;
  const each = sure ? Math.max(1, Math.floor(SHARE_USED * sure)) : 0;
  if (!each) return { ...row, reason: "the lowest measured load does not give that speed for sure" };
  const wanted = atOnce(demand);
  const replicas = Math.ceil(wanted / each);
  const there = Math.ceil(wanted / replicas);
  const busy = meanInFlight(seconds, there, demand.think_time_s);
  const tokens = (((there - busy) / demand.think_time_s) * found.outputLen * wanted) / there;
  const able = most ? (replicas * most * found.outputLen) / seconds[most - 1] : null;
  const price = hardware.prices[gpu] ?? null;
  const purchase = price === null ? null : price * Math.max(1, gpuCount) * replicas;
  const joules = found.joules && between(found.joules, busy);
  const known = (value, ...needs) => (needs.some((need) => need === null || need === undefined) ? null : value());
  return {
    ...row,
    users_per_replica: each,
    replicas,
    gpus: replicas * gpuCount,
    in_flight_mean: (busy * wanted) / there,
    output_tokens_per_s: tokens,
    purchase,
    purchase_per_token_per_s: known(() => purchase / able, purchase, able),
    energy_j_per_output_token: joules,
    purchase_per_million_tokens: known(() => (purchase / (hardware.years_in_use * YEAR_S) / tokens) * 1e6, purchase, hardware.years_in_use),
    energy_cost_per_million_tokens: known(() => ((joules * 1e6) / KWH_J) * hardware.electricity_per_kwh, joules, hardware.electricity_per_kwh),
    reason: null,
  };
}

// One row per deployment under one load, the cheapest first.
function planOf(payload, load, demand, hardware) {
  const outputLen = payload.loads[load].output_len;
  const rows = payload.deployments.flatMap((deployment, place) => {
    const cells = payload.cells.filter((cell) => cell.deployment === place && cell.load === load);
    if (!cells.length) return [];
    const found = served(cells, outputLen, deployment.time_scale ?? 1, demand.prompts);
    const head = { deployment: deployment.name, title: deployment.title, emulated: deployment.emulated };
    if (typeof found === "string") return [{ ...head, reason: found }];
    return [{ ...head, prompt_tokens: found.promptTokens, ...needed(found, demand, hardware, deployment.gpu, deployment.gpu_count) }];
  });
  const key = (row, name) => row[name] ?? Infinity;
  const order = ["purchase", "gpus", "replicas"];
  return rows
    .map((row, place) => [row, place])
    .sort(([a, i], [b, j]) => {
      for (const name of order) if (key(a, name) !== key(b, name)) return key(a, name) < key(b, name) ? -1 : 1;
      return i - j;
    })
    .map(([row]) => row);
}
