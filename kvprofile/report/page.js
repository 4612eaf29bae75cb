// What the page does where scripts run: the theme, the budget's slider, facts of a head, and memory in the reader's terms.
"use strict";

const byId = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)}%`;

/** Two significant digits, as kvprofile/report/numbers.py writes them. */
function number(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value === 0 || Math.abs(value) >= 99.5) return value.toFixed(0);
  return Math.abs(value) < 1e-4 ? value.toExponential(1) : value.toPrecision(2);
}

function size(bytes) {
  for (const [unit, scale] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (bytes >= scale) return `${(bytes / scale).toFixed(1)}\u00a0${unit}`;
  return `${Math.round(bytes)} B`;
}

function startTheme() {
  const root = document.documentElement, button = byId("theme"), prefers = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : prefers.matches;
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  prefers.addEventListener("change", label);
  label();
  button.hidden = false;
}

const drawn = new WeakMap();

/** The elements of a figure's cells, labels and legend, by kind and place; sought once, since a slider asks for them often. */
function partsOf(holder) {
  if (!drawn.has(holder)) {
    const parts = new Map();
    for (const kind of ["cell", "label", "legend"])
      for (const element of holder.querySelectorAll(`[data-${kind}] > *`)) {
        const key = `${kind} ${element.parentElement.dataset[kind]}`;
        parts.set(key, [...(parts.get(key) ?? []), element]);
      }
    drawn.set(holder, parts);
  }
  return drawn.get(holder);
}

/** Colour the maps of one profile after a plan, write its numbers and letters, and count its policies. */
function paint(data, side, plan) {
  const ink = (colour) => {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 ? "#ffffff" : "#101418";
  };
  const scaled = (part) => data.scale[Math.max(0, Math.min(255, Math.floor(part * 256)))];
  const style = {
    slots: (share) => ({ colour: scaled(share), text: share.toFixed(2).replace(/^0/, "") }),
    policies: (share, name) => {
      const found = data.policies.find((policy) => policy.name === name);
      return { colour: found.colour, text: found.letter };
    },
    bits: (share, name, codecs) => {
      const [low, high] = data.bits.ends, [keys, values] = codecs.map((codec) => data.bits.of[codec] ?? high);
      return { colour: scaled(((keys + values) / 2 - low) / (high - low)), text: keys === values ? `${keys}` : `${keys}/${values}` };
    },
  };
  for (const [figure, look] of Object.entries(style)) {
    const holder = byId(`figure-${side}-${figure}`);
    if (!holder) continue;
    const parts = partsOf(holder), fill = (kind, place, change) => parts.get(`${kind} ${place}`)?.forEach(change);
    const mark = (place, { colour, text }) => {
      fill("cell", place, (cell) => { cell.style.fill = colour; });
      fill("label", place, (label) => { label.textContent = text; label.style.fill = ink(colour); });
    };
    data.merged.forEach((layer, row) => plan.share[row].forEach((share, head) =>
      mark(`${layer}-${head}`, look(share, plan.policy[row][head], plan.codecs?.[row][head]))));
    if (figure === "bits") (plan.windows ?? []).forEach((pairs, row) => pairs.forEach((pair, head) =>
      mark(`${data.windows[row]}-${head}`, look(1, "", pair))));
    const names = plan.policy.flat();
    data.policies.forEach(({ name, letter }, index) => fill("legend", index, (label) => {
      label.textContent = `${letter}  ${name} (${names.filter((other) => other === name).length})`;
    }));
  }
}

/** The facts of a head under the pointer, or that the arrow keys are on. */
function startFacts(data, side, shown) {
  const tip = byId("tip");
  const tell = (place) => {
    const [layer, head] = place.split("-").map(Number), row = data.merged.indexOf(layer);
    const plan = shown(), window = plan.windows?.[data.windows.indexOf(layer)]?.[head];
    if (row < 0 && window?.some((codec) => codec !== "none"))
      return [`Layer ${layer}, head ${head}`, "keeps every token of its window", `keys in ${window[0]}, values in ${window[1]}`];
    if (row < 0) return [`Layer ${layer}`, "no full attention: it keeps its stock cache"];
    const damage = plan.damage[row][head];
    const lines = [`Layer ${layer}, head ${head}`, `keeps ${percent(plan.share[row][head])} of the slots`];
    lines.push(`policy ${plan.policy[row][head]}`);
    if (plan.codecs) lines.push(`keys in ${plan.codecs[row][head][0]}, values in ${plan.codecs[row][head][1]}`);
    if (damage !== null) lines.push(`damage ${number(damage)} nats per token, predicted`);
    if (data.cosine) lines.push(`similarity ${data.cosine[row][head].toFixed(2)}: median cosine of neighbouring keys`);
    return lines;
  };
  let active = null;
  const hide = () => {
    active?.classList.remove("active");
    active = null;
    tip.hidden = true;
  };
  const place = () => {
    if (!active) return;
    const box = active.getBoundingClientRect(), own = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
    const above = box.top - own.height - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left + box.width / 2 - own.width / 2, width - own.width - 8))}px`;
    tip.style.top = `${above < 8 ? box.bottom + 8 : above}px`;
  };
  const show = (cell) => {
    hide();
    active = cell;
    cell.classList.add("active");
    tip.replaceChildren(...tell(cell.dataset.cell).map((line, at) => {
      const element = document.createElement(at ? "span" : "b");
      element.textContent = line;
      return element;
    }));
    tip.hidden = false;
    place();
  };
  for (const svg of document.querySelectorAll(["slots", "bits", "policies", "thresholds"].map((name) => `#figure-${side}-${name} svg`).join())) {
    const wide = svg.closest(".wide") !== null, first = svg.querySelector(`[data-cell="${data.merged[0]}-0"]`);
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "application");
    svg.setAttribute("aria-roledescription", "map of heads");
    svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")} The arrow keys go from head to head.`);
    svg.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (cell) show(cell);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(first); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [right, down] = moves[event.key], [layer, head] = (active ?? first).dataset.cell.split("-").map(Number);
      const next = wide ? [layer + right, head + down] : [layer + down, head + right];
      const cell = svg.querySelector(`[data-cell="${next.join("-")}"]`);
      if (cell) show(cell);
    });
  }
  addEventListener("scroll", place, { passive: true });
}

