// Wires the page: the event stream, the filters that the URL holds, and one drawing an update.

import { latencyLines, scatter, stackedAreas } from "./charts.js";
import { Decisions, missing, showDetail } from "./decisions.js";
import {
  SOURCES,
  SOURCE_NAMES,
  count,
  element,
  milliseconds,
  nick,
  percent,
  rate,
  seconds,
  short,
  sourcesBar,
  sum,
  tellApart,
} from "./format.js";
import { showTargets, showWorkers } from "./lanes.js";
import { Model, quantile } from "./model.js";

const STALE_MS = 5000,
  RETRY_MS = 2000;
const $ = (id) => document.getElementById(id);
const model = new Model();
const charts = {
  tokens: stackedAreas("tokens-chart", SOURCES),
  ttft: latencyLines("ttft-chart"),
  tpot: latencyLines("tpot-chart"),
  scatter: scatter("scatter-chart"),
};
const table = new Decisions((id) => choose({ decision: id }));

// ---- what is looked at: in the URL, so that it can be shared

const query = new URLSearchParams(location.search);
const view = {
  worker: query.get("worker") || "",
  source: SOURCES.includes(query.get("source")) ? query.get("source") : "",
  span: ["1", "5", "15"].includes(query.get("span")) ? Number(query.get("span")) : 5,
  decision: query.get("decision") || "",
  paused: query.has("paused"),
};
let opened = null; // the decision that is shown in full
let unknown = ""; // one that was asked for and is not kept
let all = false; // its candidates

function choose(change) {
  const before = { ...view };
  Object.assign(view, change);
  const kept = new URLSearchParams();
  for (const name of ["worker", "source", "decision"]) if (view[name]) kept.set(name, view[name]);
  if (view.span !== 5) kept.set("span", view.span);
  if (view.paused) kept.set("paused", "");
  history.replaceState(null, "", `?${kept}`.replace("paused=", "paused") + location.hash);
  if (view.worker !== before.worker || view.source !== before.source) {
    if (!view.decision) opened = null;
    connect();
  }
  if (view.decision !== before.decision) open(view.decision);
  controls();
  draw(true);
}

function controls() {
  $("worker").value = view.worker;
  $("source").value = view.source;
  $("span").value = String(view.span);
  $("pause").setAttribute("aria-pressed", String(view.paused));
  $("pause").textContent = view.paused ? "Resume" : "Pause";
  document.body.classList.toggle("paused", view.paused);
  const chip = [view.worker && nick(view.worker), SOURCE_NAMES[view.source]].filter(Boolean).join(", ");
  for (const place of document.querySelectorAll("[data-chip]")) place.textContent = chip;
}

// ---- the stream

let stream = null,
  heard = 0,
  broken = false,
  refused = "";

function connect() {
  stream?.close();
  const wanted = new URLSearchParams();
  if (view.worker) wanted.set("worker", view.worker);
  if (view.source) wanted.set("source", view.source);
  const mine = new EventSource(`events?${wanted}`);
  stream = mine;
  mine.onmessage = (event) => {
    if (mine !== stream) return;
    heard = performance.now();
    broken = false;
    refused = "";
    model.take(JSON.parse(event.data));
    draw();
  };
  mine.onerror = () => {
    if (mine !== stream) return;
    broken = true;
    link();
    // A browser tries again by itself, unless it got an answer that is no stream: the router has viewers enough.
    if (mine.readyState !== EventSource.CLOSED) return;
    fetch("state").then(
      (reply) => {
        refused = reply.ok ? "Too many look at this router already" : "";
      },
      () => {
        refused = "";
      },
    );
    setTimeout(() => {
      if (mine === stream) connect();
    }, RETRY_MS);
  };
}

function link() {
  const stale = broken || (heard > 0 && performance.now() - heard > STALE_MS);
  const state = model.state;
  document.body.classList.toggle("stale", stale);
  const text = stale
    ? refused || "The router does not answer; trying again"
    : state === null
      ? "connecting"
      : `${rate(state.decisions_per_second)} prompts/s${view.paused ? ", paused" : ""}`;
  if ($("link").textContent !== text) $("link").textContent = text;
}

// ---- drawing

let due = false,
  drawn = null;

function draw(anyway = false) {
  link();
  if (model.state === null || (view.paused && drawn !== null && !anyway) || due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    show();
  });
}

function show() {
  const state = model.state;
  if (view.paused && drawn === null) table.show(model.rows, view.decision);
  drawn = state;
  $("model").textContent = state.model;
  document.title = `${state.alarms.length ? `(${state.alarms.length}) ` : ""}kvtier ${state.model}`;
  tellApart(state.workers.map((lane) => lane.worker));
  options(state.workers.map((lane) => lane.worker));
  alarms(state.alarms);
  readings(state);
  tokens(state);
  latencies("ttft", "Time to first token");
  latencies("tpot", "Time per output token");
  predictions();
  showWorkers($("workers"), model, view, (worker) => choose({ worker }));
  showTargets($("targets"), state);
  const sampled = state.decisions_per_second > 10;
  $("sampling").textContent = sampled ? `10 of ${rate(state.decisions_per_second)} a second, by chance` : "";
  table.show(model.rows, view.decision || opened?.id);
  if (opened === null && !view.decision && model.rows.size) open([...model.rows.keys()].at(-1));
  else refresh();
}

