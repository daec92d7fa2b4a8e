"""PPO in plain PyTorch, with `gae` and `ppo_loss`: to balance a pole on a cart.

    python examples/ppo_cart_pole.py [ITERATIONS]

The cart and pole of Barto, Sutton and Anderson 1983, 64 of them at a time. Time comes first in
every tensor, (T, B), as in CleanRL, whose loop over time `advantages_and_returns` is.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from instructcore.adapters.cleanrl import advantages_and_returns
from instructcore.ops import ppo_loss, token_logprobs

B, T, GAMMA, LAMBDA, EPOCHS, LONGEST = 64, 64, 0.99, 0.95, 4, 500


def move(state: Tensor, push: Tensor) -> Tensor:
    """The state (B, 4) 0.02 s later: position, speed, angle, angular speed; push (B,) is 0 or 1."""
    x, speed, angle, turning = state.unbind(1)
    force, sin, cos = 20.0 * push - 10.0, angle.sin(), angle.cos()
    share = (force + 0.05 * turning.square() * sin) / 1.1
    turns = (9.8 * sin - cos * share) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
    goes = share - 0.05 * turns * cos / 1.1
    return state + 0.02 * torch.stack([speed, goes, turning, turns], dim=1)


class Agent(torch.nn.Module):
    """Of states (..., 4): logits of the two pushes, and the value."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
        self.policy = torch.nn.Sequential(*layers, torch.nn.Linear(64, 2))
        layers = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
        self.value = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(states), self.value(states)[..., 0]


def main(iterations: int = 60) -> list[float]:
    """The mean length of the episodes that ended in each iteration, at most 500."""
    torch.manual_seed(0)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-3)
    state, done, steps = 0.1 * torch.rand(B, 4) - 0.05, torch.zeros(B), torch.zeros(B)
    curve = []
    for iteration in range(iterations):
        states, pushes, dones, lengths = torch.empty(T, B, 4), torch.empty(T, B), [], []
        with torch.no_grad():
            for t in range(T):
                states[t] = state
                pushes[t] = agent(state)[0].softmax(-1).multinomial(1)[:, 0]
                dones.append(done)
                state, steps = move(state, pushes[t]), steps + 1
                fell = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > math.pi / 15)
                over = fell | (steps == LONGEST)
                lengths.append(steps[over])
                state = torch.where(over[:, None], 0.1 * torch.rand(B, 4) - 0.05, state)
                steps, done = steps.masked_fill(over, 0), over.float()
            logits, values = agent(states)
            old = token_logprobs(logits.flatten(0, 1), pushes.flatten().long()).logprobs
            advantages, returns = advantages_and_returns(
                torch.ones(T, B), values, torch.stack(dones), agent(state)[1], done, GAMMA, LAMBDA
            )
            advantages = (advantages - advantages.mean()) / advantages.std()
        rows = torch.ones(T * B, dtype=torch.bool)
        for _ in range(EPOCHS):
            for part in torch.randperm(T * B).split(T * B // 4):
                logits, value = agent(states.flatten(0, 1)[part])
                found = token_logprobs(logits, pushes.flatten()[part].long())
                loss, _ = ppo_loss(
                    *(x[None] for x in (found.logprobs, old[part], advantages.flatten()[part])),
                    rows[part][None],
                    values=value[None],
                    old_values=values.flatten()[part][None],
                    returns=returns.flatten()[part][None],
                    entropy=found.entropy[None],
                    value_clip_range=None,
                    value_coef=0.5,
                    entropy_coef=0.01,
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        ended = torch.cat(lengths)
        curve.append(float(ended.mean()) if len(ended) else float(LONGEST))
        if iteration % 10 == 9:
            print(f"iteration {iteration + 1}: episodes of {curve[-1]:.0f} steps")
    return curve


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
