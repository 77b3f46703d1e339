"""Our objectives against TRL's, on the same tensors: loss, gradients and rewards to 1e-6."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import nanstd

from fedloom.objectives.apo import apo_down_loss, apo_zero_loss
from fedloom.objectives.cpo import cpo_loss
from fedloom.objectives.dpo import dpo_loss
from fedloom.objectives.grpo import averaged, divergence, group_advantages, token_losses
from fedloom.objectives.ipo import ipo_loss
from fedloom.objectives.kto import kl_estimate, kto_loss
from fedloom.objectives.orpo import orpo_loss
from fedloom.objectives.reward_model import reward_model_loss
from fedloom.objectives.robust_dpo import robust_dpo_loss
from fedloom.objectives.rpo import chosen_cross_entropy
from fedloom.objectives.simpo import simpo_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says at each import that these may change
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


class Accelerator:
    """What the trainers ask of accelerate, on one process."""

    device = torch.device("cpu")

    def gather(self, tensor):
        return tensor

    def gather_for_metrics(self, tensor):
        return tensor

    def unwrap_model(self, model):
        return model


class Metrics(dict):
    def __missing__(self, key):
        self[key] = {} if key in ("train", "eval") else []
        if key in ("train", "eval"):
            self[key] = Metrics()
        return self[key]


def outputs(logps):
    """A model's output whose only completion token has the given log-prob."""
    columns = logps[:, None]
    zeros = torch.zeros_like(columns)
    return SimpleNamespace(
        log_probs=columns, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def trl_inputs(rows):
    return {
        "input_ids": torch.ones(rows, 2, dtype=torch.long),
        "attention_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * rows),
    }


def trainer(**settings):
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        _metrics=Metrics(),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(beta, smoothing):
    torch.manual_seed(1)
    policy = (-30 * torch.rand(12)).requires_grad_()
    reference = -30 * torch.rand(12)
    self = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=smoothing,
        loss_types=["robust"] if smoothing else ["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )
    inputs = trl_inputs(12)
    inputs |= {"ref_chosen_logps": reference[:6], "ref_rejected_logps": reference[6:]}
    expected = DPOTrainer._compute_loss(self, lambda **_: outputs(policy), inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, policy, retain_graph=True)

    loss, metrics = dpo_loss(
        policy[:6], policy[6:], reference[:6], reference[6:], beta=beta, label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(loss, policy)
    if smoothing:
        # TRL's "robust" is (1-e) l(+) - e l(-), over 1 - 2e; conservative DPO is (1-e) l(+) + e l(-).
        # Both are linear in l(+) and l(-), so ours follows from TRL's and plain DPO's.
        margin = beta * ((policy[:6] - reference[:6]) - (policy[6:] - reference[6:]))
        flipped = -torch.nn.functional.logsigmoid(-margin).mean()
        expected = expected * (1 - 2 * smoothing) + 2 * smoothing * flipped
        (expected_gradient,) = torch.autograd.grad(expected, policy)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE)
    recorded = self._metrics["train"]
    for ours, theirs in {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
    }.items():
        assert metrics[ours].item() == pytest.approx(recorded[theirs][0], abs=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
@pytest.mark.parametrize("labels", ["mixed", "desirable", "undesirable"])
def test_kto(labels, weights):
    torch.manual_seed(2)
    policy = (-30 * torch.rand(8)).requires_grad_()
    reference = -30 * torch.rand(8)
    kl_policy, kl_reference = reference + 1.5 * torch.rand(8), reference
    label = {
        "mixed": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool(),
        "desirable": torch.ones(8).bool(),
        "undesirable": torch.zeros(8).bool(),
    }[labels]
    self = trainer(
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: kl_policy,
    )
    inputs = trl_inputs(8)
    inputs |= {"label": label, "ref_logps": reference, "ref_KL_logps": kl_reference}
    expected = KTOTrainer._compute_loss(self, lambda **_: outputs(policy), inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, policy)

    loss, metrics = kto_loss(
        policy,
        reference,
        label,
        kl_estimate(kl_policy, kl_reference),
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    (gradient,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE)
    recorded = self._metrics["train"]
    assert metrics["kl"].item() == pytest.approx(recorded["kl"][0], abs=1e-6)
    if label.any():
        assert metrics["reward_desirable"].item() == pytest.approx(
            recorded["rewards/chosen"][0], abs=1e-6
        )
    if not label.all():
        found = metrics["reward_undesirable"].item()
        assert found == pytest.approx(recorded["rewards/rejected"][0], abs=1e-6)


@pytest.mark.parametrize("center", [None, 0.01, 0.5])
@pytest.mark.parametrize("margins", [False, True])
def test_reward_model(center, margins):
    torch.manual_seed(3)
    rewards = (4 * torch.randn(12)).requires_grad_()
    lead = torch.rand(6)
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = trl_inputs(12) | ({"margin": lead} if margins else {})
    model = lambda **_: SimpleNamespace(logits=rewards[:, None])  # noqa: E731
    expected = RewardTrainer.compute_loss(self, model, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, rewards)
    loss, metrics = reward_model_loss(
        *rewards.chunk(2), lead if margins else None, center=center or 0.0
    )
    (gradient,) = torch.autograd.grad(loss, rewards)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE)
    recorded = self._metrics["train"]
    assert metrics["reward_accuracy"].item() == recorded["accuracy"][-1]
    assert metrics["reward_margin"].item() == pytest.approx(recorded["margin"][-1], abs=1e-6)


def test_rpo():
    """TRL's sigmoid and sft together, as its rpo_alpha was: the latter over all tokens of chosen answers."""
    torch.manual_seed(4)
    lengths = torch.tensor([1, 4, 2, 3, 4, 1])
    mask = torch.arange(5) < lengths[:, None] + 1
    mask[:, 0] = False
    logps = (-3 * torch.rand(6, 4) * mask[:, 1:]).requires_grad_()  # labels of the prompt are -100
    reference = -9 * torch.rand(6)
    self = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=0.1,
        label_smoothing=0.0,
        loss_types=["sigmoid", "sft"],
        loss_weights=[1.0, 0.7],
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.ones(6, 5, dtype=torch.long),
        "attention_mask": torch.ones(6, 5, dtype=torch.long),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:3],
        "ref_rejected_logps": reference[3:],
    }
    zeros = torch.zeros(6, 4)
    said = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    expected = DPOTrainer._compute_loss(self, lambda **_: said, inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    whole = (logps * mask[:, 1:]).sum(1)
    loss, _ = dpo_loss(*whole.chunk(2), *reference.chunk(2), beta=0.1)
    loss = loss + 0.7 * chosen_cross_entropy(whole[:3], lengths[:3].sum())
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    kept = mask[:, 1:]
    torch.testing.assert_close(gradient[kept], expected_gradient[kept], **TOLERANCE)


def robust(chosen, rejected, *, beta):
    return robust_dpo_loss(chosen, rejected, beta=beta, flip_rate=0.2)


def length_normalised(chosen, rejected, *, beta):
    return dpo_loss(chosen, rejected, 0 * chosen, 0 * rejected, beta=beta)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "loss_of"),
    [
        ("ipo", ipo_loss),
        ("robust", robust),
        ("apo_zero", apo_zero_loss),
        ("apo_down", apo_down_loss),
        ("sigmoid_norm", length_normalised),
    ],
)
def test_losses_of_log_ratios(name, loss_of, beta):
    torch.manual_seed(3)
    policy = (-3 * torch.rand(12)).requires_grad_()
    reference = -3 * torch.rand(12)
    self = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        label_smoothing=0.2, loss_types=[name], loss_weights=[1.0], use_weighting=False,
    )  # fmt: skip
    inputs = trl_inputs(12)
    inputs |= {"ref_chosen_logps": reference[:6], "ref_rejected_logps": reference[6:]}
    expected = DPOTrainer._compute_loss(self, lambda **_: outputs(policy), inputs, False)
    ratios = policy - reference  # one completion token each: sums are means
    loss, _ = loss_of(ratios[:6], ratios[6:], beta=beta)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (loss, expected)),
        **TOLERANCE,
    )