function options(workers) {
  const select = $("worker"),
    wanted = ["", ...new Set([...workers, view.worker].filter(Boolean))];
  if (wanted.join() === [...select.options].map((option) => option.value).join()) return;
  select.replaceChildren(
    ...wanted.map((worker) => element("option", { value: worker }, worker ? nick(worker) : "all")),
  );
  select.value = view.worker;
}

function alarms(found) {
  const place = $("alarms"),
    text = JSON.stringify(found);
  if (place.dataset.shown === text) return;
  place.dataset.shown = text;
  place.replaceChildren(
    ...found.map((alarm) =>
      element(
        "p",
        { class: alarm.level, "data-alarm": alarm.id },
        element("strong", {}, alarm.level === "bad" ? "Fault" : "Notice"),
        alarm.text,
      ),
    ),
  );
}

function readings(state) {
  const recent = model.recentTokens({}),
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
      [`${count(state.decisions)} so far, ${count(state.open)} under way`],
    ],
    [
      "Tokens not computed",
      total ? percent(tiers / total) : "–",
      "",
      total ? [sourcesBar(recent)] : ["no prompt in the last minute"],
    ],
    [
      "Prefill spared",
      total ? saved(tiers).toFixed(2) : "–",
      total ? "workers" : "",
      total ? [`${saved(recent.store).toFixed(2)} of it by the store`] : [""],
    ],
    ["First token, median", ...medians(state.ttft)],
    ["Output token, median", ...medians(state.tpot)],
    [
      "Actual / predicted",
      state.prediction ? state.prediction.p50.toFixed(2) : "–",
      state.prediction ? "×" : "",
      [
        state.prediction
          ? `80 % in ${state.prediction.p10.toFixed(2)} to ${state.prediction.p90.toFixed(2)}`
          : "no answer in the last minute",
      ],
    ],
    [
      "A decision takes",
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

function tokens(state) {
  const series = model.tokenSeries(view, view.span),
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

function latencies(kind, name) {
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

function predictions() {
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

// ---- one decision

async function open(id) {
  if (!id) return;
  if (opened?.id !== id) all = false;
  unknown = "";
  try {
    const reply = await fetch(`decisions/${encodeURIComponent(id)}`);
    if (view.decision && view.decision !== id) return;
    if (reply.ok) {
      opened = await reply.json();
    } else if (opened?.id !== id) {
      opened = null;
      unknown = id;
    }
  } catch {
    /* the router is away; what was opened stays */
  }
  if (opened)
    showDetail($("detail"), opened, all, () => {
      all = true;
      showDetail($("detail"), opened, all);
    });
  else if (unknown)
    missing(
      $("detail"),
      unknown,
      "This decision is no longer kept: the router keeps the last thousand, since its start.",
    );
  table.show(model.rows, view.decision || opened?.id);
}

// What came of it may have become known.
function refresh() {
  const row = opened && model.rows.get(opened.id);
  if (row && (row.outcome !== opened.outcome || row.ttft_seconds !== opened.ttft_seconds)) open(opened.id);
}

// ---- controls

for (const name of ["worker", "source"])
  $(name).addEventListener("change", (event) => choose({ [name]: event.target.value }));
$("span").addEventListener("change", (event) => choose({ span: Number(event.target.value) }));
$("pause").addEventListener("click", () => choose({ paused: !view.paused }));
$("theme").addEventListener("click", nextTheme);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input")) return;
  if (event.key === "p") choose({ paused: !view.paused });
  else if (event.key === "t") nextTheme();
  else if (
    (event.key === "ArrowDown" || event.key === "ArrowUp") &&
    (event.target === document.body || event.target.closest("#decisions"))
  ) {
    event.preventDefault();
    table.move(event.key === "ArrowDown" ? 1 : -1, view.decision || opened?.id);
  }
});

const themes = ["auto", "light", "dark"];
function nextTheme() {
  const root = document.documentElement,
    current = root.dataset.theme || "auto";
  const next = themes[(themes.indexOf(current) + 1) % themes.length];
  if (next === "auto") delete root.dataset.theme;
  else root.dataset.theme = next;
  try {
    localStorage.setItem("kvtier-theme", next);
  } catch {
    /* storage is switched off */
  }
  restyle();
}
function restyle() {
  const theme = document.documentElement.dataset.theme || "auto";
  $("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
  for (const chart of Object.values(charts)) chart.restyle();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

controls();
restyle();
connect();
if (view.decision) open(view.decision);
setInterval(link, 1000);
