from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.removable_heap import SLACK, RemovableHeap


def test_first_passes_over_what_was_removed() -> None:
    heap = RemovableHeap()
    for key, order in ((1, 3.0), (2, 1.0), (3, 2.0)):
        heap.push(key, order)
    heap.discard(2)
    heap.discard(2)
    assert heap.first() == (2.0, 3)
    assert 2 not in heap
    assert len(heap) == 2


def test_a_key_may_come_back_with_another_order() -> None:
    heap = RemovableHeap()
    heap.push(1, 1.0)
    heap.discard(1)
    heap.push(1, 9.0)
    heap.push(2, 5.0)
    assert heap.first() == (5.0, 2)


def test_cancelled_keys_do_not_pile_up() -> None:
    """10,000 requests with a far deadline, all cancelled: memory follows the live ones."""
    heap = RemovableHeap()
    for key in range(10_000):
        heap.push(key, 600.0 + key)
        heap.discard(key)
        assert len(heap._entries) <= SLACK + 1
    assert heap.first() is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(0, 3)), max_size=200))
def test_it_is_a_dictionary_with_a_minimum(operations: list[tuple[bool, int, int]]) -> None:
    heap, model = RemovableHeap(), dict[int, int]()
    for is_push, key, order in operations:
        if is_push and key not in model:
            heap.push(key, order)
            model[key] = order
        elif not is_push:
            heap.discard(key)
            model.pop(key, None)
        heap.check_integrity()
        assert len(heap) == len(model)
        least = min(((order, key) for key, order in model.items()), default=None)
        assert heap.first() == least
