"""The tolerance rule rejects what is wrong and accepts what rounding does."""

import math

import pytest
import torch

from remora.testing.numeric import RELATIVE_RMS, assert_accurate, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(dtype, seed=0):
    """An oracle, a yardstick and a result, the last two rounded once."""
    oracle = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return oracle, oracle.to(dtype), oracle.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_accepts_rounding(dtype, gradient):
    oracle, yardstick, actual = sample(dtype)
    assert assert_accurate(actual, oracle, yardstick, "x", dtype=dtype, gradient=gradient).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_one_wrong_element(dtype):
    oracle, yardstick, actual = sample(dtype)
    actual[3, 5] += 20 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-5
    result = compare(actual, oracle, yardstick, dtype=dtype)
    assert result.relative_rms <= RELATIVE_RMS[dtype]
    with pytest.raises(AssertionError, match=r"grad \[64, 48\]: largest error .* exceeds"):
        assert_accurate(actual, oracle, yardstick, "grad", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_noise_below_the_largest_error(dtype):
    """A poor yardstick does not excuse a poor result."""
    oracle, yardstick, actual = sample(dtype)
    yardstick[0, 0] += 1
    noise = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = (oracle + 2 * RELATIVE_RMS[dtype] * noise).to(dtype)
    result = compare(actual, oracle, yardstick, dtype=dtype)
    assert len(result.failures) == 1
    assert "relative RMS" in result.failures[0]


def test_rejects_by_a_tighter_bound():
    oracle, yardstick, actual = sample(torch.bfloat16)
    yardstick[0, 0] += 1
    actual = (oracle * 1.0045).to(torch.bfloat16)
    assert compare(actual, oracle, yardstick, dtype=torch.bfloat16).ok
    assert not compare(actual, oracle, yardstick, dtype=torch.bfloat16, relative_rms=0.004).ok


def test_rejects_a_gradient_of_wrong_direction():
    oracle, yardstick, _ = sample(torch.bfloat16)
    noise = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for actual in (-oracle, torch.zeros_like(oracle), oracle + 6e-3 * noise):
        result = compare(actual, oracle, yardstick, dtype=torch.bfloat16, gradient=True)
        assert any("cosine" in failure for failure in result.failures)
    result = compare(oracle + 2e-3 * noise, oracle, oracle + 2e-3 * noise, dtype=torch.bfloat16, gradient=True)
    assert result.ok
    assert 1e-6 < result.cosine_gap < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rejects_an_anomaly_the_oracle_lacks(dtype, bad):
    oracle, yardstick, actual = sample(dtype)
    actual[1, 2] = bad
    with pytest.raises(AssertionError, match=r"first at \[1, 2\]"):
        assert_accurate(actual, oracle, yardstick, "x", dtype=dtype)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_anomalies_must_be_those_of_the_oracle(bad):
    oracle, yardstick, actual = sample(torch.float32)
    oracle[1, 2] = bad
    assert not compare(actual, oracle, yardstick, dtype=torch.float32).ok
    actual[1, 2] = bad
    assert compare(actual, oracle, yardstick, dtype=torch.float32).ok
    actual[1, 3] = bad
    assert not compare(actual, oracle, yardstick, dtype=torch.float32).ok


def test_an_anomalous_yardstick_excuses_nothing():
    oracle, yardstick, actual = sample(torch.bfloat16)
    yardstick[0, 0] = math.inf
    actual[5, 5] += 1
    assert not compare(actual, oracle, yardstick, dtype=torch.bfloat16).ok


def test_overflow_of_the_output_is_infinity():
    oracle, yardstick, actual = sample(torch.float16)
    oracle[0, 0] = 1e6
    actual[0, 0] = yardstick[0, 0] = math.inf
    assert compare(actual, oracle, yardstick, dtype=torch.float16).ok


def test_zero_must_be_zero():
    oracle = torch.zeros(8, dtype=torch.float64)
    assert compare(oracle.float(), oracle, oracle.float(), dtype=torch.float32, gradient=True).ok
    assert not compare(oracle.float() + 1e-20, oracle, oracle.float(), dtype=torch.float32).ok


def test_tiny_values_are_compared_relatively():
    oracle, _, _ = sample(torch.float32)
    oracle = oracle * 1e-25
    actual = oracle.float()
    assert compare(actual, oracle, actual, dtype=torch.float32, gradient=True).ok
    assert not compare(actual * 1.001, oracle, actual, dtype=torch.float32, gradient=True).ok


def test_empty_tensors_agree():
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert compare(empty.float(), empty, empty.float(), dtype=torch.float32, gradient=True).ok


def test_double_needs_no_yardstick_but_others_do():
    oracle, _, _ = sample(torch.float64)
    assert compare(oracle + 1e-14, oracle, None, dtype=torch.float64, gradient=True).ok
    assert not compare(oracle + 1e-8, oracle, None, dtype=torch.float64).ok
    with pytest.raises(TypeError, match="yardstick must be given"):
        compare(oracle.float(), oracle, None, dtype=torch.float32)


def test_misuse_is_an_error():
    oracle, yardstick, actual = sample(torch.float32)
    with pytest.raises(TypeError, match="oracle must be float64"):
        compare(actual, oracle.float(), yardstick, dtype=torch.float32)
    with pytest.raises(AssertionError, match="actual has shape"):
        compare(actual[:5], oracle, yardstick, dtype=torch.float32)
