// Wires the page: the event stream, the filters that the URL holds, and one drawing an update.

import { Decisions, missing, showDetail } from "./decisions.js";
import { SOURCES, SOURCE_NAMES, element, nick, rate, tellApart } from "./format.js";
import { showTargets, showWorkers } from "./lanes.js";
import { Model } from "./model.js";
import { restyleCharts, showPanels } from "./panels.js";

const STALE_MS = 5000,
  RETRY_MS = 2000;
const $ = (id) => document.getElementById(id);
const model = new Model();
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
        if (reply.status === 401) location.reload(); // the cookie has expired: the form asks for the token again
        refused = reply.ok ? "Viewer limit reached for this router" : "";
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
  $("link").setAttribute("aria-live", stale ? "polite" : "off"); // a rate is not to be read out each second
  const text = stale
    ? refused || "The router does not answer; reconnecting"
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
  drawn = state;
  $("model").textContent = state.model;
  document.title = `${state.alarms.length ? `(${state.alarms.length}) ` : ""}kvtier ${state.model}`;
  tellApart(state.workers.map((lane) => lane.worker));
  options(state.workers.map((lane) => lane.worker));
  alarms(state.alarms);
  showPanels(model, view);
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
  restyleCharts();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

controls();
restyle();
connect();
if (view.decision) open(view.decision);
setInterval(link, 1000);
