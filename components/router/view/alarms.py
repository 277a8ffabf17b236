"""What is wrong, from what the page shows: a pure function of State."""

from components.router.view.state import Alarm, State

# Targets and workers are heard every second.
_SILENT_SECONDS = 5.0
# Fewer prompts say nothing of the predictions.
_PREDICTIONS_MIN = 20
_PREDICTION_FACTOR_MAX = 2.0
# Some chunks are late whenever a device is busy; more than this share costs more than it saves.
_LATE_SHARE_MAX = 0.02


def alarms(state: State) -> list[Alarm]:
    """The worst first."""
    found = [*_bus(state), *_targets(state), *_workers(state), *_prompts(state)]
    return sorted(found, key=lambda alarm: alarm.level != "bad")


def _bus(state: State) -> list[Alarm]:
    if not state.connected:
        text = "NATS is not connected: what targets hold is not known, prompts are computed or found in HBM and DRAM."
        return [Alarm("bus", "bad", f"{text} Look at nats-server.")]
    return []


def _targets(state: State) -> list[Alarm]:
    found = []
    heard = [lane for lane in state.targets if lane.heard_seconds <= _SILENT_SECONDS]
    if not heard:
        text = "No heartbeat from any target: soon nothing is loaded from the store."
        found.append(Alarm("no-target", "warn", f"{text} Are targets up, with the router's --nats and --namespace?"))
    for lane in state.targets:
        if heard and lane not in heard:
            text = f"No heartbeat from target {lane.target} for {lane.heard_seconds:.0f} s:"
            text += " after 10 s no fetch from it is planned."
            found.append(Alarm(f"silent-{lane.target}", "bad", text))
    minutes = state.fault_window_seconds // 60
    for fault, text in (
        ("corrupt_chunks", "corrupt chunks were read and dropped, never served: look at the devices"),
        ("failed_writes", "chunks could not be written: look at the targets' logs"),
    ):
        if count := state.recent_faults.get(fault, 0):
            found.append(Alarm(fault, "bad", f"{count} {text} (last {minutes} min)."))
    return found


def _workers(state: State) -> list[Alarm]:
    if not state.workers:
        return [Alarm("no-worker", "bad", "No worker is live: prompts fail. Look at the workers' logs.")]
    found = []
    roles = {lane.role for lane in state.workers}
    if roles == {"prefill"}:
        found.append(Alarm("no-decode-worker", "bad", "No decode worker is live: prompts fail. Look at their logs."))
    if roles == {"decode"}:
        found.append(Alarm("no-prefill-worker", "warn", "No prefill worker is live: decode workers prefill."))
    silent = [
        lane.worker
        for lane in state.workers
        if lane.role != "decode" and (lane.heard_seconds is None or lane.heard_seconds > _SILENT_SECONDS)
    ]
    if silent and state.connected:
        names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        text = f"Worker {names}: no report of its tier, so nothing is planned for it."
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
        text = f"{late} of {asked} chunks came past their deadline in the last minute: targets or links"
        found.append(Alarm("late", "warn", f"{text} are slower than measured. Look at target queues."))
    if corrupt := fetched.get("corrupt", 0):
        found.append(Alarm("corrupt-fetch", "bad", f"{corrupt} chunks came corrupt in the last minute: recomputed."))
    if unreachable := fetched.get("unreachable", 0):
        text = f"{unreachable} chunks could not be fetched in the last minute: a target does not answer its workers."
        found.append(Alarm("unreachable", "bad", f"{text} Try kvtier store stat on a worker's machine."))
    ratio = state.prediction
    if ratio is not None and ratio.count >= _PREDICTIONS_MIN:
        off = max(ratio.p50, 1 / ratio.p50) if ratio.p50 > 0 else 1.0
        if off > _PREDICTION_FACTOR_MAX:
            way = "slower" if ratio.p50 > 1 else "faster"
            text = f"First tokens come {off:.1f} times {way} than predicted: prices are off."
            found.append(Alarm("prediction", "warn", f"{text} See the speeds of the workers below."))
    return found