/** The slider: solve for its budget, paint the plan, tell what it costs, and the command that writes it. */
function startSlider(data, show, memory) {
  const solver = data.solver ? makeSolver(data) : madePlans(data), slider = byId("budget"), factor = data.missed ?? 1;
  const { amounts } = solver, option = data.unit === "bytes" ? "--bytes" : "--budget", flags = data.solver?.flags ?? [];
  const quote = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`;
  const command = (budget) => ["kvprofile plan", quote(`${data.name}.json`), option, budget, ...flags,
    "-o", quote(`${data.name}-${budget}.json`)].join(" ");
  const judge = (damage, saved) => {
    if (damage * Math.max(1, factor) > data.limits.damage) return `not worth it: more than ${data.limits.damage} nats`;
    return saved < data.limits.saving ? `not worth it: saves ${percent(saved)} of the bytes` : "worth it";
  };
  const tell = (budget, plan) => {
    const saved = data.covered * (1 - budget), flat = plan.share.flat();
    byId("budget-value").textContent = percent(budget);
    slider.setAttribute("aria-valuetext", percent(budget));
    byId("answer-damage").textContent = number(plan.total);
    byId("answer-factor").textContent = data.saved.total && plan.total !== data.saved.total
      ? `nats per token, ${number(plan.total / data.saved.total)} × the saved plan's` : "nats per token";
    byId("answer-expected").textContent = factor > 1.5 || factor < 1 / 1.5
      ? `expect about ${number(plan.total * factor)}: the check measured ${number(factor)} times the prediction` : "";
    byId("answer-judgement").textContent = judge(plan.total, saved);
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    byId("answer-kept").textContent = percent(amounts ? mean(flat) : 1 - saved);
    if (amounts) {
      const bits = [plan.codecs ?? [], plan.windows ?? []].flat(3).map((codec) => data.bits.of[codec] ?? data.bits.ends[1]);
      byId("answer-bits").textContent = `in ${mean(bits.length ? bits : [data.bits.ends[1]]).toFixed(1)} bits a number, in the mean of all heads`;
    }
    byId("answer-heads").textContent =
      `${flat.filter((share) => share >= 1).length} of ${flat.length} heads keep all, ` +
      `${flat.filter((share) => share < 0.1).length} less than a tenth`;
    byId("command").textContent = command(budget);
    for (const axis of document.querySelectorAll("#damage [data-part=budget-axis] > *")) {
      const mark = axis.closest("svg").querySelector("[data-part=budget-mark]");
      mark.style.transform = `translateX(${(budget - data.budget) * axis.getBBox().width}px)`;
    }
    document.body.classList.toggle("solved", plan !== data.saved);
    memory(budget);
  };
  const use = (budget, plan) => { show(plan); tell(budget, plan); };
  const reset = () => { slider.value = amounts ? amounts.indexOf(data.budget) : data.budget; use(data.budget, data.saved); };
  const wanted = () => amounts ? amounts[Number(slider.value)] : Number(slider.value);
  if (amounts) Object.assign(slider, { min: 0, max: amounts.length - 1, step: 1 });
  else slider.min = Math.ceil(solver.lowest * 200) / 200;
  slider.addEventListener("input", () => use(wanted(), solver.replan(wanted())));
  byId("reset").addEventListener("click", reset);
  byId("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren(byId("command"));
    try { await navigator.clipboard.writeText(byId("command").textContent); } catch { document.execCommand("copy"); }
    byId("copy").textContent = "Copied";
    setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
  });
  reset();
  byId("solver").hidden = false;
  return solver;
}

