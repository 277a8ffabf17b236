// The table of decisions, and one of them in full.

import {
  SOURCE_NAMES,
  clock,
  count,
  element,
  milliseconds,
  nick,
  percent,
  seconds,
  sourcesBar,
  sourcesOf,
  stack,
  sum,
} from "./format.js";

const SHOWN = 60,
  CANDIDATES = 8;
const TERMS = {
  wait: ["wait", "until what is queued there has been computed"],
  fetch: ["fetch", "from the store: what the wait does not hide"],
  copy: ["copy", "from DRAM to HBM"],
  prefill: ["prefill", "of the tokens that no tier holds"],
  delay: ["delay", "of others: by its prefill, of those that wait or decode there; by its fetch, of those that fetch"],
  pressure: ["memory", "charged for delaying what decodes there"],
};

export class Decisions {
  constructor(choose) {
    this.body = document.getElementById("rows");
    this.empty = document.getElementById("no-rows");
    this.made = new Map(); // id -> {text, row}
    this.choose = choose;
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) choose(row.dataset.id);
    });
  }

  show(rows, chosen) {
    const latest = [...rows.values()].slice(-SHOWN).reverse();
    const most = Math.max(1, ...latest.map((row) => row.prompt_tokens));
    const made = new Map();
    for (const row of latest) {
      const text = JSON.stringify([row, most, row.id === chosen]);
      const before = this.made.get(row.id);
      made.set(
        row.id,
        before && before.text === text ? before : { text, row: this.#row(row, most, row.id === chosen, before) },
      );
    }
    this.made = made;
    const focused = document.activeElement;
    this.body.replaceChildren(...[...made.values()].map((one) => one.row));
    if (focused !== document.activeElement && focused.isConnected) focused.focus();
    this.empty.hidden = latest.length > 0;
  }

  // Up and down from the row that has the focus, or the one that is chosen.
  move(step, chosen) {
    const rows = [...this.body.rows];
    const current = rows.findIndex((row) => row.contains(document.activeElement) || row.dataset.id === chosen);
    const next = rows[Math.min(rows.length - 1, Math.max(0, current + step))];
    next?.querySelector("button").focus();
    if (next) this.choose(next.dataset.id);
  }

  #row(decision, most, chosen, before) {
    const { ttft_seconds: actual, predicted_ttft_seconds: predicted } = decision;
    const off = actual !== null && predicted > 0 && (actual > 2 * predicted || actual < predicted / 2);
    const row = before ? before.row : element("tr", { "data-id": decision.id });
    row.className = chosen ? "chosen" : "";
    const cells = [
      [
        element(
          "button",
          {
            type: "button",
            class: "when",
            "aria-pressed": String(chosen),
            "aria-label": `Decision ${decision.id} at ${clock(decision.time)}`,
          },
          clock(decision.time),
        ),
      ],
      [
        element(
          "span",
          { class: "tokens" },
          sourcesBar(decision.tokens, most),
          element("small", {}, count(decision.prompt_tokens)),
        ),
      ],
      [
        element(
          "span",
          { class: "mono", title: decision.prefill_worker ? `${decision.prefill_worker}, then ${decision.worker}` : decision.worker },
          decision.prefill_worker ? `${nick(decision.prefill_worker)} › ${nick(decision.worker)}` : nick(decision.worker),
        ),
      ],
      [seconds(predicted)],
      [element("span", { class: off ? "off" : null, title: off ? "more than twice off" : null }, seconds(actual))],
      [outcome(decision)],
    ];
    if (before) {
      cells.forEach((cell, index) => {
        if (index) row.cells[index].replaceChildren(...cell);
        else row.querySelector("button").setAttribute("aria-pressed", String(chosen));
      });
    } else {
      row.append(
        ...cells.map((cell, index) => element("td", { class: index === 3 || index === 4 ? "number" : null }, ...cell)),
      );
    }
    return row;
  }
}

function outcome(decision) {
  if (decision.outcome === "finished") {
    return element(
      "small",
      {},
      `${count(decision.output_tokens)} tok`,
      decision.tpot_seconds === null ? "" : ` × ${milliseconds(decision.tpot_seconds)} ms`,
    );
  }
  return element(
    "small",
    { class: decision.outcome === "failed" ? "bad" : null },
    decision.outcome === "open" ? "under way" : decision.outcome,
  );
}

export function showDetail(panel, decision, all, showAll) {
  const title = element(
    "h2",
    { id: "h-detail" },
    `Why it went to ${decision.chosen} `,
    element("span", { class: "unit mono" }, decision.id),
  );
  const ordered = [...decision.candidates].sort((a, b) => a.price_seconds - b.price_seconds);
  const chosen = ordered.find((one) => one.worker === decision.chosen);
  const shown = all ? ordered : ordered.slice(0, CANDIDATES);
  if (!shown.includes(chosen)) shown.push(chosen);
  const parts = [title, story(decision, ordered, chosen), whatCame(decision), prices(decision, shown)];
  if (shown.length < ordered.length) {
    const more = element("button", { type: "button", class: "more" }, `Show all ${ordered.length} workers`);
    more.addEventListener("click", showAll);
    parts.push(more);
  }
  panel.replaceChildren(...parts);
}

