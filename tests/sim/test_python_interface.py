"""remora.testing.sim: options, counters and errors of the operators' simulator."""

import pytest
import torch

from remora.ops import fused_recurrent_gated_delta_rule

pytestmark = pytest.mark.sim_only


@pytest.fixture
def sim_module():
    from remora.testing import sim

    return sim


def run_operator(tokens=3):
    q, k = torch.ones(1, tokens, 1, 64), torch.ones(1, tokens, 1, 64) / 8
    v, g, beta = torch.ones(1, tokens, 1, 64), torch.zeros(1, tokens, 1), torch.ones(1, tokens, 1)
    return fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta)


def test_options_are_set_in_both_simulators_and_restored(sim_module):
    before = sim_module.ptx.option("seed")
    with sim_module.options(seed=17, async_="late", memcheck=True):
        assert sim_module.ptx.option("seed") == "17"
        assert sim_module._library().remora_sim_option(b"seed") == b"17"
        assert sim_module._library().remora_sim_option(b"async") == b"late"
        assert sim_module._library().remora_sim_option(b"memcheck") == b"1"
    assert sim_module.ptx.option("seed") == before
    assert sim_module._library().remora_sim_option(b"seed") == before.encode()


def test_bad_options_are_refused(sim_module):
    with pytest.raises(ValueError, match="unknown option speed"), sim_module.options(speed=2):
        pass
    with pytest.raises(sim_module.ptx.Error, match="one of early, late"), sim_module.options(async_="never"):
        pass


def test_counters(sim_module):
    with sim_module.options(memory_stats=True):
        sim_module.reset_stats()
        assert sim_module.stats() == {}
        run_operator()
        run_operator()
    counters = sim_module.stats()
    assert counters
    assert all("remora::" in name for name in counters)
    for kernel in counters.values():
        assert kernel["launches"] == 2
        assert kernel["warp_instructions"] == sum(kernel["warp_instructions_by_class"].values())
        assert 0 < kernel["global_load_footprint"] <= 32 * kernel["global_load"]["sectors"]
        assert kernel["shared_load"]["excess_wavefronts"] >= 0


def test_failed_launch_is_an_exception_with_the_message(sim_module):
    limit = "max_warp_instructions exceeded"
    with sim_module.options(max_warp_instructions=1), pytest.raises(RuntimeError, match=limit):
        run_operator()
    assert limit in sim_module.last_error()
    run_operator()
