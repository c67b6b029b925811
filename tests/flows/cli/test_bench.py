"""`switchyard bench`: a yard of its own before a server of known timing, and nothing left of either."""

import psutil
import pytest
from processes import of_home
from switchyard_command import json_of

from engines.errors import EngineError
from engines.process.serving import free_port
from engines.settings import Endpoint
from tasks.evidence.proxy_cost import TTFT_MS, Taken, Way, compared, measure_proxy_cost


def test_it_measures_both_ways_and_leaves_nothing(switchyard, home, tmp_path):
    before = set(tmp_path.iterdir())
    done = switchyard("bench", "--rounds", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json_of(done)
    assert set(found["streams"]) == {"1", "8"}
    for one in found["streams"].values():
        assert one["direct_ms"] >= TTFT_MS
        assert one["through_ms"] >= TTFT_MS
    for one in (*found["streams"].values(), found["calls"]):
        assert one["added_low_ms"] < one["added_ms"] < one["added_high_ms"]
        assert one["cpu_us"] > 0
    assert (found["rounds"], found["machine"]["cores"]) == (2, psutil.cpu_count())
    assert of_home(home) == []
    assert set(tmp_path.iterdir()) - before <= {home}


def test_one_round_has_no_spread(switchyard):
    done = switchyard("bench", "--rounds", 1)
    assert done.returncode == 2
    assert "--rounds" in done.stderr


def test_what_is_added_is_the_difference_within_a_round():
    """A machine that grows slower from round to round moves both ways, and not what is between."""
    direct = [Taken(50.0 + slower, 0.0, 0.0) for slower in range(5)]
    through = [
        Taken(one.ms + 0.6 + noise, 40.0, 0.0) for one, noise in zip(direct, (0.1, -0.1, 0, 0.1, -0.1), strict=True)
    ]
    found = compared({"direct": direct, "through": through})
    assert found["added_ms"] == pytest.approx(0.6)
    assert found["added_low_ms"] < 0.6 < found["added_high_ms"] < 0.8
    assert found["cpu_us"] == 40.0


def test_a_server_that_is_gone_is_an_error_in_one_line():
    gone = Endpoint(base_url=f"http://127.0.0.1:{free_port()}", model_id="m", engine="m")
    with pytest.raises(EngineError, match=r"a request to http://127\.0\.0\.1:\d+ failed"):
        measure_proxy_cost({"direct": Way(gone, None), "through": Way(gone, None)}, rounds=2)
