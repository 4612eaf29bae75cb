// A budget's allocation as kvprofile/planning makes it where slots are counted: the same names, the same order of arithmetic.
"use strict";

const TINY = 1e-12;

/** Numbers of a page's data: base64 of their bytes, little-endian. */
function decode(text, Numbers) {
  return new Numbers(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

/** The curves of the page's data, decoded: group, candidate, head of the group, budget. */
function decodeCurves(solver, headsOfAGroup) {
  const numbers = decode(solver.curves, Float64Array), count = solver.budgets.length;
  let start = 0;
  return solver.candidates.map((candidates) => candidates.map(() =>
    Array.from({ length: headsOfAGroup }, () => numbers.subarray(start, start += count))));
}

/** Shares on the fine grid, and for every group the least damage at each and the candidate that has it. */
function lowerEnvelope(solver, curves) {
  const { budgets, steps } = solver, last = budgets.length - 1, lowest = Math.min(...solver.floor);
  const shares = [lowest];
  for (let step = 1; step <= steps; step++) if (step / steps > lowest) shares.push(step / steps);
  // Damage falls over orders of magnitude: its logarithm is interpolated, and the last stretch, to 0 at 1, linearly.
  const places = shares.map((share) => {
    const place = Math.min(Math.max(budgets.filter((budget) => budget <= share).length - 1, 0), last - 1);
    const ahead = (share - budgets[place]) / (budgets[place + 1] - budgets[place]);
    return { place, ahead: Math.min(Math.max(ahead, 0), 1) };
  });
  const damage = [], policy = [];
  solver.candidates.forEach((candidates, group) => {
    const least = new Float64Array(shares.length).fill(Infinity), best = new Int32Array(shares.length);
    candidates.forEach((name, index) => {
      const falling = budgets.map((_, at) => curves[group][index].reduce((sum, curve) => sum + curve[at], 0));
      for (let at = 1; at <= last; at++) falling[at] = Math.min(falling[at], falling[at - 1]);
      const logs = falling.map((value) => Math.log(Math.max(value, TINY)));
      shares.forEach((share, at) => {
        if (share < solver.floor[name] - 1e-9) return;
        const { place, ahead } = places[at];
        const value = share > budgets[last]
          ? falling[last] * (1 - share) / (1 - budgets[last])
          : Math.exp(logs[place] * (1 - ahead) + logs[place + 1] * ahead);
        if (value < least[at]) [least[at], best[at]] = [value, index];
      });
    });
    damage.push(least);
    policy.push(best);
  });
  return { shares, damage, policy };
}

/** Bisect the price of a slot: the choices just above and just below the budget. */
function prices(shares, damage, wanted) {
  const choices = (price) => damage.map((row) => {
    let best = 0;
    for (let at = 1; at < shares.length; at++)
      if (row[at] + price * shares[at] < row[best] + price * shares[best]) best = at;
    return best;
  });
  const total = (chosen) => chosen.reduce((sum, at) => sum + shares[at], 0);
  const fall = Math.max(0, ...damage.map((row) => Math.max(...row.filter(Number.isFinite))));
  const step = Math.min(1, ...shares.slice(1).map((share, at) => share - shares[at]));
  let low = 0, high = 1 + fall / step, cheap = choices(low), dear = choices(high);
  if (total(cheap) <= wanted) return { cheap, dear: cheap };
  for (let turn = 0; turn < 200; turn++) {
    const price = low === 0 ? (low + high) / 2 : Math.sqrt(low * high), chosen = choices(price);
    if (total(chosen) > wanted) [low, cheap] = [price, chosen];
    else [high, dear] = [price, chosen];
    if (high - low <= 1e-13 * high) break;
  }
  return { cheap, dear };
}

/** Every group's share and candidate for a budget. */
function allocate(envelope, budget) {
  const { shares, damage, policy } = envelope, wanted = budget * damage.length, highest = shares[shares.length - 1];
  const { cheap, dear } = prices(shares, damage, wanted);
  const share = dear.map((at) => shares[at]);
  let left = wanted - share.reduce((sum, value) => sum + value, 0);
  const gain = damage.map((row, group) =>
    (row[dear[group]] - row[cheap[group]]) / Math.max(shares[cheap[group]] - shares[dear[group]], TINY));
  for (const group of [...gain.keys()].sort((a, b) => gain[b] - gain[a])) {
    const more = Math.min(shares[cheap[group]] - share[group], left);
    share[group] += more;
    left -= more;
    if (left <= TINY) break;
  }
  for (let group = 0; group < share.length && left > TINY; group++) {
    const more = Math.min(highest - share[group], left);
    share[group] += more;
    left -= more;
  }
  // A partial step takes its policy at the grid point below it.
  const chosen = share.map((value, group) => {
    let at = shares.length - 1;
    while (at > 0 && shares[at] > value + 1e-9) at--;
    return policy[group][at];
  });
  return { share, chosen };
}

/** A curve's damage at a share; at share 1 it is 0. */
function interpolate(share, budgets, curve) {
  if (share <= budgets[0]) return curve[0];
  const last = budgets.length - 1;
  let at = last;
  while (budgets[at] > share) at--;
  const [from, to] = [curve[at], at === last ? 0 : curve[at + 1]];
  const width = (at === last ? 1 : budgets[at + 1]) - budgets[at];
  return (to - from) / width * (share - budgets[at]) + from;
}

/** A solver for any budget within reach: share, policy and damage of every head, by merged layer, and their total damage. */
function makeSolver(data) {
  const { solver } = data, whole = solver.granularity === "layer", count = whole ? data.kv_heads : 1;
  const curves = decodeCurves(solver, count), envelope = lowerEnvelope(solver, curves);
  const replan = (budget) => {
    const { share, chosen } = allocate(envelope, budget);
    const found = { share: [], policy: [], damage: [], codecs: data.saved.codecs, total: 0 };
    data.merged.forEach((_, row) => {
      for (const key of ["share", "policy", "damage"]) found[key].push([]);
      for (let head = 0; head < data.kv_heads; head++) {
        const group = whole ? row : row * data.kv_heads + head, index = chosen[group];
        const damage = interpolate(share[group], solver.budgets, curves[group][index][whole ? head : 0]);
        found.share[row].push(share[group]);
        found.policy[row].push(solver.policies[solver.candidates[group][index]]);
        found.damage[row].push(damage);
        found.total += damage;
      }
    });
    return found;
  };
  return { lowest: envelope.shares[0], replan };
}

/** Plans for bytes, made beforehand: the same, for every one of `amounts`. */
function madePlans(data) {
  const { amounts, totals, pairs, ...coded } = data.byte_plans, heads = data.kv_heads, size = data.merged.length * heads;
  const shares = decode(coded.share, Float32Array), damages = decode(coded.damage, Float32Array);
  const policies = decode(coded.policy, Uint8Array), chosen = decode(coded.pair, Uint8Array);
  const windows = decode(coded.window, Uint8Array), held = windows.length / amounts.length;
  const replan = (amount) => {
    const at = amounts.indexOf(amount);
    const rows = (value) => data.merged.map((_, row) =>
      Array.from({ length: heads }, (_, head) => value(at * size + row * heads + head)));
    return {
      share: rows((place) => shares[place]),
      policy: rows((place) => data.policies[policies[place]].name),
      damage: rows((place) => damages[place]),
      codecs: rows((place) => pairs[chosen[place]]),
      windows: Array.from({ length: held / heads }, (_, row) =>
        Array.from({ length: heads }, (_, head) => pairs[windows[at * held + row * heads + head]])),
      total: totals[at],
    };
  };
  return { lowest: amounts[0], amounts, replan };
}
