"""What `octavo-signal` knows and decides: reports of routers, starts of replicas, overrides, targets. Pure.

For each model that a policy asks for it keeps a `DemandMeter`, a `ScalerState` and the decision that changed its target
last. `now` is in seconds since 1970, on a clock that never goes back. What is not heard of any more is forgotten:
reports after 2 s, starts that say nothing after 30 s, models for which nobody asks after a minute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cluster.autoscaling import ScalerState, ScalingConfig, desired_replicas
from cluster.demand import KEEP_S, DemandMeter
from router.signal import ModelOutlook, Outlook, RouterReport, StartingReplica
from workers.start import FAILED, READY

ASKED_S: Final = 60.0
ADOPT_S: Final = 5.0
"""For so long after its start a board takes over what routers know of overrides."""
SOON_S: Final = 0.05
START_SILENCE_S: Final = 30.0
"""A replica that starts says so every few seconds; one that does not is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProgress:
    """A replica on its way to being ready. `stage`: see `workers.start`."""

    model: str
    replica_id: str
    stage: str
    age_s: float
    """Since its start began."""
    node_id: str = ""
    pid: int = 0
    detail: str = ""
    """Why it has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetChange:
    """A decision that changed the number of replicas of a model."""

    model: str
    before: int
    after: int
    reason: str
    demand: float


@dataclass(slots=True)
class _Start:
    progress: StartProgress
    began_at: float
    heard_at: float


@dataclass(slots=True)
class _Model:
    """One model, by what its policy says of it."""

    config: ScalingConfig
    state: ScalerState
    asked_at: float
    decided_at: float
    reason: str = "as it was started"
    demand: float = 0.0
    current: int = 0
    meter: DemandMeter = field(default_factory=DemandMeter)


class SignalBoard:
    def __init__(self, now: float) -> None:
        self._made_at = now
        self._models: dict[str, _Model] = {}
        self._reports: dict[str, tuple[float, RouterReport]] = {}
        """When each router's last report came."""
        self._overrides: dict[str, int | None] = {}
        """By model; None: an operator has taken one back."""
        self._starts: dict[str, _Start] = {}
        self._start_s: dict[str, float] = {}
        """How long the last replica of a model took to start."""
        self._failures: dict[str, str] = {}

    def report(self, report: RouterReport, now: float) -> Outlook:
        """Take in what a router says; return what it should know."""
        self._reports[report.router_id] = (now, report)
        for name, signal in report.models.items():
            if name in self._models:
                self._models[name].meter.add(report.router_id, report.epoch, signal, now)
        if now - self._made_at <= ADOPT_S:
            for name, num_replicas in report.overrides.items():
                self._overrides.setdefault(name, num_replicas)
        return self.outlook(now)

    def desired(
        self, name: str, config: ScalingConfig, now: float, *, current: int, target: int
    ) -> tuple[int, TargetChange | None]:
        """Return how many replicas of a model there shall be, and whether that is new. Its policy has `current` of them
        and has been told `target`; `config` is of `ScalingConfig.of_replicas`."""
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model(config, ScalerState(target=target), now, now)
        model.config, model.asked_at, model.current = config, now, current
        demand = model.meter.measure(now, self._start_s.get(name), is_starting=current < model.state.target)
        decision = desired_replicas(demand, self._config(name, config), model.state, now)
        before, model.state = model.state.target, decision.state
        if demand is not None:
            model.demand = demand.sequences
        if decision.target == before:
            return before, None
        model.reason, model.decided_at = decision.reason, now
        change = TargetChange(
            model=name, before=before, after=decision.target, reason=decision.reason, demand=model.demand
        )
        return decision.target, change

    def look_again_s(self, name: str) -> float:
        """Return in what time `desired` may say something else without a report: soon, if a delay is running."""
        model = self._models.get(name)
        return SOON_S if model is not None and model.state.above_since is not None else ASKED_S

    def scale(self, model: str, num_replicas: int | None) -> None:
        """Have so many replicas of `model`, whatever its load and its bounds; None: by its load again."""
        self._overrides[model] = num_replicas

    def progress(self, progress: StartProgress, now: float) -> None:
        """Take in how far a replica has got."""
        began_at = now - progress.age_s
        if progress.stage == READY:
            self._starts.pop(progress.replica_id, None)
            self._start_s[progress.model] = progress.age_s
            self._failures.pop(progress.model, None)
        elif progress.stage == FAILED:
            self._starts.pop(progress.replica_id, None)
            self._failures[progress.model] = progress.detail
        else:
            start = self._starts.setdefault(progress.replica_id, _Start(progress, began_at, now))
            start.progress, start.heard_at = progress, now

    def outlook(self, now: float) -> Outlook:
        self._forget(now)
        return Outlook(
            models={name: self._model_outlook(name, model, now) for name, model in self._models.items()},
            routers=tuple(report for _, report in self._reports.values()),
        )

    def _model_outlook(self, name: str, model: _Model, now: float) -> ModelOutlook:
        config = self._config(name, model.config)
        starts = [start for start in self._starts.values() if start.progress.model == name]
        start_s = self._start_s.get(name)
        ready_in_s = None
        if start_s is not None and starts:
            ready_in_s = max(min(start.began_at for start in starts) + start_s - now, 0.0)
        elif start_s is not None and model.state.target > model.current:
            ready_in_s = max(model.decided_at + start_s - now, 0.0)
        minimum = config.minimum(now)
        return ModelOutlook(
            target=model.state.target,
            min_replicas=minimum,
            max_replicas=max(config.max_replicas, minimum),
            reason=model.reason,
            decided_at=model.decided_at,
            override=self._overrides.get(name),
            demand=model.demand,
            start_s=start_s,
            ready_in_s=ready_in_s,
            starting=tuple(_starting(start, now) for start in starts),
            failure=self._failures.get(name, ""),
        )

    def _config(self, name: str, config: ScalingConfig) -> ScalingConfig:
        override = self._overrides.get(name)
        return config if override is None else config.fixed(override)

    def _forget(self, now: float) -> None:
        self._reports = {name: heard for name, heard in self._reports.items() if now - heard[0] <= KEEP_S}
        self._starts = {name: start for name, start in self._starts.items() if now - start.heard_at <= START_SILENCE_S}
        self._models = {name: model for name, model in self._models.items() if now - model.asked_at <= ASKED_S}


def _starting(start: _Start, now: float) -> StartingReplica:
    progress = start.progress
    return StartingReplica(
        replica_id=progress.replica_id,
        stage=progress.stage,
        since_s=now - start.began_at,
        node_id=progress.node_id,
        pid=progress.pid,
    )
