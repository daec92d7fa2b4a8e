"""Liger-Kernel (0.8): its cross-entropy modules. Losses are float32; logits are not overwritten."""

import torch

from instructcore.ops import cross_entropy, linear_cross_entropy

from . import refuse, replacing


class LigerCrossEntropyLoss(torch.nn.Module):
    """loss(logits (N, V), target (N,))"""

    def __init__(self, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                 reduction="mean", softcap=None, return_z_loss=False, return_token_accuracy=False,
                 return_predicted_tokens=False):  # fmt: skip
        super().__init__()
        uneven = weight is not None and reduction == "mean" and lse_square_scale
        must, op = "0 for a mean with class weights: the divisors differ", type(self).__name__
        refuse(op, lse_square_scale=(uneven, must), return_z_loss=(return_z_loss, "False"))
        refuse(op, return_token_accuracy=(return_token_accuracy, "False"))
        refuse(op, return_predicted_tokens=(return_predicted_tokens, "False"))
        self.weight, self.settings = weight, dict(ignore_index=ignore_index, reduction=reduction)
        self.settings |= dict(label_smoothing=label_smoothing, z_loss=lse_square_scale)
        self.settings["softcap"] = softcap or 0.0

    def forward(self, _input, target):
        return cross_entropy(_input, target, weight=self.weight, **self.settings)


class LigerFusedLinearCrossEntropyLoss(LigerCrossEntropyLoss):
    """loss(lin_weight (V, C), hidden (N, C), target (N,), bias (V,)). The gradient of lin_weight
    is summed in float32."""

    def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                 reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
                 use_token_scaling=False, return_token_accuracy=False,
                 return_predicted_tokens=False):  # fmt: skip
        shared = (ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap)
        super().__init__(*shared, return_z_loss, return_token_accuracy, return_predicted_tokens)
        low = None if accum_dtype == torch.float32 else accum_dtype
        refuse(type(self).__name__, accum_dtype=(low, "float32"))
        refuse(type(self).__name__, use_token_scaling=(use_token_scaling, "False"))

    def forward(self, lin_weight, _input, target, bias=None):
        settings = dict(bias=bias, class_weight=self.weight, **self.settings)
        return linear_cross_entropy(_input, lin_weight, target, **settings)


_fused = "liger_kernel.transformers.fused_linear_cross_entropy"
_homes = {"liger_kernel.transformers.cross_entropy": (LigerCrossEntropyLoss,)}
use, restore = replacing({**_homes, _fused: (LigerFusedLinearCrossEntropyLoss,)})