// In a sentence or two.
function story(decision, ordered, chosen) {
  const found = sourcesOf(chosen.tokens)
    .filter((source) => chosen.tokens[source] > 0)
    .map(
      (source) =>
        `${count(chosen.tokens[source])} ${source === "computed" ? "computed" : `from ${SOURCE_NAMES[source]}`}`,
    );
  const text = element("p", { class: "story" }, `${count(decision.prompt_tokens)} tokens: ${found.join(", ")}. `);
  const second = ordered.find((one) => one !== chosen);
  if (second) {
    const less = second.price_seconds - chosen.price_seconds;
    const names = Object.keys({ ...chosen.price, ...second.price });
    const why = names
      .map((name) => [name, (second.price[name] || 0) - (chosen.price[name] || 0)])
      .sort((a, b) => b[1] - a[1])[0];
    text.append(
      less < 1e-6
        ? `No cheaper than ${nick(second.worker)}: the least loaded got it. `
        : `Cheaper than ${nick(second.worker)} by ${seconds(less)}, above all for ${(TERMS[why[0]] || why)[0]} (${seconds(why[1])} less). `,
    );
  } else {
    text.append("No other worker could serve it. ");
  }
  if (decision.prefilled) {
    const { id, worker } = decision.prefilled;
    text.append(`Prefilled on ${nick(worker)}, `, element("a", { class: "mono", href: `?decision=${id}` }, "why"), ".");
  } else if (decision.fetch_chunks) {
    const held = new Map();
    for (const [target, chunks] of decision.targets) held.set(target, (held.get(target) || 0) + chunks);
    const names = [...held].map(([target, chunks]) => `${count(chunks)} from ${target}`).join(", ");
    text.append(
      `Plan: fetch ${count(decision.fetch_chunks)} ${decision.fetch_chunks === 1 ? "chunk" : "chunks"} of the store, ${names}.`,
    );
  } else {
    text.append("Plan: fetch nothing from the store.");
  }
  return text;
}

function whatCame(decision) {
  const { predicted_ttft_seconds: predicted, ttft_seconds: actual } = decision;
  const scale = 1.02 * Math.max(predicted, actual || 0);
  const line = (name, value, kind, after) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      element("td", {}, value === null ? "" : stack([[kind, value]], scale, seconds(value))),
      element("td", { class: "number" }, seconds(value)),
      element("td", {}, after),
    );
  const ratio = actual !== null && predicted > 0 ? `${(actual / predicted).toFixed(2)} × predicted` : "";
  const ends = {
    finished: `${count(decision.output_tokens)} tokens${decision.tpot_seconds === null ? "" : `, ${milliseconds(decision.tpot_seconds)} ms each`}`,
    open: "in flight",
    failed: "the worker failed",
    cancelled: "cancelled: the client disconnected",
  };
  return element(
    "table",
    { class: "came" },
    element(
      "tbody",
      {},
      line("Predicted", predicted, "expected", "to the first token"),
      line("Actual", actual, "actual", ratio),
      element(
        "tr",
        {},
        element("th", { scope: "row" }, "Then"),
        element("td", { colspan: "3" }, ends[decision.outcome] || decision.outcome),
      ),
    ),
  );
}

function prices(decision, shown) {
  const names = [...new Set([...Object.keys(TERMS), ...shown.flatMap((one) => Object.keys(one.price))])].filter(
    (name) => shown.some((one) => name in one.price),
  );
  const most = Math.max(...shown.map((one) => one.price_seconds), 1e-9);
  const head = element(
    "tr",
    {},
    element("th", { scope: "col", title: "the end of its id" }, "Worker"),
    element(
      "th",
      { scope: "col", title: "above the terms of the price, below the prompt's tokens by where they would come from" },
      "Price, and tokens by source",
    ),
    ...names.map((name) => {
      const [text, title] = TERMS[name] || [name, ""];
      return element(
        "th",
        { scope: "col", class: "number", title },
        element("i", { class: `swatch term-${name}`, "aria-hidden": "true" }),
        text,
      );
    }),
    element("th", { scope: "col", class: "number", title: "the terms together: the lowest is chosen" }, "price"),
  );
  const rows = shown.map((one) => {
    const label = names.map((name) => `${(TERMS[name] || [name])[0]} ${seconds(one.price[name] || 0)}`).join(", ");
    const state = [
      one.queued_tokens ? `${count(one.queued_tokens)} tok queued` : "",
      one.memory_used ? `memory ${percent(one.memory_used)}` : "",
    ]
      .filter(Boolean)
      .join(", ");
    return element(
      "tr",
      { class: one.worker === decision.chosen ? "chosen" : null, "data-worker": one.worker },
      element(
        "th",
        { scope: "row", class: "mono", title: one.worker },
        nick(one.worker),
        one.worker === decision.chosen ? element("small", {}, "chosen") : "",
        state ? element("small", {}, state) : "",
      ),
      element(
        "td",
        { class: "bars" },
        stack(
          names.map((name) => [`term-${name}`, one.price[name] || 0]),
          most,
          `Price: ${label}`,
        ),
        sourcesBar(one.tokens, sum(one.tokens)),
      ),
      ...names.map((name) =>
        element(
          "td",
          {
            class: "number",
            "data-term": name,
            "data-label": (TERMS[name] || [name])[0],
            "data-seconds": String(one.price[name] || 0),
          },
          milliseconds(one.price[name] || 0),
        ),
      ),
      element(
        "td",
        { class: "number total", "data-label": "price", "data-seconds": String(one.price_seconds) },
        milliseconds(one.price_seconds),
      ),
    );
  });
  return element(
    "table",
    { class: "prices" },
    element("caption", {}, "What each worker would have cost, in ms"),
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
}

export function missing(panel, id, text) {
  panel.replaceChildren(
    element("h2", { id: "h-detail" }, "Why it went there ", element("span", { class: "unit mono" }, id)),
    element("p", { class: "empty" }, text),
  );
}
