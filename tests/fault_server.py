"""A judge's server that fails as real ones do, by a schedule, and remembers every grade that it
gave whole.
"""

import json
import random
import re
import threading
import time
from collections import defaultdict

from chat_server import Server, raw, status, torn

FAULTS = (
    "429",
    "429 after",
    "500",
    "503",
    "garbage",
    "half",
    "nothing",
    "slow",
    "torn",
    "prose",
    "out of range",
    "two grades",
    "empty",
)
PASSES = FAULTS[:9]  # of the transport; the others are replies in which no grade can be read
# seconds that a slow reply takes, with clients that wait for half of it; rare, for it is waited for
LATE = 2.0


def half():
    def answer(h):
        data = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": '{"grade": 5, "reason": "'}}]}
        ).encode()
        h.reply(200, data[: len(data) // 2], {"Content-Type": "application/json"})

    return answer


def nothing():
    def hang_up(h):
        h.close_connection = True

    return hang_up


def slow(h):
    time.sleep(LATE)
    h.close_connection = True


ACTIONS = {
    "429": status(429, "slow down"),
    "429 after": status(429, "slow down", retry_after="0.02"),
    "500": status(500),
    "503": status(503, "overloaded", **{"retry_after_ms": "10"}),
    "garbage": raw(b"<html>502</html>", "text/html"),
    "half": half(),
    "nothing": nothing(),
    "slow": slow,
    "torn": torn(),
    "prose": {"text": "たいへん良い回答だと思います。"},
    "out of range": {"text": '{"reason": "すばらしい", "grade": 7}'},
    "two grades": {"text": "点数: 2\nいや、点数: 4"},
    "empty": {"text": ""},
}
FORMS = (
    '{{"reason": "理由", "grade": {0}}}',
    '```json\n{{"grade": {0}, "reason": "x"}}\n```',
    "理由は短い。\n点数: {0}",
    '{{"grade": {0}, "reason": "切れ',
)


class FaultServer(Server):
    """`rate` of the requests fail, in a way and an order that the seed decides. `given[answer]` are
    the grades of its replies that can be read, in the order in which they were written.
    """

    def __init__(self, seed, rate=0.3, faults=FAULTS, down_after=None, forms=FORMS, seconds=0.0):
        super().__init__(plan=self.next, seconds=seconds)
        self.rng, self.rate, self.faults, self.forms, self.down_after = (
            random.Random(seed),
            rate,
            faults,
            forms,
            down_after,
        )
        self.given, self.deciding, self.count = defaultdict(list), threading.Lock(), 0

    def next(self, number, prompt):
        with self.deciding:
            self.count += 1
            if self.down_after is not None and self.count > self.down_after:
                return status(503, "down for today")
            if self.rng.random() < self.rate:
                fault = self.rng.choice(self.faults)
                return ACTIONS["torn" if fault == "slow" and self.rng.random() < 0.9 else fault]
            grade = self.rng.randint(1, 5)
            self.given[answer_of(prompt)].append(grade)
            return {"text": self.rng.choice(self.forms).format(grade)}


def answer_of(prompt):
    """What stands between the fences."""
    return re.search(
        r"^<<<回答 (\w+)>>>\n(.*?)\n<<<回答終わり \1>>>", prompt, re.DOTALL | re.MULTILINE
    )[2]
