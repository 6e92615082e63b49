from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.parts.noise import (
    NoiseSchedule,
    Sampler,
    ddim,
    even_times,
    one_step,
    with_guidance,
)

SCHEDULE = NoiseSchedule.linear()


def test_the_linear_schedule_at_the_times_that_matter():
    times = torch.tensor([38, 440, 712])
    kept, sigma = SCHEDULE.abar(times), SCHEDULE.sigma(times)
    expected = torch.tensor([0.981507, 0.137710, 0.005787], dtype=torch.float64)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([0.137264, 2.502326, 13.107282], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-5)
    assert float(SCHEDULE.abar(-1)) == 1.0
    assert len(SCHEDULE) == 1000


def test_the_scaled_linear_schedule_is_that_of_latent_diffusion():
    made = NoiseSchedule.scaled_linear()
    assert float(1 - made.abar(0)) == pytest.approx(0.00085)
    assert float(1 - made.abar(999) / made.abar(998)) == pytest.approx(0.012)


def test_noise_and_clean_are_each_others_inverse():
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).unbind(0)
    times = torch.tensor([0, 38, 440, 712, 999])
    x_t = SCHEDULE.add_noise(x0, noise, times)
    torch.testing.assert_close(SCHEDULE.x0_of(x_t, noise, times), x0)
    torch.testing.assert_close(SCHEDULE.noise_of(x_t, x0, times), noise)


def test_added_noise_at_known_shares():
    made = NoiseSchedule(torch.tensor([1.0, 0.64, 0.0]))
    one = torch.ones(1, 2)
    assert torch.equal(made.add_noise(one, 5 * one, 0), one)
    torch.testing.assert_close(made.add_noise(one, one, 1), 1.4 * one)
    assert torch.equal(made.add_noise(5 * one, one, 2), one)


@pytest.mark.parametrize("time", [-2, 1000])
def test_times_outside_are_refused(time):
    with pytest.raises(ModelError, match="from -1 to 999"):
        SCHEDULE.abar(torch.tensor([5, time]))


@pytest.mark.parametrize("table", [[0.5, 0.9], [1.2, 0.5], [0.5, -0.1], [[0.5]], []])
def test_what_is_no_schedule_is_refused(table):
    with pytest.raises(ModelError):
        NoiseSchedule(torch.tensor(table))


def test_a_perfect_predictor_is_sampled_exactly():
    x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64)

    def perfect(x, times):
        return SCHEDULE.noise_of(x, x0, times)

    start = torch.randn_like(x0)
    trace: list[torch.Tensor] = []
    made = ddim(perfect, start, SCHEDULE, even_times(1000, 7), trace=trace)
    torch.testing.assert_close(made, x0)
    assert len(trace) == 7
    torch.testing.assert_close(Sampler(steps=7)(perfect, start, SCHEDULE), made)


def test_clamped_predictions_stay_within():
    start = torch.randn(2, 1, 4, 4)
    made = ddim(lambda x, t: -x, start, SCHEDULE, [0, 500], clamp=1.0)
    assert float(made.abs().max()) <= 1.0


def test_one_step_has_no_signal_in_its_input():
    noise = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    seen = {}

    def zero(x, times):
        seen["x"], seen["t"] = x, times
        return torch.zeros_like(x)

    made = one_step(zero, noise, SCHEDULE, 440)
    torch.testing.assert_close(seen["x"], SCHEDULE.b(440) * noise)
    assert seen["t"].tolist() == [440] * 4
    torch.testing.assert_close(made, SCHEDULE.sigma(440) * noise)
    gone = one_step(lambda x, t: noise, noise, SCHEDULE, 440)
    assert float(gone.abs().max()) == 0.0
    sampled = Sampler(steps=0, time=440)(zero, noise, SCHEDULE)
    torch.testing.assert_close(sampled, made)


def test_guidance_is_linear_and_absent_at_zero():
    calls = []

    def one(x, t):
        calls.append("one")
        return x

    def none(x, t):
        calls.append("none")
        return 2 * x

    x, t = torch.randn(2, 3), torch.zeros(2)
    assert torch.equal(with_guidance(one, none, 0.0)(x, t), x)
    assert calls == ["one"]
    torch.testing.assert_close(with_guidance(one, none, 2.0)(x, t), 3 * x - 2 * (2 * x))


@pytest.mark.parametrize("count", [0, 11])
def test_a_sampler_of_no_or_too_many_steps_is_refused(count):
    with pytest.raises(ModelError, match="between 1 and 10"):
        even_times(10, count)


def test_negative_steps_are_refused():
    with pytest.raises(ModelError, match=">= 0"):
        Sampler(steps=-1)
