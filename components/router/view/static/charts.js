// The charts: uPlot, in the page's own colours, made anew when the theme changes.

import { clock, milliseconds, rate } from "./format.js";

/* global uPlot */

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axes(x, y) {
  const common = {
    stroke: css("--quiet"),
    font: `11px ${css("--sans")}`,
    grid: { stroke: css("--rule"), width: 1 },
    ticks: { stroke: css("--rule"), width: 1, size: 4 },
  };
  return [
    { ...common, size: 24, gap: 3, space: 60, grid: { show: false }, ...x },
    { ...common, size: 42, gap: 3, space: 28, ...y },
  ];
}

class Chart {
  constructor(id, options) {
    this.place = document.getElementById(id);
    this.options = options;
    this.plot = null;
    this.data = null;
    new ResizeObserver(() => this.#resize()).observe(this.place);
  }

  show(data, label) {
    this.data = data;
    this.place.setAttribute("aria-label", label);
    if (this.plot === null) this.restyle();
    else this.plot.setData(data);
  }

  restyle() {
    if (this.data === null || !this.place.clientWidth) return;
    this.plot?.destroy();
    this.plot = new uPlot({ ...this.#size(), legend: { show: false }, ...this.options() }, this.data, this.place);
  }

  #size() {
    return { width: this.place.clientWidth, height: this.place.clientHeight };
  }

  #resize() {
    if (this.plot === null) this.restyle();
    else if (this.plot.width !== this.place.clientWidth) this.plot.setSize(this.#size());
  }
}

const times = { values: (_, splits) => splits.map((time) => clock(time).slice(0, splits[1] - splits[0] < 60 ? 8 : 5)) };
const cursor = { y: false, points: { size: 5 }, drag: { x: false, y: false } };

// Stacked areas; `order` is from the bottom up. Drawn from the top down, each over the one before.
export function stackedAreas(id, order) {
  let chosen = "";
  const color = (kind) => css(chosen === "" || chosen === kind ? `--${kind}` : `--${kind}-faint`);
  const chart = new Chart(id, () => ({
    cursor,
    padding: [8, 14, 0, 0],
    scales: { x: { time: true }, y: { range: (_, low, high) => [0, Math.max(10, 1.08 * (high || 0))] } },
    axes: axes(times, { values: (_, splits) => splits.map(rate) }),
    series: [
      {},
      ...[...order].reverse().map((kind) => ({
        stroke: css("--panel"),
        width: 1,
        fill: color(kind),
        points: { show: false },
        spanGaps: true,
      })),
    ],
  }));
  return {
    restyle: () => chart.restyle(),
    show([when, ...layers], source, label) {
      const sums = [];
      for (const layer of layers) {
        const below = sums[sums.length - 1];
        sums.push(layer.map((value, index) => (value === null ? null : value + (below ? below[index] : 0))));
      }
      const changed = chosen !== source;
      chosen = source;
      chart.show([when, ...sums.reverse()], label);
      if (changed) chart.restyle();
    },
  };
}

// Median and 95th percentile with and without a load from the store, in seconds.
export function latencyLines(id) {
  const line = (color, dashed) => ({
    stroke: css(color),
    width: dashed ? 1 : 2,
    dash: dashed ? [4, 3] : undefined,
    points: { show: false },
    spanGaps: true,
  });
  return new Chart(id, () => ({
    cursor,
    padding: [8, 14, 0, 0],
    scales: { x: { time: true }, y: { range: (_, low, high) => [0, 1.08 * (high || 0.1)] } },
    axes: axes({ ...times, space: 70 }, { values: (_, splits) => splits.map(milliseconds) }),
    series: [{}, line("--store", false), line("--store", true), line("--ink", false), line("--ink", true)],
  }));
}

// Predicted against actual on logarithmic axes; the diagonal is a right prediction, the lines beside it twice and half.
export function scatter(id) {
  const points = (color) => ({
    paths: () => null,
    points: { show: true, size: 4, stroke: `${css(color)}b0`, fill: `${css(color)}b0`, width: 0 },
  });
  const line = (dash) => ({ stroke: css("--quiet"), width: 1, dash, points: { show: false } });
  const decades = (_, axis, low, high) => {
    const ticks = [];
    for (let power = -4; power <= 3; power += 1) {
      for (const digit of [1, 3])
        if (digit * 10 ** power >= low && digit * 10 ** power <= high) ticks.push(digit * 10 ** power);
    }
    return ticks;
  };
  const axis = { splits: decades, values: (_, splits) => splits.map(milliseconds), filter: (_, splits) => splits };
  let bounds = [0.01, 1];
  const chart = new Chart(id, () => ({
    cursor: { show: false },
    padding: [8, 14, 0, 0],
    scales: { x: { time: false, distr: 3, range: () => bounds }, y: { distr: 3, range: () => bounds } },
    axes: axes({ ...axis, space: 30, grid: { stroke: css("--rule"), width: 1 } }, axis),
    series: [{}, line(), line([3, 3]), line([3, 3]), points("--ink"), points("--store")],
  }));
  return {
    restyle: () => chart.restyle(),
    show(samples, label) {
      const known = samples.filter((one) => one.predicted_ttft_seconds > 0 && one.ttft_seconds > 0);
      const all = known.flatMap((one) => [one.predicted_ttft_seconds, one.ttft_seconds]);
      if (all.length) bounds = [Math.min(...all) / 1.3, Math.max(...all) * 1.3];
      const rows = known.map((one) => [one.predicted_ttft_seconds, one.ttft_seconds, one.tokens.store > 0]);
      const [low, high] = bounds;
      // The lines have points of their own, at both ends.
      for (const end of [low, low * 2, high / 2, high]) rows.push([end, null, null]);
      rows.sort((a, b) => a[0] - b[0]);
      const x = rows.map((row) => row[0]);
      const ends = (factor) =>
        rows.map((row) =>
          row[2] === null && row[0] * factor >= low * 0.999 && row[0] * factor <= high * 1.001
            ? row[0] * factor
            : undefined,
        );
      const column = (store) => rows.map((row) => (row[2] === store ? row[1] : null));
      chart.show([x, ends(1), ends(2), ends(0.5), column(false), column(true)], label);
    },
  };
}
