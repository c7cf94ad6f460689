"""When the answers that a student learns from run away, and what is said of it."""

from mlx_distill.generate import Answer
from mlx_distill.length_alarm import RECENT, LengthAlarm

END = 1


def answers(length: int, finished: bool, count: int = RECENT) -> list[Answer]:
    return [Answer([3] * length, finished, END if finished else None)] * count


def test_the_alarm_speaks_once_of_answers_without_an_end() -> None:
    alarm = LengthAlarm(8)
    alarm.add(answers(8, False, RECENT - 1))
    assert alarm.news() is None  # too few to tell
    alarm.add(answers(3, True, 1))
    said = alarm.news()
    assert said is not None and said.startswith("98% of its last 64 own answers do not end within")
    assert "`generate.on_policy.max_tokens` 8" in said
    alarm.add(answers(8, False))
    assert alarm.news() is None


def test_the_alarm_speaks_of_answers_that_double() -> None:
    alarm = LengthAlarm(100)
    alarm.add(answers(10, True))
    alarm.add(answers(20, True))
    assert alarm.news() is None  # twice, not more
    alarm.add(answers(21, True))
    said = alarm.news()
    assert said is not None and "have grown from 10 to 21 tokens" in said
    half = LengthAlarm(100)
    half.add([*answers(10, True, RECENT // 2), *answers(10, False, RECENT // 2)])
    assert half.news() is None
