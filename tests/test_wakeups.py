"""The listener's bookkeeping, without a listener: what is dirty, what is in memory, what a hint is worth."""

from __future__ import annotations

from datetime import UTC, datetime

from pgchan import sql
from pgchan.wakeups import BUFFER_MESSAGES_MAX, CHANGED, CHANGES_MAX, MOVED_FEW, Followed, Hub, Watch

AT = datetime(2026, 1, 1, tzinfo=UTC)
TOLD: list[Followed] = []


def hub_with(name: str = "a", id: int = 17, head: int = 0) -> tuple[Hub, Followed]:
    hub = Hub(TOLD.append)
    followed, fresh = hub.follow(name)
    assert fresh
    hub.looked_up([(name, id, head, AT if head else None, False, "application/json")], fresh=True)
    return hub, followed


def row(id: int, head: int, position: int | None, closed: bool = False) -> tuple[object, ...]:
    return (id, head, closed, position, AT, 0, None, None, None, None, b"1")


def test_a_hint_makes_a_followed_channel_dirty_and_no_other() -> None:
    hub, _ = hub_with()
    assert not hub.heard("pgchan_2", "18:5")
    assert hub.heard("pgchan_1", "17:5,18:1")
    assert hub.next_read() == (sql.READ_ONE, (17, 0, MOVED_FEW))
    assert hub.next_read() is None


def test_a_hint_for_a_head_that_is_known_does_nothing_and_one_for_a_change_does() -> None:
    hub, _ = hub_with(head=5)
    assert not hub.heard("pgchan_1", "17:5")
    assert hub.heard("pgchan_1", f"17:{CHANGED}")


def test_what_is_no_hint_of_ours_is_passed_over() -> None:
    hub, _ = hub_with()
    for payload in ("", "x", "17", "17:", ":5", "17:x", "17:5:5", "99999999999999999999:1"):
        assert not hub.heard("pgchan_1", payload)


def test_readers_are_served_from_memory_as_far_as_it_reaches() -> None:
    hub, followed = hub_with()
    hub.heard("pgchan_1", "17:3")
    hub.next_read()
    hub.read([row(17, 3, n) for n in (1, 2, 3)])
    assert [message.position for message in followed.recent(1, None) or []] == [2, 3]
    assert followed.recent(3, None) == []
    assert followed.recent(4, None) is None


def test_memory_is_bounded_and_what_fell_out_is_read_from_the_table() -> None:
    hub, followed = hub_with()
    for first in range(1, 2 * BUFFER_MESSAGES_MAX, 100):
        hub.heard("pgchan_1", f"17:{first + 99}")
        hub.next_read()
        hub.read([row(17, first + 99, n) for n in range(first, first + 100)])
    assert len(followed.buffer) == BUFFER_MESSAGES_MAX
    assert followed.recent(0, None) is None
    assert followed.recent(followed.base, None) is not None


def test_more_than_a_few_messages_are_read_with_all_bounds() -> None:
    hub, _ = hub_with()
    hub.heard("pgchan_1", "17:100")
    many = hub.next_read()
    hub.heard("pgchan_1", "17:2")
    few = hub.next_read()
    hub.read([row(17, 100, n) for n in range(1, MOVED_FEW + 1)])  # more than was announced
    again = hub.next_read()
    assert many and few and again
    assert [many[0], few[0], again[0]] == [sql.READ_MOVED, sql.READ_MOVED, sql.READ_MOVED]


def test_a_channel_that_is_gone_is_waited_for_again() -> None:
    hub, followed = hub_with(head=5)
    hub.heard("pgchan_1", f"17:{CHANGED}")
    hub.next_read()
    hub.read([])
    assert followed.id is None
    assert hub.unknown_names() == ["a"]


def test_a_hint_that_comes_while_a_new_follower_is_looked_up_is_not_lost() -> None:
    hub = Hub(TOLD.append)
    hub.follow("a")
    hub.heard("pgchan_1", f"17:{CHANGED}")  # it closed after the look-up had read its row
    assert hub.looked_up([("a", 17, 5, AT, False, "application/json")], fresh=True)
    assert hub.next_read() is not None


def test_after_a_reconnect_everything_is_read_and_everybody_told() -> None:
    hub, _ = hub_with(head=5)
    told: list[int] = []
    hub.watch(Watch(18, 0, lambda: told.append(18)))
    hub.on_queue(1, lambda: told.append(1))
    hub.everything_moved()
    assert told == [18, 1]
    assert hub.next_read() is not None


def test_who_looked_before_a_channel_changed_is_told_that_he_missed_it() -> None:
    hub = Hub(TOLD.append)
    hub.heard("pgchan_1", f"17:{CHANGED}")
    mark = hub.mark
    assert not hub.has_changed(17, mark)
    hub.heard("pgchan_1", "17:9")  # messages are no change
    assert not hub.has_changed(17, mark)
    hub.heard("pgchan_1", f"33:{CHANGED}")
    assert hub.has_changed(33, mark) and not hub.has_changed(17, mark)
    hub.everything_moved()  # what was announced while the connection was lost was missed
    assert hub.has_changed(17, mark) and not hub.has_changed(17, hub.mark)


def test_what_is_remembered_of_changes_is_bounded_and_what_is_forgotten_counts_as_changed() -> None:
    hub = Hub(TOLD.append)
    mark = hub.mark
    hub.heard("pgchan_1", f"17:{CHANGED}")
    later = hub.mark
    for id in range(100, 100 + CHANGES_MAX):
        hub.heard("pgchan_2", f"{id}:{CHANGED}")
    assert hub.has_changed(17, mark) and hub.has_changed(99, mark)
    assert not hub.has_changed(17, later) and hub.has_changed(100, later)


def test_an_old_answer_is_not_taken_for_what_a_new_follower_stands_on() -> None:
    """It was asked for those who have left. What came since lies behind it: readers would hear of an early end."""
    hub, followed = hub_with(head=5)
    hub.heard("pgchan_1", f"17:{CHANGED}")
    assert hub.next_read() is not None
    hub.unfollow(followed)
    followed, _ = hub.follow("a")
    hub.looked_up([("a", 17, 7, AT, True, "application/json")], fresh=True)
    hub.read([row(17, 5, 5, closed=True)])
    assert (followed.head, followed.base) == (7, 7)


def test_the_last_follower_takes_the_buffer_along() -> None:
    hub, followed = hub_with()
    hub.follow("a")
    hub.unfollow(followed)
    assert hub.swept_ids() == [17]
    hub.unfollow(followed)
    assert hub.swept_ids() == []
