"""CleanRL's loop over time in ppo.py, as a function of that loop's variables."""

import torch

from instructcore.ops import gae


def advantages_and_returns(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """rewards, values, dones (T, B), next_value and next_done (B,) or (1, B) -> float32 (T, B).

    dones[t] says that an episode ended BEFORE step t: the flag that came with its observation.
    """
    ended = torch.cat([dones[1:], next_done.reshape(1, -1)]).bool()
    settings = dict(dones=ended.T, bootstrap=next_value.reshape(-1), gamma=gamma)
    advantages, returns = gae(rewards.T, values.T, **settings, lambda_=gae_lambda)
    return advantages.T, returns.T
