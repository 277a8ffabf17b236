// How numbers are written, and small helpers to make elements. No inline styles or markup from data: the page's
// Content-Security-Policy forbids the one, and names on the bus are anybody's.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const SOURCES = ["hbm", "dram", "store", "computed"];
export const SOURCE_NAMES = { hbm: "HBM", dram: "DRAM", store: "store", computed: "computed", handover: "prefill worker" };
// Of a decode worker some tokens come from a prefill worker, where they are counted as one of the others.
export const sourcesOf = (tokens) => ("handover" in tokens ? [...SOURCES, "handover"] : SOURCES);

export const count = (value) => whole.format(value);
export const short = (value) => (value < 10_000 ? whole.format(value) : compact.format(value));

export function rate(value) {
  if (value >= 100) return short(value);
  return value.toFixed(value >= 10 || value === 0 ? 0 : 1);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return `${whole.format(value)} s`;
  if (value >= 1) return `${value.toFixed(value >= 10 ? 1 : 2)} s`;
  return `${milliseconds(value)} ms`;
}

export function milliseconds(value) {
  const ms = 1000 * value;
  if (ms >= 100) return whole.format(ms);
  if (ms >= 10) return ms.toFixed(0);
  return ms < 0.05 ? "0" : ms.toFixed(1);
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

export const perSecond = (value) => (value > 0 ? `${bytes(value)}/s` : "–");
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.095 ? 1 : 0)} %`;

export function age(value) {
  if (value >= 172_800) return `${(value / 86_400).toFixed(0)} d`;
  if (value >= 7200) return `${(value / 3600).toFixed(0)} h`;
  if (value >= 120) return `${(value / 60).toFixed(0)} min`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

export function clock(time) {
  return new Date(1000 * time).toLocaleTimeString("en-GB");
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// Worker ids are long and alike: the last characters tell the live ones apart.
let idLength = 4;
export function tellApart(workers) {
  idLength = 4;
  while (new Set(workers.map(nick)).size < workers.length && idLength < 24) idLength += 1;
}
export const nick = (worker) => worker.slice(-idLength);

// A bar of parts, each [class, value]; `scale` is what the whole width stands for.
export function stack(parts, scale, label) {
  const bar = element("span", { class: "stack", role: "img", "aria-label": label });
  for (const [kind, value] of parts) {
    if (value <= 0) continue;
    const part = element("i", { class: `part ${kind}` });
    part.style.width = `${(100 * value) / (scale || 1)}%`;
    bar.append(part);
  }
  return bar;
}

export function sourcesBar(tokens, scale) {
  const sources = sourcesOf(tokens);
  const label = sources.map((source) => `${SOURCE_NAMES[source]} ${count(tokens[source] || 0)}`).join(", ");
  return stack(
    sources.map((source) => [source, tokens[source] || 0]),
    scale || sum(tokens),
    label,
  );
}

export function sum(tokens) {
  return sourcesOf(tokens).reduce((total, source) => total + (tokens[source] || 0), 0);
}