/** Bytes of a cache: the stock one, and one that keeps `budget` of the merged layers' slots, or of all planned bytes. */
function cacheBytes(data, { context, batch, dtype, window }, budget) {
  const token = 2 * data.kv_heads * data.head_dim * data.bytes[dtype] * batch;
  const merged = data.merged.length * context * token;
  if (data.held !== null) {
    const stock = merged + data.windows.length * Math.min(data.held, context) * token;
    return { stock, plan: budget * stock };
  }
  const others = data.sliding * Math.min(window, context) * token;
  return { stock: merged + others, plan: budget * merged + others };
}

/** Memory in the reader's terms; returns what to call when the budget changes. */
function startMemory(pages) {
  const form = byId("memory"), alone = pages.length === 1;
  let budget = pages[0].budget;
  const update = () => {
    const whole = (name) => Math.max(0, Math.floor(Number(form.elements[name]?.value)) || 0);
    const terms = { context: whole("context"), batch: whole("batch"), window: whole("window"), dtype: form.elements.dtype.value };
    pages.forEach((data, side) => {
      for (const cell of document.querySelectorAll(`td[data-side="${side}"][data-budget]`))
        cell.textContent = size(cacheBytes(data, terms, Number(cell.dataset.budget)).plan);
      const { stock, plan } = cacheBytes(data, terms, alone ? budget : data.budget);
      byId(`memory-${side}-stock`).textContent = size(stock);
      byId(`memory-${side}-plan`).textContent = size(plan);
      byId(`memory-${side}-saved`).textContent = size(stock - plan);
      byId(`memory-${side}-part`).textContent = data.sliding && !terms.window ? ", merged layers only" : "";
      byId(`memory-${side}-budget`).textContent = percent(alone ? budget : data.budget);
    });
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  return (changed) => { budget = changed; update(); };
}

function start() {
  startTheme();
  const pages = JSON.parse(byId("profiles").textContent), memory = startMemory(pages);
  memory(pages[0].budget);
  pages.forEach((data, side) => {
    let plan = data.saved;
    startFacts(data, side, () => plan);
    const show = (other) => { plan = other; paint(data, side, plan); };
    if ((data.solver || data.byte_plans) && pages.length === 1) globalThis.kvprofile = startSlider(data, show, memory);
  });
}

start();
