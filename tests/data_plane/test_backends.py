"""Several models behind one router: each with a queue and replicas of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.backends import Backends
from router.outlook import LastOutlook
from router.signal import ModelOutlook, Outlook
from tests.data_plane.rig import RecordingSink, Replica, assert_answers, cluster, make_request, ready_cluster, until
from workers.errors import OverloadedError, UnavailableError


async def test_a_request_goes_to_the_replicas_of_its_model_under_the_name_that_it_was_asked_by() -> None:
    async with ready_cluster(Replica("r1")) as one, ready_cluster(Replica("r2")) as two:
        backends = Backends()
        backends.add("one", one)
        backends.add("two", two)
        assert {view.replica_id: view.model for view in backends.replicas()} == {"r1": "one", "r2": "two"}
        asked = {model: (make_request([5] * 12, 20, model=model), RecordingSink()) for model in ("one", "two")}
        for request, sink in asked.values():
            backends.submit(request, sink)
        for model, replica in (("one", "r1"), ("two", "r2")):
            request, sink = asked[model]
            assert_answers(await sink.wait(), request)
            assert [decision.replica for decision in sink.decisions] == [replica]


async def test_a_model_without_replicas_fills_its_own_queue_alone() -> None:
    async with cluster(max_queued_requests=2) as none, ready_cluster(Replica("r1")) as some:
        backends = Backends()
        backends.add("none", none)
        backends.add("some", some)
        waiting = [RecordingSink(), RecordingSink()]
        cancels = [backends.submit(make_request([5] * 8, 4, model="none"), sink) for sink in waiting]
        with pytest.raises(OverloadedError):
            backends.submit(make_request([5] * 8, 4, model="none"), RecordingSink())
        assert backends.backlog().num_queued_requests == 2
        assert backends.backlog().max_queued_tokens == none.backlog().max_queued_tokens * 2
        request, sink = make_request([7] * 8, 4, model="some"), RecordingSink()
        backends.submit(request, sink)
        assert_answers(await sink.wait(), request)
        for cancel in cancels:
            cancel()


async def test_a_model_whose_replicas_do_not_start_is_refused_at_once_until_they_do() -> None:
    replica = Replica("r1")
    async with cluster() as dispatcher:
        outlook = LastOutlook()
        dispatcher.look_out(lambda: outlook.model("large"))
        failed = ModelOutlook(
            target=1, min_replicas=1, max_replicas=1, reason="", decided_at=0.0, failure="it does not fit"
        )
        outlook.heard(Outlook({"large": failed}))
        request, sink = make_request([5] * 12, 20, model="large"), RecordingSink()
        with pytest.raises(UnavailableError, match="model large cannot be served: it does not fit") as refused:
            dispatcher.submit(request, sink)
        assert refused.value.reason == "MODEL_FAILED"
        assert refused.value.retry_after_s
        # One of which replicas have started before is waited for: Serve tries again, and they may start then.
        outlook.heard(Outlook({"large": replace(failed, start_s=2.0)}))
        waiting = RecordingSink()
        cancel = dispatcher.submit(request, waiting)
        assert waiting.num_ends == 0
        cancel()
        outlook.heard(Outlook({"large": failed}))
        await replica.start()
        dispatcher.update_replicas([replica.address])
        await until(lambda: [view.state for view in dispatcher.replicas()] == ["ready"])
        dispatcher.submit(request, sink)  # one has started after all, and that is what counts
        assert_answers(await sink.wait(), request)
    await replica.stop()
