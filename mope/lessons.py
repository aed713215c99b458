"""Which observations may teach: a bound on how far one client moves the predictions of all other clients.

All clients of a target LLM share its corrections. So no client may have more than its share of the newest lessons, and
lengths far above the prediction count in full only if other clients have such lengths, too. These decisions depend on
the order of observations. What is kept of the learned observations does not, see `mope.time_periods`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import Enum

from mope.time_periods import Target

NEWEST = 400  # lessons of a target that shares are counted over: as many as its correction rests on
MAX_AGE_S = 86_400.0  # older lessons do not count: clients that are gone hold up the others for a day at most
SHARE = 0.1  # of the newest lessons that one client may have; with fewer than ten clients, an equal share
SLACK = 5  # lessons above the share: without them, clients that send alike would wait for each other
FREE = 25  # lessons of a day that each client may teach: where few others send, they are enough for a correction
TIMES_AS_MANY = 2.0  # long lengths of a client that count in full, compared with those of other clients
PRIOR = 5.0  # lessons without a long length that are added to those of other clients
MAX_TARGETS = 1024  # targets whose lessons are counted; the one taught least recently is forgotten


class Verdict(Enum):
    """What becomes of an observation."""

    LEARN = "learn"
    CLIP = "clip"  # learn, with a shorter length
    REFUSE = "refuse"


class _Newest:
    """The newest lessons of one target: of each client, how many there are and how many of them are long."""

    __slots__ = ("held", "lessons", "num_long")

    def __init__(self) -> None:
        self.lessons: deque[tuple[float, int, bool]] = deque()
        self.held: dict[int, list[int]] = {}
        self.num_long = 0

    def forget(self, before_s: float) -> None:
        lessons = self.lessons
        while lessons and (len(lessons) > NEWEST or lessons[0][0] < before_s):
            _, client, is_long = lessons.popleft()
            own = self.held[client]
            own[0] -= 1
            own[1] -= is_long
            self.num_long -= is_long
            if not own[0]:
                del self.held[client]

    def add(self, time_s: float, client: int, is_long: bool) -> None:
        self.lessons.append((time_s, client, is_long))
        own = self.held.setdefault(client, [0, 0])
        own[0] += 1
        own[1] += is_long
        self.num_long += is_long

    def judge(self, client: int, is_long: bool) -> Verdict:
        num_lessons = len(self.lessons)
        own, own_long = self.held.get(client, (0, 0))
        num_clients = len(self.held) + (own == 0)
        if own >= max(FREE, SLACK + max(SHARE, 1.0 / num_clients) * num_lessons):
            return Verdict.REFUSE
        others, others_long = num_lessons - own, self.num_long - own_long
        if is_long and others:
            usual = (own + 1.0) * (others_long + 1.0) / (others + PRIOR)  # what the lessons of other clients suggest
            if own_long + 1.0 > max(TIMES_AS_MANY * usual, SHARE * others_long):
                return Verdict.CLIP
        return Verdict.LEARN


class Lessons:
    """The newest lessons of each target by client. A microsecond for each observation. Not safe for many threads.

    Holds hashes of clients' names, in memory only. A client that is alone with a target teaches it without a bound.
    """

    def __init__(self) -> None:
        self._targets: OrderedDict[Target, _Newest] = OrderedDict()

    def admit(self, target: Target, client: str, time_s: float, *, is_long: bool) -> Verdict:
        """Decides on an observation; counts it as a lesson unless it is refused.

        Args:
            target: who answered.
            client: name of the client.
            time_s: when, in seconds since 1970.
            is_long: whether the response is far longer than predicted.
        """
        newest = self._targets.get(target)
        if newest is None:
            newest = self._targets[target] = _Newest()
            if len(self._targets) > MAX_TARGETS:
                self._targets.popitem(last=False)
        else:
            self._targets.move_to_end(target)
            newest.forget(time_s - MAX_AGE_S)
        who = hash(client)
        verdict = newest.judge(who, is_long)
        if verdict is not Verdict.REFUSE:
            newest.add(time_s, who, is_long)
        return verdict
