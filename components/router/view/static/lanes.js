// Workers and targets, a lane each.

import { age, bytes, count, element, nick, percent, perSecond, short, sourcesBar, stack } from "./format.js";

const SILENT = 5;

export function showWorkers(table, model, filter, choose) {
  const heads = [
    ["Worker", "the end of its id; press to show it alone"],
    ["Tokens by source", "of its prompts, since the router's start"],
    ["In flight", "prompts sent there that have not ended, now and over the last minute"],
    [
      "Queue",
      "prompt tokens to compute before a new prompt, at the last decision; and requests waiting in the engine",
    ],
    ["KV memory", "share of HBM held by running requests, at the last decision"],
    ["Cached in HBM", "Cached KV blocks, and their capacity"],
    ["Cached in DRAM", "Cached KV chunks, and their capacity"],
    ["Prefill speed", "tokens a second, as priced now"],
    ["Load speed", "throughput measured while busy: DRAM to HBM, and store to DRAM"],
    ["Fetching", "bytes in flight from the store"],
    ["Fetched", "chunks asked of the store since the worker's start: hits, and those that were late, corrupt or lost"],
    ["Heartbeat", "age of the last one from its tier"],
  ];
  const rows = model.state.workers.map((lane) => {
    const { hit = 0, late = 0, corrupt = 0, ...others } = lane.fetched_chunks;
    const lost = (others.unreachable || 0) + (others.refused || 0);
    const silent = lane.heard_seconds === null || lane.heard_seconds > SILENT;
    const name = element(
      "button",
      {
        type: "button",
        class: "name",
        "aria-pressed": String(filter.worker === lane.worker),
        title: `${lane.worker}: show it alone`,
        "aria-label": `Worker ${lane.worker}`,
      },
      nick(lane.worker),
    );
    name.addEventListener("click", () => choose(filter.worker === lane.worker ? "" : lane.worker));
    const history = (model.lanes.get(lane.worker) || []).slice(-60).map((one) => one.open);
    return {
      lit: filter.worker === lane.worker,
      cells: [
        [name, note(lane.role)],
        [sourcesBar(lane.tokens), note(`${short(lane.decisions)} prompts`)],
        [element("span", { class: "flow" }, strong(count(lane.open)), spark(history))],
        [
          lane.queued_tokens === null ? "–" : `${short(lane.queued_tokens)} tok`,
          note(lane.queue ? `${count(lane.queue)} waiting` : ""),
        ],
        lane.memory_used === null
          ? ["–"]
          : [stack([["used", lane.memory_used]], 1, percent(lane.memory_used)), note(percent(lane.memory_used))],
        cached("hbm", lane.hbm_bytes, lane.hbm_capacity_bytes),
        cached("dram", lane.dram_bytes, lane.dram_capacity_bytes),
        [`${short(lane.prefill_tokens_per_second)} tok/s`],
        [`${perSecond(lane.dram_bytes_per_second)}`, note(`${perSecond(lane.store_bytes_per_second)} store`)],
        [lane.bytes_in_flight ? bytes(lane.bytes_in_flight) : "–"],
        [
          `${short(hit)} hit`,
          problems([
            ["late", late],
            ["corrupt", corrupt],
            ["lost", lost],
          ]),
        ],
        lane.role === "decode" && lane.heard_seconds === null
          ? ["–"]
          : [mark(silent, lane.heard_seconds === null ? "no report" : age(lane.heard_seconds))],
      ],
    };
  });
  fill(table, heads, rows, "No worker is live: look at the workers' logs. Is their namespace the router's?");
}

export function showTargets(table, state) {
  const heads = [
    ["Target", "its address"],
    ["Space used", "payload held, of the capacity"],
    ["Chunks", "in the router's residency mirror"],
    ["Device reads", "throughput when busy; – : not lately"],
    ["Sent", "now"],
    ["Received", "now"],
    ["Queues", "bytes waiting to be read, and to be written"],
    [
      "Eviction age",
      "age of the segment evicted last: if it is shorter than the reuse interval of prompts, add capacity",
    ],
    ["Clients", "connections"],
    ["Faults", "corrupt chunks and failed writes since its start"],
    ["Heartbeat", "age of the last one"],
  ];
  const rows = state.targets.map((lane) => ({
    cells: [
      [element("span", { class: "name" }, lane.target)],
      lane.capacity_bytes
        ? [
            stack(
              [["store", lane.payload_bytes]],
              lane.capacity_bytes,
              percent(lane.payload_bytes / lane.capacity_bytes),
            ),
            note(`${bytes(lane.payload_bytes)} of ${bytes(lane.capacity_bytes)}`),
          ]
        : ["–"],
      [short(lane.chunks)],
      [perSecond(lane.device_bytes_per_second)],
      [perSecond(lane.sent_bytes_per_second)],
      [perSecond(lane.received_bytes_per_second)],
      [
        lane.waiting_read_bytes + lane.waiting_write_bytes
          ? `${bytes(lane.waiting_read_bytes)} / ${bytes(lane.waiting_write_bytes)}`
          : "–",
      ],
      [lane.evicted_age_seconds ? age(lane.evicted_age_seconds) : "never"],
      [count(lane.connections)],
      [
        problems([
          ["corrupt", lane.corrupt_chunks],
          ["unwritten", lane.failed_writes],
        ]) || "none",
      ],
      [mark(lane.heard_seconds > SILENT, age(lane.heard_seconds))],
    ],
  }));
  fill(table, heads, rows, "No heartbeat from any target: start one with --nats and the --namespace of the router.");
}

function fill(table, heads, rows, empty) {
  const focused = table.contains(document.activeElement) ? document.activeElement.textContent : null;
  const head = element(
    "thead",
    {},
    element("tr", {}, ...heads.map(([text, title]) => element("th", { scope: "col", title: title || null }, text))),
  );
  const body = element(
    "tbody",
    {},
    ...rows.map(({ cells, lit }) =>
      element(
        "tr",
        { class: lit ? "lit" : null },
        ...cells.map((cell, index) =>
          element(index ? "td" : "th", index ? {} : { scope: "row" }, ...cell.filter(Boolean)),
        ),
      ),
    ),
  );
  if (!rows.length)
    body.append(element("tr", {}, element("td", { class: "empty", colspan: String(heads.length) }, empty)));
  table.replaceChildren(head, body);
  if (focused !== null) [...table.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
}

function cached(tier, held, room) {
  if (!room) return ["–"];
  return [stack([[tier, held]], room, percent(held / room)), note(`${bytes(held)} of ${bytes(room)}`)];
}

const note = (text) => (text ? element("small", {}, text) : "");
const strong = (text) => element("b", {}, text);
const mark = (bad, text) => element("span", { class: bad ? "bad" : null }, text);

function problems(counts) {
  const some = counts.filter(([, value]) => value > 0);
  return some.length
    ? element("small", { class: "bad" }, some.map(([name, value]) => `${short(value)} ${name}`).join(", "))
    : "";
}

// Of a few seconds it would look like a fault.
function spark(values) {
  if (values.length < 10) return "";
  const namespace = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(namespace, "svg");
  picture.setAttribute("viewBox", "0 0 60 16");
  picture.setAttribute("class", "spark");
  picture.setAttribute("aria-hidden", "true");
  const most = Math.max(1, ...values);
  const path = document.createElementNS(namespace, "polyline");
  path.setAttribute("points", values.map((value, index) => `${index},${15 - (14 * value) / most}`).join(" "));
  picture.append(path);
  return picture;
}
