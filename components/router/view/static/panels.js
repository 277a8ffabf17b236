// The readings on top, and the panels with a chart: each chart with its numbers in a table below or beside it.

import { latencyLines, scatter, stackedAreas } from "./charts.js";
import {
  SOURCES,
  SOURCE_NAMES,
  count,
  element,
  milliseconds,
  percent,
  rate,
  seconds,
  short,
  sourcesBar,
  sum,
} from "./format.js";
import { quantile } from "./model.js";

const $ = (id) => document.getElementById(id);
const charts = {
  tokens: stackedAreas("tokens-chart", SOURCES),
  ttft: latencyLines("ttft-chart"),
  tpot: latencyLines("tpot-chart"),
  scatter: scatter("scatter-chart"),
};

export function showPanels(model, view) {
  readings(model);
  tokens(model, view);
  latencies(model, view, "ttft", "Time to first token");
  latencies(model, view, "tpot", "Time per output token");
  predictions(model, view);
}

export function restyleCharts() {
  for (const chart of Object.values(charts)) chart.restyle();
}

function readings(model) {
  const state = model.state,
    recent = model.recentTokens({}),
    total = sum(recent),
    tiers = total - recent.computed;
  const rates = state.workers.map((lane) => lane.prefill_tokens_per_second);
  const prefill = rates.length ? rates.reduce((a, b) => a + b, 0) / rates.length : 0;
  const span = Math.min(state.window_seconds, Math.max(1, state.time - state.started));
  const saved = (tokens) => (prefill ? tokens / prefill / span : 0);
  const items = [
    [
      "Prompts",
      `${rate(state.decisions_per_second)}`,
      "/s",
      [`${count(state.decisions)} so far, ${count(state.open)} in flight`],
    ],
    [
      "Cache hit rate",
      total ? percent(tiers / total) : "–",
      "",
      total ? [sourcesBar(recent)] : ["no prompt in the last minute"],
    ],
    [
      "Prefill saved",
      total ? saved(tiers).toFixed(2) : "–",
      total ? "workers" : "",
      total ? [`${saved(recent.store).toFixed(2)} by the store`] : [""],
    ],
    ["TTFT, median", ...medians(state.ttft)],
    ["TPOT, median", ...medians(state.tpot)],
    [
      "TTFT, actual / predicted",
      state.prediction ? state.prediction.p50.toFixed(2) : "–",
      state.prediction ? "×" : "",
      [
        state.prediction
          ? `80 % in ${state.prediction.p10.toFixed(2)} to ${state.prediction.p90.toFixed(2)}`
          : "no answer in the last minute",
      ],
    ],
    [
      "Routing decision",
      ...split(state.decision_seconds),
      [
        Object.entries(state.outcomes)
          .filter(([name, value]) => name !== "finished" && value)
          .map(([name, value]) => `${short(value)} ${name}`)
          .join(", ") || "none failed",
      ],
    ],
  ];
  $("readings").replaceChildren(
    ...items.map(([name, value, unit, notes]) =>
      element(
        "div",
        {},
        element("dt", {}, name),
        element("dd", {}, element("b", {}, value), unit ? element("span", { class: "unit" }, unit) : ""),
        ...notes.map((one) => element("dd", { class: "note" }, one)),
      ),
    ),
  );
}

// With a load from the store, and without.
function medians({ store, other }) {
  const [value, unit] = split((store || other)?.p50);
  const without = store && other ? `${seconds(other.p50)} without` : "";
  return [
    value,
    store ? `${unit} with store` : unit,
    [without || (store ? "none without" : other ? "none from the store" : "no answer in the last minute")],
  ];
}

function split(value) {
  const text = seconds(value),
    at = text.indexOf(" ");
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

function tokens(model, view) {
  const state = model.state,
    series = model.tokenSeries(view, view.span),
    recent = model.recentTokens(view),
    total = sum(recent);
  const now = view.worker
    ? Object.fromEntries(
        SOURCES.map((source, index) => [source, series[index + 1]?.findLast((one) => one !== null) ?? 0]),
      )
    : state.tokens_per_second;
  const lane = state.workers.find((one) => one.worker === view.worker);
  const totals = view.worker ? lane?.tokens || {} : state.tokens;
  charts.tokens.show(
    series,
    view.source,
    `Prompt tokens a second by source, ${view.span} min. Now: ${SOURCES.map((source) => `${SOURCE_NAMES[source]} ${rate(now[source])}`).join(", ")}.`,
  );
  figures(
    $("tokens-table"),
    ["", "now", "1 min", "since start"],
    [...SOURCES]
      .reverse()
      .map((source) => [
        key(source, SOURCE_NAMES[source]),
        rate(now[source]),
        total ? percent(recent[source] / total) : "–",
        count(totals[source] || 0),
      ])
      .concat([["all", rate(sum(now)), "", count(sum(totals))]]),
  );
}

function latencies(model, view, kind, name) {
  const now = model.latencyNow(view, kind);
  const say = (which, of) =>
    of ? `${which}: median ${seconds(of.p50)}, 95 % within ${seconds(of.p95)}` : `${which}: none`;
  charts[kind].show(
    model.latencySeries(view, view.span, kind),
    `${name} over ${view.span} min. ${say("With a load from the store", now.store)}. ${say("Without", now.other)}.`,
  );
  const row = (label, of) =>
    of
      ? [label, milliseconds(of.p50), milliseconds(of.p95), milliseconds(of.p99), count(of.count)]
      : [label, "–", "–", "–", "0"];
  figures(
    $(`${kind}-table`),
    ["1 min", "p50", "p95 ┄", "p99", "n"],
    [row(key("store", "with store"), now.store), row(key("ink", "without"), now.other)],
  );
}

function predictions(model, view) {
  const samples = model.chosenSamples(view),
    recent = samples.filter((one) => one.time > model.state.time - model.state.window_seconds);
  const ratios = (wanted) =>
    recent
      .filter((one) => one.tokens.store > 0 === wanted && one.predicted_ttft_seconds > 0)
      .map((one) => one.ttft_seconds / one.predicted_ttft_seconds)
      .sort((a, b) => a - b);
  const row = (label, of) =>
    of.length
      ? [
          label,
          ...[0.1, 0.5, 0.9].map((share) => quantile(of, share).toFixed(2)),
          percent(of.filter((one) => one <= 2 && one >= 0.5).length / of.length),
        ]
      : [label, "–", "–", "–", "–"];
  const store = ratios(true),
    other = ratios(false);
  charts.scatter.show(
    samples,
    `Actual against predicted time to first token of ${samples.length} prompts. Median ratio with a load from the store ${row("", store)[2]}, without ${row("", other)[2]}.`,
  );
  figures(
    $("scatter-table"),
    ["ratio", "p10", "p50", "p90", "in 2×"],
    [row(key("store", "with store"), store), row(key("ink", "without"), other)],
  );
}

function key(kind, text) {
  return element("span", { class: "key" }, element("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), text);
}

function figures(place, heads, rows) {
  place.replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element(
      "tbody",
      {},
      ...rows.map(([first, ...others]) =>
        element("tr", {}, element("th", { scope: "row" }, first), ...others.map((other) => element("td", {}, other))),
      ),
    ),
  );
}
