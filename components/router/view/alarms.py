"""Alarms on the router's page: a pure function of State."""

from components.router.view.state import Alarm, State

# Targets and workers report every second.
_SILENT_SECONDS = 5.0
# With fewer prompts, the predictions are not judged.
_PREDICTIONS_MIN = 20
_PREDICTION_FACTOR_MAX = 2.0
# Some chunks are late whenever a device is busy. Above this share, loading costs more than it saves.
_LATE_SHARE_MAX = 0.02


def alarms(state: State) -> list[Alarm]:
    """The worst first."""
    found = [*_bus(state), *_targets(state), *_workers(state), *_prompts(state)]
    return sorted(found, key=lambda alarm: alarm.level != "bad")


def _bus(state: State) -> list[Alarm]:
    if not state.connected:
        text = "NATS is not connected: the router does not use the store; prompts are cached in HBM and DRAM only."
        return [Alarm("bus", "bad", f"{text} Check nats-server.")]
    return []


def _targets(state: State) -> list[Alarm]:
    found = []
    heard = [lane for lane in state.targets if lane.heard_seconds <= _SILENT_SECONDS]
    if not heard:
        text = "No heartbeat from any target: after 10 s the router plans no fetches."
        found.append(Alarm("no-target", "warn", f"{text} Do targets run with the router's --nats and --namespace?"))
    for lane in state.targets:
        if heard and lane not in heard:
            text = f"No heartbeat from target {lane.target} for {lane.heard_seconds:.0f} s:"
            text += " after 10 s the router plans no fetches from it."
            found.append(Alarm(f"silent-{lane.target}", "bad", text))
    minutes = state.fault_window_seconds // 60
    for fault, text in (
        ("corrupt_chunks", "corrupt chunks were read and dropped, never served: check the devices"),
        ("failed_writes", "chunks could not be written: see the targets' logs"),
    ):
        if count := state.recent_faults.get(fault, 0):
            found.append(Alarm(fault, "bad", f"{count} {text} (last {minutes} min)."))
    return found


def _workers(state: State) -> list[Alarm]:
    if not state.workers:
        return [Alarm("no-worker", "bad", "No worker is live: prompts fail. See the workers' logs.")]
    found = []
    roles = {lane.role for lane in state.workers}
    if roles == {"prefill"}:
        found.append(Alarm("no-decode-worker", "bad", "No decode worker is live: prompts fail. See their logs."))
    if roles == {"decode"}:
        found.append(Alarm("no-prefill-worker", "warn", "No prefill worker is live: decode workers prefill."))
    silent = [
        lane.worker
        for lane in state.workers
        if lane.role != "decode" and (lane.heard_seconds is None or lane.heard_seconds > _SILENT_SECONDS)
    ]
    if silent and state.connected:
        names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        text = f"Worker {names}: no report of its tier, so it gets no fetch plans."
        found.append(Alarm("no-report", "warn", text))
    return found


def _prompts(state: State) -> list[Alarm]:
    found = []
    failed = state.recent_outcomes.get("failed", 0)
    if failed:
        found.append(Alarm("failed", "bad", f"{failed} prompts failed on their worker in the last minute."))
    fetched = state.fetched_chunks
    asked, late = sum(fetched.values()), fetched.get("late", 0)
    if late > _LATE_SHARE_MAX * asked:
        text = f"{late} of {asked} chunks missed their deadline in the last minute: targets or links"
        found.append(Alarm("late", "warn", f"{text} are slower than measured. Check the targets' queues."))
    if corrupt := fetched.get("corrupt", 0):
        text = f"{corrupt} chunks arrived corrupt in the last minute and were recomputed."
        found.append(Alarm("corrupt-fetch", "bad", text))
    if unreachable := fetched.get("unreachable", 0):
        text = f"{unreachable} chunks could not be fetched in the last minute: a target does not answer workers."
        found.append(Alarm("unreachable", "bad", f"{text} Try kvtier store stat on a worker's machine."))
    ratio = state.prediction
    if ratio is not None and ratio.count >= _PREDICTIONS_MIN:
        off = max(ratio.p50, 1 / ratio.p50) if ratio.p50 > 0 else 1.0
        if off > _PREDICTION_FACTOR_MAX:
            way = "slower" if ratio.p50 > 1 else "faster"
            text = f"First tokens arrive {off:.1f} times {way} than predicted: prices are wrong."
            found.append(Alarm("prediction", "warn", f"{text} Compare the workers' speeds below."))
    return found
