"""Which engine takes which request beside an overflow engine: sticky, by the threshold, and never in the way."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.openai.call import Refusal
from engines.yard.config import ModelConfig, OverflowConfig
from engines.yard.route import Route
from engines.yard.state import Canary, ModelState

CHAT = "/v1/chat/completions"


class Engine:
    """As much of a unit as a route asks for."""

    def __init__(self, name: str, slots: int, route: Route) -> None:
        self.engine, self.slots, self.running, self.up = name, slots, [], True
        self.paths = SimpleNamespace(kind=lambda path: "unlisted" if path == f"/not-{name}" else "generates")
        self._route = route

    @property
    def accepts(self) -> bool:
        return self.up

    @property
    def state(self) -> SimpleNamespace:
        return SimpleNamespace(serves=self.up)

    @property
    def has_room(self) -> bool:
        return self.up and len(self.running) < self.slots

    def take(self, prompt_tokens, *, light=False):
        self.running.append(prompt_tokens)
        return prompt_tokens

    def give_back(self, running) -> None:
        self.running.remove(running)
        self._route.hand_over()


def route_with(waiting: int, *, slots: tuple[int, int] = (1, 2), max_waiting: int = 1000) -> Route:
    model = ModelConfig(
        id="m", incumbent="first", candidate="second", specs={}, overflow=OverflowConfig("second", waiting)
    )
    route = Route(model, ModelState(serving="first"), max_waiting)
    route.units = {name: Engine(name, n, route) for name, n in zip(("first", "second"), slots, strict=True)}
    return route


ARRIVE = st.tuples(st.just("arrive"), st.integers(0, 12))
STEPS = st.lists(
    st.one_of(
        ARRIVE, ARRIVE, ARRIVE, st.tuples(st.sampled_from(["finish first", "finish second", "second"]), st.none())
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, waiting=st.integers(0, 3), slots=st.tuples(st.integers(1, 2), st.integers(1, 3)))
def test_a_conversation_stays_where_it_began_and_only_what_is_too_much_goes_over(steps, waiting, slots) -> None:
    """Against a model of the rule: who has it, else whether more than `waiting` would wait for the first."""

    async def run() -> None:
        route = route_with(waiting, slots=slots)
        first, second = route.units["first"], route.units["second"]
        has: dict[str, str] = {}  # by the model
        queued: dict[str, list] = {"first": [], "second": []}

        def settle() -> None:
            for name in ("first", "second"):
                for place in [place for place in queued[name] if place.turn.done()]:
                    unit, _ = place.turn.result()
                    assert unit.engine == name, "a turn on the engine that has the conversation"
                    assert place is queued[name].pop(0), "in the order of arrival"

        for step, number in steps:
            if step == "arrive":
                name = f"conversation {number}"
                ahead, behind = len(queued["first"]), len(queued["second"])
                waits = 0 if first.has_room else ahead + 1
                if name not in has:
                    has[name] = "second" if second.up and waits > waiting and behind <= ahead else "first"
                elif not second.up:
                    has[name] = "first"
                queued[has[name]].append(route.enter(name, CHAT, 1))
            elif step == "second":  # it dies, or is up again; whoever waits for it goes to the first one, for good
                second.up = not second.up
                second.running.clear()
                has |= {place.conversation: "first" for place in queued["second"]}
                arrival = list(route._waiting)
                queued["first"] = sorted(queued["first"] + queued["second"], key=arrival.index)
                queued["second"] = []
                route.hand_over()
            elif (unit := route.units[step.partition(" ")[2]]).running:
                unit.give_back(unit.running[0])
            settle()
        assert route.overflowed >= Counter(has.values())["second"]
        assert route.waiting == len(queued["first"]) + len(queued["second"])

    asyncio.run(run())


async def test_with_none_allowed_to_wait_the_second_takes_what_the_first_has_no_room_for():
    route = route_with(0)
    assert [route.enter(f"c{n}", CHAT, 1).turn.result()[0].engine for n in range(3)] == ["first", "second", "second"]
    assert route.overflowed == 2


@pytest.mark.parametrize(
    ("conversation", "path", "how"),
    [("", CHAT, {}), ("null", "/v1/embeddings", {}), ("new", "/not-second", {}), ("new", CHAT, {"light": True})],
)
async def test_what_has_no_conversation_or_no_such_path_there_stays_on_the_first(conversation, path, how):
    route = route_with(0)
    route.enter("c", CHAT, 1)
    place = route.enter(conversation, path, 1, **how)
    assert route.unit_for(place).engine == "first"


async def test_while_a_canary_is_judged_and_when_it_is_off_the_second_takes_nothing():
    route = route_with(0)
    for state in (ModelState(serving="first", overflow=False), ModelState(serving="second")):
        route.state = state
        assert route.open_overflow is None
    route.state = ModelState(serving="first", canary=Canary(engine="second", weight=0.01))
    assert (route.overflow.engine, route.open_overflow) == ("second", None)
    route.state = ModelState(serving="first")
    assert route.open_overflow is not None


async def test_requests_that_wait_for_the_second_take_no_place_in_front_of_the_first():
    """Although the second has hung with all its slots taken."""
    route = route_with(0, slots=(1, 1), max_waiting=2)
    for conversation in ("first", "over", "over", "over"):
        route.enter(conversation, CHAT, 1)
    assert route.waiting == 2
    assert not route.enter("first", CHAT, 1).turn.done()
    assert not route.enter("first", CHAT, 1).turn.done()
    with pytest.raises(Refusal, match="2 requests wait"):
        route.enter("first", CHAT, 1)


async def test_the_state_of_an_overflow_that_is_on_is_stored_as_before():
    """An older version reads it."""
    assert "overflow" not in ModelState(serving="a").model_dump()
    assert ModelState.model_validate(ModelState(serving="a", overflow=False).model_dump()).overflow is False