def test_cpo():
    torch.manual_seed(6)
    logps = -9 * torch.rand(12)
    self = SimpleNamespace(
        beta=0.3, simpo_gamma=0.0, loss_type="sigmoid", label_smoothing=0.0, alpha=0.0,
        accelerator=Accelerator(),
    )  # fmt: skip
    losses, chosen, rejected = CPOTrainer.cpo_loss(self, logps[:6], logps[6:])
    lengths = torch.full((6,), 5.0)
    loss, metrics = cpo_loss(logps[:6], logps[6:], lengths, beta=0.3, sft_weight=0.7)
    tokens = (logps[:6] / 5)[:, None].expand(6, 5)  # TRL: the mean over all tokens of the batch
    torch.testing.assert_close(loss, losses.mean() - 0.7 * tokens.mean(), **TOLERANCE)
    assert metrics["reward_chosen"].item() == pytest.approx(chosen.mean().item())
    assert metrics["reward_rejected"].item() == pytest.approx(rejected.mean().item())


def test_orpo():
    torch.manual_seed(4)
    means = -3 * torch.rand(12) - 0.01
    self = SimpleNamespace(beta=0.2, accelerator=Accelerator())
    ratio_loss, *_ = ORPOTrainer.odds_ratio_loss(self, means[:6], means[6:])
    loss, _ = orpo_loss(means[:6], means[6:], beta=0.2)
    torch.testing.assert_close(loss, (-means[:6] - ratio_loss).mean(), **TOLERANCE)


