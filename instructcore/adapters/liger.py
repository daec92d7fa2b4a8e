"""Liger-Kernel (0.8): its cross entropies. `use()` reaches all that computes them there: functional
forms, modules, and the models that Liger patches. Logits are not overwritten."""

from typing import NamedTuple

import torch

from instructcore.ops import cross_entropy, linear_cross_entropy
from instructcore.ops._head import Head, LiveRows, workspace_bytes

from . import head, refuse, replacing
from .cce import capped, chosen_logits


class CrossEntropyOutput(NamedTuple):
    """z_loss is a part of the loss, of its shape; token_accuracy the share of targets that are the
    argmax, (N,) for reduction "none"; predicted_tokens (N,) the argmax, -1 where ignored. Without
    gradient, and None unless asked for."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None


def _outputs(losses, chosen, argmax, target, weight, ignore_index, lse_square_scale,
             label_smoothing, reduction, softcap, return_z_loss, return_token_accuracy,
             return_predicted_tokens, use_token_scaling=False):  # fmt: skip
    """From the losses of the rows, their logits at given tokens, and their argmax."""
    plain = {"ignore_index": ignore_index, "softcap": softcap or 0.0}
    settings = {**plain, "z_loss": lse_square_scale, "label_smoothing": label_smoothing}
    mean, predicted = reduction == "mean", return_token_accuracy or return_predicted_tokens
    apart = use_token_scaling or (mean and lse_square_scale and weight is not None)
    if not (apart or return_z_loss or predicted):
        return CrossEntropyOutput(losses(weight, reduction, **settings))
    valid, share = target != ignore_index, 1.0
    count, z_loss, accuracy, best = valid.sum().clamp(min=1), None, None, None

    def reduced(rows):
        rows = rows if reduction == "none" else rows.sum()
        return rows / count if mean else rows

    with torch.no_grad():
        if return_z_loss or use_token_scaling:
            nats = losses(None, "none", **plain)
            share = torch.exp(-nats) if use_token_scaling else share
        if return_z_loss:
            lse = nats + capped(chosen(target.where(valid, 0)), softcap)
            z_loss = reduced(lse_square_scale * (share * lse**2).masked_fill(~valid, 0.0))
        if predicted:
            best = argmax().masked_fill(~valid, -1)
        if return_token_accuracy:
            right = (best == target.where(valid, -2)).float()
            accuracy = right if reduction == "none" else right.sum() / count
    if apart and mean and weight is not None:  # its sum divides all but the z-loss
        weight = weight.float()
        total = weight[target.clamp(0, len(weight) - 1)].where(valid, 0.0).sum()
        weight = weight * (count / total)
    if apart:
        loss = reduced(share * losses(weight, "none", **settings))
    else:
        loss = losses(weight, reduction, **settings)
    return CrossEntropyOutput(loss, z_loss, accuracy, best if return_predicted_tokens else None)


class LigerCrossEntropyFunction:
    """`apply` stands in for that of Liger's autograd function of this name."""

    @staticmethod
    def apply(_input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
              reduction="mean", softcap=None, return_z_loss=False, return_token_accuracy=False,
              return_predicted_tokens=False):  # fmt: skip
        """logits (N, V), target (N,) -> CrossEntropyOutput, loss and z_loss of the logits' type."""
        target = target.long()
        found = _outputs(
            lambda w, how, **more: cross_entropy(_input, target, weight=w, reduction=how, **more),
            lambda at: _input.gather(1, at[:, None])[:, 0].float(),
            lambda: _input.argmax(-1),
            *(target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap),
            *(return_z_loss, return_token_accuracy, return_predicted_tokens),
        )
        losses = (x if x is None else x.to(_input.dtype) for x in found[:2])
        return CrossEntropyOutput(*losses, *found[2:])


class LigerFusedLinearCrossEntropyFunction:
    """`apply` stands in for that of Liger's autograd function of this name."""

    @staticmethod
    def apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100,
              lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None,
              return_z_loss=False, accum_dtype=None, use_token_scaling=False,
              return_token_accuracy=False, return_predicted_tokens=False):  # fmt: skip
        """hidden (N, C), weight (V, C), target (N,), bias (V,) -> CrossEntropyOutput, loss and
        z_loss float32. The gradient of weight is summed in float32. z_loss and token scaling share
        one more pass of the head, accuracy and argmax another; with token scaling, or z-loss and
        class weights in a mean, the backward forms the logits again."""
        low = None if accum_dtype == torch.float32 else accum_dtype
        refuse("LigerFusedLinearCrossEntropyFunction", accum_dtype=(low, "None or float32"))
        (hidden, weight, bias), target = head(_input, weight, bias), target.long()
        return _outputs(
            lambda w, how, **more: linear_cross_entropy(
                hidden, weight, target, bias=bias, class_weight=w, reduction=how, **more
            ),
            lambda at: chosen_logits(hidden, weight, bias, at),
            lambda: _argmax(hidden, weight, bias),
            *(target, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction),
            *(softcap, return_z_loss, return_token_accuracy, return_predicted_tokens),
            use_token_scaling,
        )


def _argmax(hidden, weight, bias):
    best, rows = hidden.new_empty(len(hidden), dtype=torch.int64), LiveRows(None, None)
    for cut, logits, _ in Head(hidden, weight, bias, rows, workspace_bytes(hidden, None)).chunks():
        best[cut] = logits.argmax(-1)
    return best


class LigerCrossEntropyLoss(torch.nn.Module):
    """loss(logits (N, V), target (N,)), or a CrossEntropyOutput if more is asked for."""

    def __init__(self, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                 reduction="mean", softcap=None, return_z_loss=False, return_token_accuracy=False,
                 return_predicted_tokens=False):  # fmt: skip
        super().__init__()
        self.weight, more = weight, (return_z_loss, return_token_accuracy, return_predicted_tokens)
        self.settings = (ignore_index, lse_square_scale, label_smoothing, reduction, softcap, *more)
        self.whole = any(more)

    def forward(self, _input, target):
        found = LigerCrossEntropyFunction.apply(_input, target, self.weight, *self.settings)
        return found if self.whole else found.loss


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """loss(lin_weight (V, C), hidden (N, C), target (N,), bias (V,)), as LigerCrossEntropyLoss."""

    def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                 reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
                 use_token_scaling=False, return_token_accuracy=False,
                 return_predicted_tokens=False):  # fmt: skip
        super().__init__()
        more = (return_token_accuracy, return_predicted_tokens)
        self.settings = (ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction)
        self.settings += (softcap, return_z_loss, accum_dtype, use_token_scaling, *more)
        self.whole = return_z_loss or any(more)

    def forward(self, lin_weight, _input, target, bias=None):
        apply, settings = LigerFusedLinearCrossEntropyFunction.apply, self.settings
        found = apply(_input, lin_weight, target, bias, *settings)
        return found if self.whole else found.loss


_ours = (LigerCrossEntropyFunction, LigerFusedLinearCrossEntropyFunction)
use, restore = replacing({"liger_kernel.transformers.functional": _ours})
