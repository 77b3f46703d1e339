"""Distillation: where the gradient vanishes, and that its size does not hang on the temperature."""

import pytest
import torch

from fedloom.objectives.distillation import distillation_loss, divergences


def logits(seed, width=6):
    return torch.randn(4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(student, teacher, temperature):
    student = student.clone().requires_grad_()
    distillation_loss(student, teacher, temperature).backward()
    return student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_student_that_says_what_its_teacher_says_learns_nothing(temperature):
    student = logits(0)
    assert distillation_loss(student, student + 3.0, temperature) == pytest.approx(0, abs=1e-5)
    assert gradient(student, student + 3.0, temperature).abs().max() < 1e-6


def test_by_hand_at_temperature_one():
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    by_hand = 0.5 * torch.log(torch.tensor(0.5 / 0.8)) + 0.5 * torch.log(torch.tensor(0.5 / 0.2))
    assert distillation_loss(student, teacher, 1.0) == pytest.approx(float(by_hand), abs=1e-6)


def test_the_square_of_the_temperature_keeps_the_gradients_size():
    """T^2 d KL / d z tends to (z_s - z_t - means) / width as T grows: its norm does not fall with T."""
    student, teacher = logits(1), logits(2)
    sizes = [float(gradient(student, teacher, t).norm()) for t in (8.0, 32.0, 128.0)]
    limit = student - teacher
    limit = (limit - limit.mean(-1, keepdim=True)) / (student.shape[-1] * len(student))
    assert sizes == pytest.approx([float(limit.norm())] * 3, rel=0.15)
    assert sizes[2] == pytest.approx(float(limit.norm()), rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_mean_of_the_positions_divergences(temperature):
    """In whatever vocabulary both have, padded on either side."""
    student, teacher = logits(3), logits(4)
    found = divergences(student, teacher, temperature)
    assert found.shape == (4,)
    assert found.mean() == pytest.approx(distillation_loss(student, teacher, temperature).item())
    alone = distillation_loss(student[2:3], teacher[2:3], temperature)
    assert found[2].item() == pytest.approx(alone.item(), rel=1e-5)
    padded = torch.cat([student, student], 1), torch.cat([teacher, teacher], 1)
    for one, other in ((padded[0], teacher), (student, padded[1])):
        torch.testing.assert_close(divergences(one, other, temperature), found)
