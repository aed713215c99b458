"""Books as simple as can be, to compare real ones with: a list of reservations."""

from __future__ import annotations

from hypothesis import strategies as st

from mope.budgets.books import Hold, Totals

START_S = 1_700_000_000.0
LIMIT, WINDOW_S, HOLD_S = 100, 60.0, 45.0


def hold(name: str, amount: int, client: str = "a", **more: float | str) -> Hold:
    fields = {"refund": 0, "due_s": 10.0, "hold_s": HOLD_S, "limit": LIMIT, "window_s": WINDOW_S, **more}
    return Hold(name, client, amount, **fields)  # type: ignore[arg-type]


NAMES, CLIENTS = "stuvwxyz", "ab"
steps = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from(NAMES), st.integers(0, 130), st.sampled_from(CLIENTS)),
    st.tuples(st.just("settle"), st.sampled_from(NAMES), st.integers(0, 300), st.just("")),
    st.tuples(st.just("pass"), st.just(""), st.integers(0, 90), st.just("")),
)


class Model:
    """The same books as a list of reservations. Nothing is ever forgotten."""

    def __init__(self) -> None:
        self.now = START_S
        self.holds: dict[str, dict[str, object]] = {}
        self.num_full = dict.fromkeys(CLIENTS, 0)

    def expire(self) -> None:
        for one in self.holds.values():
            if one["state"] == "open" and one["expires"] <= self.now:  # type: ignore[operator]
                one["state"] = "expired"

    def sums(self, client: str, window: float) -> tuple[int, int]:
        mine = [one for one in self.holds.values() if (one["client"], one["window"]) == (client, window)]
        used = sum(one["used"] for one in mine if one["state"] == "settled")  # type: ignore[misc]
        return used, sum(one["amount"] for one in mine if one["state"] == "open")  # type: ignore[misc]

    def reserve(self, name: str, amount: int, client: str) -> tuple[str, int, int]:
        self.expire()
        window = self.now // WINDOW_S
        used, held = self.sums(client, window)
        if name in self.holds:
            before = self.holds[name]
            same = (before["client"], before["state"]) == (client, "open")
            return ("known" if same else "used"), used, held
        if used + held + amount > LIMIT:
            self.num_full[client] += 1
            return "full", used, held
        self.holds[name] = {
            "client": client, "window": window, "amount": amount, "expires": self.now + HOLD_S, "state": "open",
            "used": 0,
        }  # fmt: skip
        return "held", used, held + amount

    def settle(self, name: str, used: int) -> tuple[str, int, int]:
        one = self.holds.get(name)
        if one is None:
            return "unknown", 0, used
        state, one["state"] = one["state"], "settled"
        if state == "settled":
            return "already", one["amount"], one["used"]  # type: ignore[return-value]
        one["used"] = used
        return ("late" if state == "expired" else "settled"), one["amount"], used  # type: ignore[return-value]

    def totals(self, client: str) -> Totals:
        self.expire()
        mine = [one for one in self.holds.values() if one["client"] == client]
        by = {state: [one for one in mine if one["state"] == state] for state in ("open", "settled", "expired")}
        amounts = {state: sum(one["amount"] for one in own) for state, own in by.items()}  # type: ignore[misc]
        return Totals(
            sum(amounts.values()), amounts["open"], amounts["settled"], amounts["expired"],
            sum(one["used"] for one in by["settled"]), len(mine), len(by["settled"]), len(by["expired"]),  # type: ignore[misc]
            self.num_full[client],
        )  # fmt: skip
