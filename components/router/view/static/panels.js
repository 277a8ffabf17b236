// The readings on top, and the panels with a chart: each chart with its numbers in a table below or beside it.

import { latencyLines, scatter, stackedAreas } from "./charts.js";
import {
  SOURCES,
  SOURCE_NAMES,
  age,
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

const OLD_SECONDS = 15; // where prompts are rare, the last one is often some seconds ago
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

// Figures of the minute up to the last prompt: when no more come, they stay, with their age.
function readings(model) {
  const state = model.state,
    minute = state.minute,
    total = minute ? sum(minute.tokens) : 0,
    tiers = minute ? total - minute.tokens.computed : 0;
  const rates = state.workers.map((lane) => lane.prefill_tokens_per_second);
  const prefill = rates.length ? rates.reduce((a, b) => a + b, 0) / rates.length : 0;
  const span = minute ? Math.min(state.window_seconds, Math.max(1, minute.time - state.started)) : 1;
  const saved = (tokens) => (prefill ? tokens / prefill / span : 0);
  const old = minute !== null && state.time - minute.time > OLD_SECONDS;
  const none = ["no prompt yet"];
  const items = [
    [
      "Prompts",
      "Prompts routed in the last second, since the router's start, and in flight",
      `${rate(state.decisions_per_second)}`,
      "/s",
      [`${count(state.decisions)} so far, ${count(state.open)} in flight`],
    ],
    [
      "Cache hit rate",
      "Cache hit rate: share of prompt tokens found in HBM, DRAM or the store, over a minute",
      total ? percent(tiers / total) : "–",
      "",
      total ? [sourcesBar(minute.tokens)] : none,
    ],
    [
      "Prefill saved",
      "Prefill saved, in workers: how many would be fully busy recomputing the cached tokens at the current prefill speed",
      total ? saved(tiers).toFixed(2) : "–",
      total ? "workers" : "",
      total ? [`${saved(minute.tokens.store).toFixed(2)} by the store`] : none,
    ],
    [
      "TTFT, median",
      "Time from the router's decision to the first token, of prompts with a load from the store and of others, over a minute",
      ...medians(minute?.ttft),
    ],
    [
      "TPOT, median",
      "Time per output token after the first, of prompts with a load from the store and of others, over a minute",
      ...medians(minute?.tpot),
    ],
    [
      "TTFT, actual / predicted",
      "Median of the actual over the predicted time to first token, over a minute: 1 is a correct prediction",
      minute?.prediction ? minute.prediction.p50.toFixed(2) : "–",
      minute?.prediction ? "×" : "",
      minute?.prediction
        ? [`80 % in ${minute.prediction.p10.toFixed(2)} to ${minute.prediction.p90.toFixed(2)}`]
        : ["no answer yet"],
    ],
    [
      "Routing decision",
      "Time that the router took to choose a worker, in the last second with a prompt; requests that did not finish, since its start",
      ...split(minute?.decision_seconds),
      [
        Object.entries(state.outcomes)
          .filter(([name, value]) => name !== "finished" && value)
          .map(([name, value]) => `${short(value)} ${name}`)
          .join(", ") || "none failed",
      ],
    ],
  ];
  $("readings").replaceChildren(
    ...items.map(([name, title, value, unit, notes], index) =>
      element(
        "div",
        { title },
        element("dt", {}, name),
        element("dd", {}, element("b", {}, value), unit ? element("span", { class: "unit" }, unit) : ""),
        ...notes.map((one) => element("dd", { class: "note" }, one)),
        old && index ? element("dd", { class: "note old" }, `${age(state.time - minute.time)} ago`) : "",
      ),
    ),
  );
  saving(minute, old ? `, ${age(state.time - minute.time)} ago` : "");
}

// Both sides are predictions, so that what the router mistakes is in both of them.
function saving(minute, when) {
  const found = minute?.saving;
  $("saving").hidden = !found;
  if (!found) return;
  const share = found.prefill_seconds / (found.without_store_prefill_seconds || 1);
  const figures = minute.tokens.store
    ? `mean TTFT ${seconds(found.without_store_ttft_seconds)} instead of ${seconds(found.ttft_seconds)}; in the same time` +
      ` of prefill ${rate(share * minute.decisions_per_second)} prompts/s instead of ${rate(minute.decisions_per_second)}`
    : "the same. No prompt of the minute was to load from it";
  $("saving").textContent = `Without the store, by the router's prediction${when}: ${figures}.`;
}

// With a load from the store, and without.
function medians({ store, other } = {}) {
  const [value, unit] = split((store || other)?.p50);
  const without = store && other ? `${seconds(other.p50)} without` : "";
  return [
    value,
    store ? `${unit} with store` : unit,
    [without || (store ? "none without" : other ? "none from the store" : "no answer yet")],
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
    [
      ["", ""],
      ["now, tok/s", "prompt tokens a second, in the last second"],
      ["1 min", "share of the tokens of the last minute's prompts"],
      ["since start, tok", "prompt tokens since the router's start"],
    ],
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
    [
      ["ms, 1 min", "milliseconds, of the prompts of the last minute"],
      ["p50", "median"],
      ["p95 ┄", "95 of 100 prompts take no longer; dashed in the chart"],
      ["p99", "99 of 100 prompts take no longer"],
      ["n", "number of prompts, at most 32 a second"],
    ],
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
    [
      ["ratio, 1 min", "actual over predicted time to first token, of the last minute's prompts"],
      ["p10", "10 of 100 prompts have a smaller ratio"],
      ["p50", "median ratio"],
      ["p90", "90 of 100 prompts have no larger ratio"],
      ["in 2×", "share of the prompts whose time was between half and twice the predicted one"],
    ],
    [row(key("store", "with store"), store), row(key("ink", "without"), other)],
  );
}

function key(kind, text) {
  return element("span", { class: "key" }, element("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), text);
}

function figures(place, heads, rows) {
  place.replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map(([head, title]) => element("th", { scope: "col", title: title || null }, head)))),
    element(
      "tbody",
      {},
      ...rows.map(([first, ...others]) =>
        element("tr", {}, element("th", { scope: "row" }, first), ...others.map((other) => element("td", {}, other))),
      ),
    ),
  );
}
