"""What `octavo-signal` keeps, decides and tells."""

from __future__ import annotations

import pickle
from typing import Any

from cluster.autoscaling import ScalingConfig
from cluster.demand import KEEP_S
from cluster.signal_board import ADOPT_S, ASKED_S, START_SILENCE_S, SignalBoard, StartProgress, TargetChange
from router.signal import ModelOutlook, ModelSignal, RouterReport
from workers.start import FAILED, LOADING, READY, STARTING

SCALING = ScalingConfig(max_replicas=5, upscale_delay_s=0.0).of_replicas(1, 10)
T = 1_000.0


def report(router: str = "a", *, overrides: dict[str, int] | None = None, **fields: Any) -> RouterReport:
    models = {"toy": ModelSignal(**fields)}
    return RouterReport(router_id=router, epoch=1, models=models, overrides=overrides or {})


def ask(board: SignalBoard, now: float, *, current: int = 1, target: int = 1) -> tuple[int, TargetChange | None]:
    return board.desired("toy", SCALING, now, current=current, target=target)


def outlook(board: SignalBoard, now: float) -> ModelOutlook:
    return board.outlook(now).models["toy"]


def progress(stage: str, age_s: float, *, replica: str = "r", detail: str = "") -> StartProgress:
    return StartProgress(model="toy", replica_id=replica, stage=stage, age_s=age_s, pid=7, detail=detail)


def test_a_model_is_known_once_its_policy_asks() -> None:
    board = SignalBoard(T)
    board.report(report(num_queued=100), T)
    assert board.outlook(T).models == {}
    assert ask(board, T, target=2) == (2, None)
    found = outlook(board, T)
    assert (found.target, found.min_replicas, found.max_replicas, found.reason) == (2, 1, 5, "as it was started")
    assert board.outlook(T + ASKED_S + 1).models == {}


def test_a_decision_is_told_to_all() -> None:
    board = SignalBoard(T)
    ask(board, T)
    board.report(report("a", num_queued=30, num_aboard=10), T + 1)
    assert ask(board, T + 1.1) == (
        4,
        TargetChange(
            model="toy", before=1, after=4, reason="40.0 sequences, 10 a replica (10 running, 30 waiting)", demand=40.0
        ),
    )
    assert ask(board, T + 1.2) == (4, None)
    told = board.report(report("b", num_queued=0), T + 1.3)
    assert (told.models["toy"].target, told.models["toy"].decided_at, told.models["toy"].demand) == (4, T + 1.1, 40.0)
    assert [each.router_id for each in told.routers] == ["a", "b"]
    assert pickle.loads(pickle.dumps(told)) == told


def test_reports_grow_old() -> None:
    board = SignalBoard(T)
    ask(board, T)
    board.report(report(num_queued=30), T)
    assert ask(board, T + KEEP_S + 0.1) == (1, None)
    assert board.outlook(T + KEEP_S + 0.1).routers == ()


def test_an_operators_number_holds_until_it_is_taken_back() -> None:
    board = SignalBoard(T)
    ask(board, T)
    board.scale("toy", 7)
    desired, change = ask(board, T + 1)
    assert (desired, change is not None and change.reason) == (7, "7 are asked for")
    found = outlook(board, T + 1)
    assert (found.override, found.min_replicas, found.max_replicas) == (7, 7, 7)
    board.scale("toy", 0)
    assert ask(board, T + 2)[0] == 0
    board.scale("toy", None)
    assert ask(board, T + 3)[0] == 1
    assert outlook(board, T + 3).override is None


def test_a_new_board_hears_of_overrides_from_routers() -> None:
    """The actor has restarted, and its memory is gone."""
    board = SignalBoard(T)
    board.report(report(overrides={"toy": 3}), T + 1)
    assert ask(board, T + 1)[0] == 3
    board.scale("toy", None)
    board.report(report(overrides={"toy": 3}), T + 2)
    assert outlook(board, T + 2).override is None
    late = SignalBoard(T)
    late.report(report(overrides={"toy": 3}), T + ADOPT_S + 1)
    assert ask(late, T + ADOPT_S + 1)[0] == 1


def test_starts_are_followed() -> None:
    board = SignalBoard(T)
    ask(board, T)
    assert (outlook(board, T).start_s, outlook(board, T).ready_in_s) == (None, None)
    board.progress(progress(STARTING, 1.0), T)
    board.progress(progress(LOADING, 2.0), T + 1)
    (start,) = outlook(board, T + 2).starting
    assert (start.replica_id, start.stage, start.since_s, start.pid) == ("r", LOADING, 3.0, 7)
    board.progress(progress(READY, 4.0), T + 3)
    found = outlook(board, T + 3)
    assert (found.starting, found.start_s, found.ready_in_s) == ((), 4.0, None)
    board.progress(progress(STARTING, 1.0, replica="s"), T + 10)
    assert outlook(board, T + 11).ready_in_s == 2.0
    assert outlook(board, T + 20).ready_in_s == 0.0


def test_one_that_is_wanted_is_expected_in_the_time_of_a_start() -> None:
    board = SignalBoard(T)
    board.progress(progress(READY, 4.0), T)
    ask(board, T)
    board.report(report(num_queued=15), T)
    ask(board, T + 1)
    assert outlook(board, T + 2).ready_in_s == 3.0
    ask(board, T + 2, current=2)
    assert outlook(board, T + 2).ready_in_s is None


def test_a_start_that_fails_says_why_until_one_succeeds() -> None:
    board = SignalBoard(T)
    ask(board, T)
    board.progress(progress(STARTING, 1.0), T)
    board.progress(progress(FAILED, 2.0, detail="no memory"), T + 1)
    assert (outlook(board, T + 1).failure, outlook(board, T + 1).starting) == ("no memory", ())
    board.progress(progress(READY, 2.0, replica="s"), T + 2)
    assert outlook(board, T + 2).failure == ""


def test_a_start_that_says_nothing_is_gone() -> None:
    board = SignalBoard(T)
    ask(board, T)
    board.progress(progress(STARTING, 1.0), T)
    ask(board, T + START_SILENCE_S + 1)
    assert outlook(board, T + START_SILENCE_S + 1).starting == ()
