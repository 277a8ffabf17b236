// What the page knows: the server's updates, kept for a bounded time, and what is derived from them.

import { SOURCES } from "./format.js";

const POINTS = 900,
  SAMPLES = 2048,
  ROWS = 200,
  WINDOW = 60;

export class Model {
  constructor() {
    this.state = null;
    this.points = [];
    this.samples = [];
    this.rows = new Map(); // by id, the oldest first
    this.lanes = new Map(); // worker -> [{time, tokens, open}]
  }

  take(update) {
    if (update.fresh) {
      this.points = [];
      this.samples = [];
      this.rows.clear();
      if (this.state && this.state.started !== update.state.started) this.lanes.clear();
    }
    this.state = update.state;
    this.points = [...this.points, ...update.points].slice(-POINTS);
    this.samples = [...this.samples, ...update.samples].slice(-SAMPLES);
    for (const row of update.decisions) this.rows.set(row.id, row);
    for (const id of this.rows.keys()) {
      if (this.rows.size <= ROWS) break;
      this.rows.delete(id);
    }
    const present = new Set(this.state.workers.map((lane) => lane.worker));
    for (const name of this.lanes.keys()) if (!present.has(name)) this.lanes.delete(name);
    for (const lane of this.state.workers) {
      const history = this.lanes.get(lane.worker) || [];
      history.push({ time: this.state.time, tokens: lane.tokens, open: lane.open, decisions: lane.decisions });
      this.lanes.set(lane.worker, history.slice(-POINTS));
    }
  }

  chosenSamples(filter) {
    return this.samples.filter(
      (one) => (!filter.worker || one.worker === filter.worker) && (!filter.source || one.tokens[filter.source] > 0),
    );
  }

  // Tokens a second by source, in bins of `step` seconds that end now: {times, hbm, dram, store, computed}.
  tokenSeries(filter, span) {
    const points = filter.worker ? this.#workerPoints(filter.worker) : this.points;
    return binned(points, this.#grid(span), (bin) =>
      SOURCES.map((source) => mean(bin.map((one) => one.tokens[source]))),
    );
  }

  #grid(span) {
    return grid(this.state.time, span, this.points[0]?.time ?? this.state.time);
  }

  #workerPoints(worker) {
    const history = this.lanes.get(worker) || [];
    return history.slice(1).map((now, index) => {
      const before = history[index],
        passed = Math.max(now.time - before.time, 1e-3);
      const tokens = {};
      for (const source of SOURCES) tokens[source] = Math.max(0, now.tokens[source] - before.tokens[source]) / passed;
      return { time: now.time, tokens };
    });
  }

  // Percentiles over time: [times, store p50, store p95, other p50, other p95], in seconds.
  latencySeries(filter, span, kind) {
    const of = (latency) => [latency.store?.p50, latency.store?.p95, latency.other?.p50, latency.other?.p95];
    if (!filter.worker && !filter.source) {
      return binned(this.points, this.#grid(span), (bin) => of(bin[bin.length - 1][kind]).map((one) => one ?? null));
    }
    const samples = this.chosenSamples(filter),
      { times } = this.#grid(span);
    const columns = times.map((end) =>
      of(
        latency(
          samples.filter((one) => one.time > end - WINDOW && one.time <= end),
          kind,
        ),
      ).map((one) => one ?? null),
    );
    return [times, ...[0, 1, 2, 3].map((index) => columns.map((column) => column[index]))];
  }

  latencyNow(filter, kind) {
    if (!filter.worker && !filter.source) return this.state[kind];
    return latency(
      this.chosenSamples(filter).filter((one) => one.time > this.state.time - WINDOW),
      kind,
    );
  }

  // Prompt tokens by source in the last minute.
  recentTokens(filter) {
    const points = (filter.worker ? this.#workerPoints(filter.worker) : this.points).filter(
      (one) => one.time > this.state.time - WINDOW,
    );
    return Object.fromEntries(
      SOURCES.map((source) => [source, points.reduce((all, one) => all + one.tokens[source], 0)]),
    );
  }
}

// Of a router that began lately only the time since then, a minute at least.
function grid(now, span, began) {
  const wanted = Math.min(60 * span, Math.max(60, Math.ceil((now - began) / 60) * 60));
  const step = wanted <= 60 ? 1 : wanted <= 300 ? 3 : 10;
  const last = Math.floor(now / step) * step;
  return { step, times: Array.from({ length: wanted / step }, (_, index) => last - wanted + step * (index + 1)) };
}

// One column per bin; null where there is no point. Bins keep their place while time goes on.
function binned(points, { step, times }, derive) {
  const bins = times.map(() => []);
  for (const point of points) {
    const index = Math.ceil((point.time - times[0]) / step);
    if (index >= 0 && index < bins.length) bins[index].push(point);
  }
  const columns = bins.map((bin) => (bin.length ? derive(bin) : null));
  const width = columns.find((column) => column)?.length ?? 4;
  return [times, ...Array.from({ length: width }, (_, row) => columns.map((column) => (column ? column[row] : null)))];
}

function mean(values) {
  return values.reduce((all, one) => all + one, 0) / values.length;
}

function latency(samples, kind) {
  const field = `${kind}_seconds`;
  const split = (wanted) =>
    percentiles(
      samples.filter((one) => one.tokens.store > 0 === wanted && one[field] !== null).map((one) => one[field]),
    );
  return { store: split(true), other: split(false) };
}

function percentiles(values) {
  if (!values.length) return null;
  values.sort((a, b) => a - b);
  const at = (share) => quantile(values, share);
  return { count: values.length, p50: at(0.5), p95: at(0.95), p99: at(0.99) };
}

// The nearest rank, as the server takes it.
export function quantile(ordered, share) {
  return ordered[Math.max(0, Math.ceil(share * ordered.length) - 1)];
}
