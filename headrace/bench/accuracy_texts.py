"""Texts for `accuracy`: prose, code, and digits with many languages. Recorded figures count positions."""

# ruff: noqa: RUF001
from __future__ import annotations

_PROSE = """\
The mill had stood at the bend of the river for longer than anyone in the village could say. In spring, when \
the snow
went off the hills, the water came down brown and fast, and the miller would walk out along the wall each \
morning to look at
the boards of the gate. He had a habit of laying his hand flat on the wood, as if it could tell him something \
the eye could
not. "It is not the height of the water that matters," he told his daughter once, "but how steadily it \
arrives. A flood is
no use to a wheel. A wheel wants the same amount every minute of the day."

She remembered this years later, when she was an engineer in a city a long way from any river, standing in \
front of a board
of instruments with three people waiting for her opinion. The pumps were running; the pressure rose and fell \
and rose again,
and nobody could say why. Everyone had a theory. One thought the valves were to blame, another the software \
that opened and
closed them, and the third, who had been there longest, believed that the sensors had never been right since \
the day they
were installed. She listened to all of them, and then asked for a pencil and the readings of the last two \
days. By noon she
had drawn a curve with a slow swing in it, one that took about forty minutes to come back to where it began, \
and she knew
what they were looking at. There was nothing wrong with any part. They were all doing exactly what they had \
been told to do,
a little too late."""

_CODE = '''\
"""A bounded queue with blocking put and get."""

from collections import deque
from threading import Condition, Lock
from typing import Generic, Optional, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """First in, first out; `put` waits while the queue is full, `get` while it is empty."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._lock = Lock()
        self._not_empty = Condition(self._lock)
        self._not_full = Condition(self._lock)

    def put(self, item: T, timeout: Optional[float] = None) -> bool:
        with self._not_full:
            if not self._not_full.wait_for(lambda: len(self._items) < self._capacity, timeout):
                return False
            self._items.append(item)
            self._not_empty.notify()
            return True

    def get(self, timeout: Optional[float] = None) -> Optional[T]:
        with self._not_empty:
            if not self._not_empty.wait_for(lambda: len(self._items) > 0, timeout):
                return None
            item = self._items.popleft()
            self._not_full.notify()
            return item

    def __len__(self) -> int:
        with self._lock:
            return len(self._items)


/* The same sum, twice: once forwards, once in blocks. */
static double sum_blocks(const double *values, size_t count) {
    double total = 0.0;
    for (size_t start = 0; start < count; start += 64) {
        size_t end = start + 64 < count ? start + 64 : count;
        double block = 0.0;
        for (size_t i = start; i < end; ++i)
            block += values[i];
        total += block;
    }
    return total;
}
'''

_DIGITS = """\
Invoice 2024-0417, 12 items: 3 x 19.99 = 59.97; 7 x 4.25 = 29.75; 2 x 149.00 = 298.00; subtotal 387.72, tax \
19% 73.67, total 461.39.
Pi is 3.14159265358979, e is 2.71828182845905, and 2^32 is 4294967296. Call +1 555 0100 between 08:30 and \
17:45, UTC+2.
1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181

Der Müller prüft jeden Morgen das Wehr, weil das Wasser im Frühling schnell steigt und die Räder sonst stehen \
bleiben.
Le meunier vérifie la vanne chaque matin : l'eau monte vite au printemps, et la roue s'arrête quand elle \
arrive trop tôt.
El molinero revisa la compuerta cada mañana; en primavera el río crece deprisa y nadie sabe cuándo bajará.
Мельник каждое утро проверяет плотину, потому что весной вода поднимается быстро.
磨坊主人每天早上都检查水闸，因为春天河水涨得很快。
水車小屋の主人は毎朝、水門を確かめる。春は水かさが増すのが早いからだ。
يفحص الطحان البوابة كل صباح لأن الماء يرتفع بسرعة في الربيع.
Ο μυλωνάς ελέγχει το φράγμα κάθε πρωί. 🌊🎡 done!
"""

TEXTS = {"prose": _PROSE, "code": _CODE, "digits and languages": _DIGITS}
