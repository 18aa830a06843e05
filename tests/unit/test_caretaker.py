"""What has been wrong for long enough is found, and not a moment before."""

from hypothesis import given
from hypothesis import strategies as st

from frontend.caretaker import Overdue

GRACE_S = 10.0


@given(st.lists(st.tuples(st.sets(st.integers(0, 4)), st.floats(0, 4)), max_size=40))
def test_a_finding_is_overdue_after_an_unbroken_grace(looks: list[tuple[set[int], float]]) -> None:
    """Against the plain definition: present in every look since `grace` ago, and then again."""
    overdue = Overdue[int](GRACE_S)
    since: dict[int, float] = {}
    now_s = 0.0
    for found, passed_s in looks:
        now_s += passed_s
        since = {key: since.get(key, now_s) for key in found}
        expected = {key for key, first_s in since.items() if now_s - first_s >= GRACE_S}
        assert set(overdue.found(sorted(found), now_s)) == expected
        since.update(dict.fromkeys(expected, now_s))


def test_forgetting_begins_the_grace_anew() -> None:
    overdue = Overdue[str](GRACE_S)
    assert overdue.found(["a"], 0) == []
    overdue.forget()
    assert overdue.found(["a"], 10) == []
    assert overdue.found(["a"], 20) == ["a"]