def test_simpo():
    torch.manual_seed(5)
    means = -3 * torch.rand(12)
    self = SimpleNamespace(
        beta=2.0, simpo_gamma=1.0, loss_type="simpo", label_smoothing=0.0, alpha=0.0,
        accelerator=Accelerator(),
    )  # fmt: skip
    losses, *_ = CPOTrainer.cpo_loss(self, means[:6], means[6:])
    loss, metrics = simpo_loss(means[:6], means[6:], beta=2.0, gamma=1.0)
    torch.testing.assert_close(loss, losses.mean(), **TOLERANCE)
    assert metrics["token_reward_margin"].item() == pytest.approx(
        2.0 * (means[:6] - means[6:]).mean().item()
    )


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [("grpo", "token"), ("dapo", "token"), ("dr_grpo", "token"), ("grpo", "sequence")],
)
def test_grpo(loss_type, level, beta):
    """Loss, gradient, divergence and share of clipped tokens, of policies far apart."""
    torch.manual_seed(4)
    rows, length, longest = 8, 6, 9
    policy = (-3 * torch.rand(rows, length)).requires_grad_()
    old, reference = policy.detach() + 0.4 * torch.randn(2, rows, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    rewards = torch.randint(0, 3, (2, 4)).float()
    expected_advantages = rewards - rewards.mean(1, keepdim=True)
    spread = torch.stack([nanstd(own) for own in rewards])[:, None]
    expected_advantages = (expected_advantages / (spread + 1e-4)).flatten()
    advantages = group_advantages(rewards)[0].flatten()
    torch.testing.assert_close(advantages, expected_advantages, **TOLERANCE)
    self = trainer(
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.3,
        max_completion_length=longest,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            policy,
            torch.zeros_like(policy),
            None,
        ),
    )
    self.accelerator.num_processes = 1
    self.accelerator.reduce = lambda tensor, reduction: tensor
    inputs = {
        "prompt_ids": torch.ones(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.ones(rows, length, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": expected_advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    expected = GRPOTrainer._compute_loss(self, self.model, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, policy, retain_graph=True)

    whole = mask if level == "sequence" else None
    losses, clipped = token_losses(policy, old, advantages, 0.2, 0.3, whole)
    divergences = divergence(policy, reference)
    loss = averaged(losses + beta * divergences, mask, loss_type, longest)
    (gradient,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE)
    recorded = self._metrics["train"]
    share = float((clipped & mask).sum() / mask.sum())
    if level == "sequence":  # TRL's share is then of answers
        share = float(clipped[:, 0].float().mean())
    assert share == pytest.approx(recorded["clip_ratio/region_mean"][0]) and share > 0
    if beta:
        mean = float((divergences.detach() * mask).sum() / mask.sum())
        assert mean == pytest.approx(recorded["kl"][0])
