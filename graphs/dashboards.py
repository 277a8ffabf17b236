"""The Grafana dashboards: `python -m graphs.dashboards` writes them to docker/grafana/dashboards.

Each panel is its title, what to read from it, a unit, and queries. They are made with Grafana's own SDK, which only
this needs: what is committed is what Grafana reads.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import DataSourceRef, GraphGradientMode, LegendDisplayMode, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent.parent / "docker" / "grafana" / "dashboards"
_SOURCE = DataSourceRef("prometheus", "${datasource}")
_WIDTH, _HEIGHT = 24, 8
_RATE = "[$__rate_interval]"

Query = tuple[str, str]  # an expression, and the legend of its series
Panel = timeseries.Panel | stat.Panel | heatmap.Panel


def _queries(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number)).range()
        for number, (expression, legend) in enumerate(queries)
    ]


def graph(title: str, text: str, unit: str, *queries: Query, stacked: bool = False, most: float | None = None) -> Panel:
    """Lines over time."""
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(_SOURCE).min(0)
    panel = panel.span(_WIDTH // 3).height(_HEIGHT).line_width(1).fill_opacity(60 if stacked else 10)
    panel = panel.gradient_mode(GraphGradientMode.NONE)
    panel = panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if most is not None:
        panel = panel.max(most)
    for query in _queries(queries):
        panel = panel.with_target(query)
    return panel


def number(title: str, text: str, unit: str, query: str, *, worst: float | None = None) -> Panel:
    """One figure; red from `worst` on."""
    steps = [Threshold(None, "green"), *([] if worst is None else [Threshold(worst, "red")])]
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(_SOURCE)
    panel = panel.span(_WIDTH // 6).height(_HEIGHT // 2)
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel.with_target(_queries([(query, "")])[0])


def heat(title: str, text: str, unit: str, query: str) -> Panel:
    """A histogram's buckets over time."""
    panel = heatmap.Panel().title(title).description(text).datasource(_SOURCE).span(_WIDTH // 3).height(_HEIGHT)
    panel = panel.y_axis(heatmap.YAxisConfig().unit(unit))
    return panel.with_target(_queries([(query, "{{le}}")])[0].format(PromQueryFormat.HEATMAP))


def _quantile(quantile: float, histogram: str, selector: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, sum by ({labels}) (rate({histogram}_bucket{{{selector}}}{_RATE})))"


def _rate(series: str, selector: str = "", by: str = "") -> str:
    chosen = f"{series}{{{selector}}}" if selector else series
    return f"sum by ({by}) (rate({chosen}{_RATE}))" if by else f"sum(rate({chosen}{_RATE}))"


def cluster() -> dashboard.Dashboard:
    ttft, gap = "dynamo_frontend_time_to_first_token_seconds", "dynamo_frontend_inter_token_latency_seconds"
    saved = _rate("kvtier_router_prompt_tokens_total", 'source!="computed"')
    return _dashboard(
        "cluster",
        "kvtier: cluster overview",
        "Token sources, gain of the tier, and alerts.",
        {
            "": [
                number("Alerts", "Firing alerts.", "none", 'sum(ALERTS{alertstate="firing"}) or vector(0)', worst=1),
                number(
                    "Processes down", "Scrape targets of Prometheus that do not answer.", "none", "sum(1 - up)", worst=1
                ),
                number("Requests", "Requests finished by frontends.", "reqps", _rate("dynamo_frontend_requests_total")),
                number(
                    "Cache hit rate",
                    "Share of prompt tokens found in HBM, DRAM or the store.",
                    "percentunit",
                    f"{saved} / {_rate('kvtier_router_prompt_tokens_total')}",
                ),
                number(
                    "Store used",
                    "Payload over capacity, all targets.",
                    "percentunit",
                    "sum(kvtier_target_stored_bytes) / sum(kvtier_target_capacity_bytes)",
                ),
                number("Chunks", "In the store; replicas count.", "short", "sum(kvtier_target_chunks)"),
            ],
            "Requests": [
                graph(
                    "Prompt tokens by source",
                    "Predicted source on the chosen worker. Computed: not found in any tier.",
                    "short",
                    (_rate("kvtier_router_prompt_tokens_total", by="source"), "{{source}}"),
                    stacked=True,
                ),
                graph(
                    "Time to first token",
                    "Measured by frontends.",
                    "s",
                    (_quantile(0.5, ttft, "", "model"), "{{model}} median"),
                    (_quantile(0.95, ttft, "", "model"), "{{model}} p95"),
                ),
                graph(
                    "Inter-token latency",
                    "Measured by frontends.",
                    "s",
                    (_quantile(0.5, gap, "", "model"), "{{model}} median"),
                    (_quantile(0.95, gap, "", "model"), "{{model}} p95"),
                ),
                graph(
                    "Requests by status",
                    "Finished requests per second.",
                    "reqps",
                    (_rate("dynamo_frontend_requests_total", by="model, status"), "{{model}} {{status}}"),
                ),
                graph(
                    "Requests in flight",
                    "In all, and those without a first token.",
                    "short",
                    ("sum by (model) (dynamo_frontend_inflight_requests)", "{{model}} in flight"),
                    ("sum by (model) (dynamo_frontend_queued_requests)", "{{model}} queued"),
                ),
                graph(
                    "Store traffic",
                    "Chunks that workers fetched and stored.",
                    "Bps",
                    (_rate("vllm:kvtier_fetched_bytes_total"), "fetched"),
                    (_rate("vllm:kvtier_stored_bytes_total"), "stored"),
                ),
            ],
        },
    )


def router() -> dashboard.Dashboard:
    mine = 'instance=~"$router"'
    whole = f'{mine},role!="prefill"'  # a prompt that a prefill and a decode worker served is counted once
    ratio = "kvtier_router_ttft_actual_to_predicted_ratio"
    return _dashboard(
        "router",
        "kvtier: router scoring",
        "Reasons for routing decisions, and accuracy of the predictions.",
        {
            "Decisions": [
                graph(
                    "Prompts by worker",
                    "Prompts sent to each worker.",
                    "reqps",
                    (_rate("kvtier_router_decisions_total", mine, "worker"), "{{worker}}"),
                    stacked=True,
                ),
                graph(
                    "Blocks by tier",
                    "Predicted tier on the chosen worker. Missing: computed. Handover: from a prefill worker.",
                    "short",
                    (_rate("kvtier_router_chosen_blocks_total", mine, "tier"), "{{tier}}"),
                    stacked=True,
                ),
                graph(
                    "Price of the last prompt",
                    "By worker; the cheapest is chosen.",
                    "s",
                    (f'kvtier_router_candidate_seconds{{{mine},part="price"}}', "{{worker}}"),
                ),
                graph(
                    "Parts of the last price",
                    "Mean over the workers.",
                    "s",
                    (f'avg by (part) (kvtier_router_candidate_seconds{{{mine},part!~"price|ttft"}})', "{{part}}"),
                    stacked=True,
                ),
                graph(
                    "Requests by outcome",
                    "Cancelled: the client disconnected.",
                    "reqps",
                    (_rate("kvtier_router_outcomes_total", whole, "outcome"), "{{outcome}}"),
                ),
                graph(
                    "Degraded decisions and retries",
                    "Degraded: an input was missing. Retries: prompts sent to another worker after a failure.",
                    "reqps",
                    (_rate("kvtier_router_degraded_decisions_total", mine, "missing"), "no {{missing}}"),
                    (f"{_rate('kvtier_router_retries_total', mine)} or vector(0)", "retries"),
                ),
            ],
            "Predictions": [
                graph(
                    "Time to first token, predicted and actual",
                    "From the decision to the first token.",
                    "s",
                    (_quantile(0.5, "kvtier_router_predicted_ttft_seconds", whole), "predicted median"),
                    (_quantile(0.5, "kvtier_router_ttft_seconds", whole), "actual median"),
                    (_quantile(0.95, "kvtier_router_predicted_ttft_seconds", whole), "predicted p95"),
                    (_quantile(0.95, "kvtier_router_ttft_seconds", whole), "actual p95"),
                ),
                graph(
                    "Actual over predicted",
                    "1 is a right prediction. The alert looks at the median of 15 minutes.",
                    "none",
                    *((_quantile(at, ratio, whole), f"{at:.0%}") for at in (0.25, 0.5, 0.75)),
                ),
                heat(
                    "Actual over predicted, all prompts",
                    "Distribution over all prompts.",
                    "none",
                    f"sum by (le) (increase({ratio}_bucket{{{whole}}}{_RATE}))",
                ),
                graph(
                    "Regret",
                    "Actual TTFT minus the lowest TTFT predicted for another worker, at least 0.",
                    "s",
                    (_quantile(0.5, "kvtier_router_regret_seconds", mine), "median"),
                    (_quantile(0.95, "kvtier_router_regret_seconds", mine), "p95"),
                ),
                graph(
                    "Time per output token",
                    "Mean of a finished answer, without its first token.",
                    "s",
                    (_quantile(0.5, "kvtier_router_tpot_seconds", whole), "median"),
                    (_quantile(0.95, "kvtier_router_tpot_seconds", whole), "p95"),
                ),
            ],
            "Mirror and heartbeats": [
                graph(
                    "Time of a decision",
                    "Hash the prompt, ask Dynamo's router, locate chunks in the store, price.",
                    "s",
                    (_quantile(0.5, "kvtier_router_decision_seconds", mine, "stage"), "{{stage}} median"),
                    (_quantile(0.99, "kvtier_router_decision_seconds", mine, "stage"), "{{stage}} p99"),
                ),
                graph(
                    "Chunks mirrored",
                    "By live target.",
                    "short",
                    (f"kvtier_router_mirror_chunks{{{mine}}}", "{{target}}"),
                ),
                graph(
                    "Age of target heartbeats",
                    "Over 10 s the router ignores a target's chunks.",
                    "s",
                    (f"kvtier_router_target_heartbeat_age_seconds{{{mine}}}", "{{target}}"),
                ),
                graph(
                    "Messages rejected",
                    "Announcements and heartbeats that failed validation, and snapshots applied.",
                    "short",
                    (f"{_rate('kvtier_router_rejected_announcements_total', mine)} or vector(0)", "announcements"),
                    (f"{_rate('kvtier_router_rejected_heartbeats_total', mine)} or vector(0)", "heartbeats"),
                    (_rate("kvtier_router_mirror_resyncs_total", mine), "snapshots"),
                ),
            ],
        },
        variable=("router", "kvtier_router_mirror_resyncs_total"),
    )


def store() -> dashboard.Dashboard:
    mine = 'instance=~"$target"'
    operations = "kvtier_target_operations_total"
    return _dashboard(
        "store",
        "kvtier: store targets",
        "Content, latency, eviction and device wear of each target.",
        {
            "Content": [
                graph(
                    "Space used",
                    "Payload over capacity.",
                    "percentunit",
                    (f"kvtier_target_stored_bytes{{{mine}}} / kvtier_target_capacity_bytes{{{mine}}}", "{{instance}}"),
                    most=1,
                ),
                graph("Chunks", "Held.", "short", (f"kvtier_target_chunks{{{mine}}}", "{{instance}}")),
                graph(
                    "Hot cache",
                    "Payload in the hot cache.",
                    "bytes",
                    (f"kvtier_target_hot_bytes{{{mine}}}", "{{instance}}"),
                ),
            ],
            "Traffic": [
                graph(
                    "Gets",
                    "Chunks requested per second, by outcome.",
                    "short",
                    (_rate(operations, f'{mine},operation="get"', "outcome"), "{{outcome}}"),
                ),
                graph(
                    "Puts",
                    "Chunks offered per second, by outcome.",
                    "short",
                    (_rate(operations, f'{mine},operation="put"', "outcome"), "{{outcome}}"),
                ),
                graph(
                    "Payload",
                    "Sent and received.",
                    "Bps",
                    (_rate("kvtier_target_sent_bytes_total", mine, "instance"), "{{instance}} sent"),
                    (_rate("kvtier_target_received_bytes_total", mine, "instance"), "{{instance}} received"),
                ),
                graph(
                    "Time of a get",
                    "From a request's arrival until chunks of it were read.",
                    "s",
                    (_quantile(0.5, "kvtier_target_get_seconds", mine, "medium"), "{{medium}} median"),
                    (_quantile(0.99, "kvtier_target_get_seconds", mine, "medium"), "{{medium}} p99"),
                ),
                graph(
                    "Chunks sent, by medium",
                    "Memory is several times faster than the device.",
                    "short",
                    (_rate("kvtier_target_hot_hits_total", mine), "memory"),
                    (_rate("kvtier_target_device_hits_total", mine), "device"),
                    stacked=True,
                ),
                graph(
                    "Queues",
                    "Payload queued for the device.",
                    "bytes",
                    (f"kvtier_target_read_queue_bytes{{{mine}}}", "{{instance}} to read"),
                    (f"kvtier_target_write_queue_bytes{{{mine}}}", "{{instance}} to write"),
                ),
            ],
            "Eviction and wear": [
                graph(
                    "Evictions",
                    "Chunks evicted, and ghost hits: chunks that were evicted and stored again.",
                    "short",
                    (_rate("kvtier_target_evicted_chunks_total", mine, "instance"), "{{instance}} evicted"),
                    (_rate("kvtier_target_ghost_hits_total", mine, "instance"), "{{instance}} ghost hits"),
                ),
                graph(
                    "Eviction age",
                    "If it is shorter than the reuse interval of your prompts, add capacity.",
                    "s",
                    (f"kvtier_target_eviction_age_seconds{{{mine}}}", "{{instance}}"),
                ),
                graph(
                    "Writes to the device",
                    "Accepted payload, bytes written to the device, and payload that eviction rewrote.",
                    "Bps",
                    (_rate("kvtier_target_accepted_bytes_total", mine), "accepted"),
                    (_rate("kvtier_target_device_written_bytes_total", mine), "written"),
                    (_rate("kvtier_target_rewritten_bytes_total", mine), "kept"),
                ),
                graph(
                    "Write amplification",
                    "Bytes written per accepted byte, over an hour. By design below 1.1.",
                    "none",
                    (f"kvtier:write_amplification:ratio1h{{{mine}}}", "{{instance}}"),
                ),
                graph(
                    "Capacity written a day",
                    "Drive writes per day, at the rate of the last six hours.",
                    "none",
                    (f"kvtier:capacity_writes_per_day:rate6h{{{mine}}}", "{{instance}}"),
                ),
                graph(
                    "Faults",
                    "Corrupt chunks, and failed writes, since the start.",
                    "short",
                    (f"kvtier_target_corrupt_chunks_total{{{mine}}}", "{{instance}} corrupt"),
                    (f"kvtier_target_failed_writes_total{{{mine}}}", "{{instance}} not written"),
                ),
            ],
        },
        variable=("target", "kvtier_target_chunks"),
    )


def workers() -> dashboard.Dashboard:
    mine = 'instance=~"$worker"'
    load, store = "vllm:kv_offload_load", "vllm:kv_offload_store"
    ttft, gap = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
    return _dashboard(
        "workers",
        "kvtier: worker tiers",
        "Hits of each worker in HBM, DRAM and the store, and the cost of loading them.",
        {
            "Engine": [
                graph(
                    "Prompt tokens by source",
                    "Counted by the engine; external: from DRAM or the store.",
                    "short",
                    (_rate("vllm:prompt_tokens_by_source_total", mine, "source"), "{{source}}"),
                    stacked=True,
                ),
                graph(
                    "Requests",
                    "Running, and waiting for a slot.",
                    "short",
                    (f"vllm:num_requests_running{{{mine}}}", "{{instance}} running"),
                    (f"vllm:num_requests_waiting{{{mine}}}", "{{instance}} waiting"),
                ),
                graph(
                    "Memory used",
                    "Used share of the KV cache in HBM, and of the DRAM tier.",
                    "percentunit",
                    (f"vllm:kv_cache_usage_perc{{{mine}}}", "{{instance}} HBM"),
                    (f"vllm:kv_offload_cpu_cache_usage_perc{{{mine}}}", "{{instance}} DRAM"),
                    most=1,
                ),
                graph(
                    "Time to first token",
                    "Measured by the engine.",
                    "s",
                    (_quantile(0.5, ttft, mine, "instance"), "{{instance}} median"),
                    (_quantile(0.95, ttft, mine, "instance"), "{{instance}} p95"),
                ),
                graph(
                    "Inter-token latency",
                    "Measured by the engine.",
                    "s",
                    (_quantile(0.5, gap, mine, "instance"), "{{instance}} median"),
                    (_quantile(0.95, gap, mine, "instance"), "{{instance}} p95"),
                ),
                graph(
                    "Preemptions",
                    "Requests preempted because HBM was full.",
                    "short",
                    (_rate("vllm:num_preemptions_total", mine, "instance"), "{{instance}}"),
                ),
            ],
            "DRAM": [
                graph(
                    "DRAM to HBM",
                    "Bytes per second while copying.",
                    "Bps",
                    (
                        f"{_rate(f'{load}_bytes_total', mine, 'instance')}"
                        f" / {_rate(f'{load}_time_total', mine, 'instance')}",
                        "{{instance}}",
                    ),
                ),
                graph(
                    "HBM to DRAM",
                    "Bytes per second while copying.",
                    "Bps",
                    (
                        f"{_rate(f'{store}_bytes_total', mine, 'instance')}"
                        f" / {_rate(f'{store}_time_total', mine, 'instance')}",
                        "{{instance}}",
                    ),
                ),
                graph(
                    "Copied",
                    "Bytes per second in all.",
                    "Bps",
                    (_rate(f"{load}_bytes_total", mine), "DRAM to HBM"),
                    (_rate(f"{store}_bytes_total", mine), "HBM to DRAM"),
                ),
            ],
            "Store": [
                graph(
                    "Chunks fetched",
                    "By outcome; all but hits are recomputed.",
                    "short",
                    (_rate("vllm:kvtier_fetched_chunks_total", mine, "outcome"), "{{outcome}}"),
                    stacked=True,
                ),
                graph(
                    "Values rejected",
                    "Values with an invalid seal, by reason. If there are any, see the runbook.",
                    "short",
                    (_rate("vllm:kvtier_rejected_values_total", mine, "reason"), "{{reason}}"),
                ),
                graph(
                    "Chunks stored",
                    "By outcome; known: already in the store.",
                    "short",
                    (_rate("vllm:kvtier_stored_chunks_total", mine, "outcome"), "{{outcome}}"),
                    stacked=True,
                ),
                graph(
                    "Store traffic",
                    "Payload.",
                    "Bps",
                    (_rate("vllm:kvtier_fetched_bytes_total", mine, "instance"), "{{instance}} fetched"),
                    (_rate("vllm:kvtier_stored_bytes_total", mine, "instance"), "{{instance}} stored"),
                ),
                graph(
                    "Fetches timed out or abandoned",
                    "Chunks per second: deadline missed, or cancelled because recompute is faster.",
                    "short",
                    (_rate("vllm:kvtier_fetch_timeout_chunks_total", mine, "instance"), "{{instance}} timed out"),
                    (_rate("vllm:kvtier_fetch_abandoned_chunks_total", mine, "instance"), "{{instance}} abandoned"),
                ),
                graph(
                    "False hits",
                    "Share of requested chunks that the target did not have, over 15 minutes.",
                    "percentunit",
                    (f"kvtier:false_hits:ratio15m{{{mine}}}", "{{instance}}"),
                ),
                graph(
                    "Mover restarts",
                    "In all.",
                    "short",
                    (f"vllm:kvtier_mover_restarts_total{{{mine}}}", "{{instance}}"),
                ),
            ],
        },
        variable=("worker", "vllm:kvtier_fetched_bytes_total"),
    )


def _dashboard(
    name: str,
    title: str,
    text: str,
    rows: Mapping[str, Sequence[Panel]],
    variable: tuple[str, str] | None = None,  # one that chooses instances of those with a series
) -> dashboard.Dashboard:
    made = dashboard.Dashboard(title).uid(f"kvtier-{name}").description(text).tags(["kvtier"])
    made = made.refresh("10s").time("now-30m", "now").timezone("browser").editable()
    made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    if variable is not None:
        label, series = variable
        query = dashboard.QueryVariable(label).label(label.capitalize()).datasource(_SOURCE)
        query = query.query(f"label_values({series}, instance)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        query = query.multi(True).include_all(True).current(VariableOption(text="All", value="$__all"))
        made = made.with_variable(query)
    ids = itertools.count(1)
    for row, panels in rows.items():
        if row:
            made = made.with_row(dashboard.Row(row).id(next(ids)))
        for panel in panels:
            made = made.with_panel(panel.id(next(ids)))
    return made


DASHBOARDS = {"cluster": cluster, "router": router, "store": store, "workers": workers}


def as_json(name: str) -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(DASHBOARDS[name]().build()) + "\n"


def main(folder: Path = FOLDER) -> None:
    for name in DASHBOARDS:
        (folder / f"{name}.json").write_text(as_json(name))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
