"""Other libraries' functions by our kernels: the same arguments, the same results, undone again."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from tolerance import EPS, assert_close, assert_same_bits

from instructcore import adapters
from instructcore.adapters import cce, cleanrl, flash_attn, liger, torchrl, trl, verl

# Where each library keeps what we stand in for, and how it is called there.
WITH_KVCACHE = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, "
    "alibi_slopes=None, num_splits=0, return_softmax_lse=False"
)
DENSE = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
GAE = "gamma, lmbda, state_value, next_state_value, reward, done, terminated=None, *, time_dim=-2"
LIGER = (
    ", ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction='mean', "
    "softcap=None, return_z_loss=False, {}"
    "return_token_accuracy=False, return_predicted_tokens=False"
)
LIGER_PLAIN = LIGER.format("")
LIGER_FUSED = LIGER.format("accum_dtype=None, use_token_scaling=False, ")
FOREIGN = {
    flash_attn: {
        "flash_attn.flash_attn_interface.flash_attn_func": f"q, k, v, {DENSE}",
        "flash_attn.flash_attn_interface.flash_attn_varlen_func": (
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
            f"{DENSE}, block_table=None"
        ),
        "flash_attn.flash_attn_interface.flash_attn_with_kvcache": WITH_KVCACHE,
    },
    trl: {
        "trl.trainer.utils.selective_log_softmax": "logits, index, temperature=1.0, row_mask=None",
        "trl.trainer.utils.entropy_from_logits": "logits, chunk_size=128",
        "trl.trainer.utils.selective_log_softmax_and_entropy": (
            "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None"
        ),
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction": (
            "hidden, weight, bias, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0, "
            "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1')"
        ),
    },
    verl: {
        "verl.utils.torch_functional.logprobs_from_logits": "logits, labels, inplace_backward=True",
        "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy": (
            "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None"
        ),
        "verl.trainer.ppo.core_algos.compute_gae_advantage_return": (
            "token_level_rewards, values, response_mask, gamma, lam"
        ),
    },
    liger: {
        "liger_kernel.transformers.functional.LigerCrossEntropyFunction": (
            f"_input, target, weight{LIGER_PLAIN}"
        ),
        "liger_kernel.transformers.functional.LigerFusedLinearCrossEntropyFunction": (
            f"_input, weight, target, bias=None, ce_weight=None{LIGER_FUSED}"
        ),
    },
    cce: {
        "cut_cross_entropy.linear_cross_entropy.linear_cross_entropy": (
            "e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction='mean', shift=0, "
            "return_lse=False, filter_eps='auto', accum_e_fp32=False, accum_c_fp32=False, "
            "filter_e_grad=True, filter_c_grad=True, impl='cce', vocab_parallel_options=None"
        ),
    },
    torchrl: {
        "torchrl.objectives.value.functional.generalized_advantage_estimate": GAE,
        "torchrl.objectives.value.functional.vec_generalized_advantage_estimate": GAE,
    },
}
IMPORTED = {  # not replaced: theirs call what is
    liger: {
        "liger_kernel.transformers.cross_entropy.LigerCrossEntropyLoss": (
            f"weight=None{LIGER_PLAIN}"
        ),
        "liger_kernel.transformers.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyLoss": (
            f"ce_weight=None{LIGER_FUSED}"
        ),
    },
}
SIGNATURES = [
    (adapter, path, signature)
    for library in (FOREIGN, IMPORTED)
    for adapter, paths in library.items()
    for path, signature in paths.items()
]


def short(x) -> str:
    x = x if isinstance(x, str) else x.__name__
    return "" if "=" in x or ", " in x else x.rpartition(".")[2]  # no id of a signature


@pytest.mark.parametrize(("adapter", "path", "signature"), SIGNATURES, ids=short)
def test_same_signature(adapter, path, signature):
    ours = getattr(adapter, short(path))
    autograd = path.endswith("Function")  # called by its `apply`
    ours = ours.apply if autograd else ours
    assert str(inspect.signature(ours)) == f"({signature})"
    if importlib.util.find_spec(path.partition(".")[0]) is None:
        return  # theirs is not here to be asked
    theirs = getattr(importlib.import_module(path.rpartition(".")[0]), short(path))
    theirs = theirs.forward if autograd else theirs
    plain = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (ours, theirs)
    ]
    assert plain[0] == plain[1][autograd:]  # whose forward takes ctx before them


@pytest.mark.parametrize("adapter", FOREIGN, ids=short)
def test_replaces_and_restores(adapter, monkeypatch):
    """In a library of this shape: the functions' homes, and a module that imported one of them."""
    library = next(iter(FOREIGN[adapter])).partition(".")[0]
    user, stranger = types.ModuleType(f"{library}.user"), types.ModuleType("stranger")
    modules, theirs = {f"{library}.user": user, "stranger": stranger}, {}
    for path in FOREIGN[adapter]:
        home, _, name = path.rpartition(".")
        theirs[path] = types.FunctionType((lambda: None).__code__, {}, name)
        setattr(modules.setdefault(home, types.ModuleType(home)), name, theirs[path])
        user.renamed = stranger.renamed = theirs[path]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match="use\\(\\) must come first"):
        adapter.restore()
    before = adapters.report()
    lines = adapter.use()
    assert adapter.use() == lines and adapters.report() == [*before, *lines]
    for path, line in zip(theirs, lines, strict=True):
        assert path in line and line.endswith(f" -> instructcore.adapters.{short(adapter)}")
        home, _, name = path.rpartition(".")
        assert getattr(modules[home], name) is getattr(adapter, name)
    assert user.renamed is getattr(adapter, short(path)) and f"{library}.user.renamed" in lines[-1]
    assert stranger.renamed is theirs[path]
    late = types.ModuleType(f"{library}.late")
    late.imported = user.renamed
    monkeypatch.setitem(sys.modules, late.__name__, late)
    adapter.restore()
    assert adapters.report() == before
    for path, function in theirs.items():
        assert getattr(modules[path.rpartition(".")[0]], short(path)) is function
    assert user.renamed is late.imported is theirs[path]
    assert getattr(adapter, short(path)) is not theirs[path]


def test_foreign_libraries_are_imported_by_their_adapter_alone():
    code = (
        "import sys, instructcore.adapters\n"
        "from instructcore.adapters import cce, cleanrl, flash_attn, liger, torchrl, trl, verl\n"
        "foreign = {'transformers', 'flash_attn', 'trl', 'verl', 'liger_kernel', 'torchrl'}\n"
        "print((foreign | {'cut_cross_entropy'}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def compare(ours, plain, *inputs, name=""):
    """ours(*inputs), the outputs and the gradients of their weighted sum, by the house's rule: with
    `plain` in the inputs' dtype and in float64."""
    found = []
    generator = torch.Generator().manual_seed(1)
    weights = None
    for f, dtype in ((ours, None), (plain, None), (plain, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = f(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if weights is None:
            weights = [torch.randn(o.shape, generator=generator) for o in outputs]
        total = sum((w.to(o.dtype) * o).sum() for w, o in zip(weights, outputs, strict=True))
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for i, (a, native, truth) in enumerate(zip(*found, strict=True)):
        assert_close(a, native.to(a.dtype), truth, a.dtype, f"{name} output or gradient {i}")


def softmax_attention(
    q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, sinks=None, scale=None
):
    """(B, T, H, D), (B, S, K, D) -> (out, lse (B, H, T)), written out."""
    t, s = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[3] ** -0.5)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    distance = torch.arange(t)[:, None] + s - t - torch.arange(s)
    if slopes is not None:
        logits = logits - slopes.to(q.dtype)[:, None, None] * distance.abs()
    right = 0 if causal else window[1]
    hidden = (distance < -right) if right >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden = hidden | (distance > window[0])
    logits = logits.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v), logits.logsumexp(-1)


CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window_size": (3, 1), "softcap": 2.0},
    "slopes, scale": {
        "causal": True,
        "alibi_slopes": 0.5 ** torch.arange(1.0, 5),
        "softmax_scale": 0.2,
    },
}


def plain_settings(call):
    names = {"window_size": "window", "alibi_slopes": "slopes", "softmax_scale": "scale"}
    return {names.get(key, key): value for key, value in call.items()}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
class TestFlashAttn:
    def test_dense(self, call):
        q, k, v = (torch.randn(2, n, h, 16) for n, h in ((5, 4), (9, 2), (9, 2)))
        compare(
            lambda q, k, v: flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **call)[:2],
            lambda q, k, v: softmax_attention(q, k, v, **plain_settings(call)),
            *(q, k, v),
        )
        out, lse, empty = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **call)
        assert_same_bits(out, flash_attn.flash_attn_func(q, k, v, **call))
        assert lse.shape == (2, 4, 5) and empty.numel() == 0

    def test_varlen(self, call):
        lengths = ((2, 5), (3, 3), (1, 6))
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True))
        q, k, v = (torch.randn(n, h, 16) for n, h in ((6, 4), (14, 2), (14, 2)))

        def plain(q, k, v):
            parts = zip(q.split([2, 3, 1]), k.split([5, 3, 6]), v.split([5, 3, 6]), strict=True)
            found = [
                softmax_attention(*(x[None] for x in part), **plain_settings(call))
                for part in parts
            ]
            return torch.cat([o[0] for o, _ in found]), torch.cat([x[0] for _, x in found], dim=1)

        def ours(q, k, v):
            return flash_attn.flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, 3, 6, return_attn_probs=True, **call
            )[:2]

        compare(ours, plain, q, k, v)
        # The same keys in pages of 4, out of order.
        table = torch.tensor([[5, 2], [0, -1], [3, 1]], dtype=torch.int32)
        pages = torch.full((2, 6, 4, 2, 16), torch.nan)
        for b in range(3):
            for i in range(lengths[b][1]):
                pages[:, table[b, i // 4], i % 4] = torch.stack([k, v])[:, cu_k[b] + i]
        out = flash_attn.flash_attn_varlen_func(
            q, *pages, cu_q, cu_k, 3, 6, block_table=table, **call
        )
        assert_same_bits(out, ours(q, k, v)[0])
        trained = flash_attn.flash_attn_varlen_func(
            q.requires_grad_(), *pages, cu_q, cu_k, 3, 6, block_table=table, **call
        )
        assert_same_bits(trained, out)
        with pytest.raises(NotImplementedError, match="block_table must be None where grad"):
            trained.sum().backward()

    def test_with_kvcache(self, call):
        """Two sequences in rows 3 and 0 of a cache, two new tokens each."""
        caches, new = torch.randn(2, 4, 8, 2, 16), torch.randn(2, 2, 2, 2, 16)
        q, rows, held = torch.randn(2, 2, 4, 16), torch.tensor([3, 0]), torch.tensor([5, 0]).int()
        before = caches.clone()
        out, lse = flash_attn.flash_attn_with_kvcache(
            *(q, *caches, *new),
            cache_seqlens=held,
            cache_batch_idx=rows.int(),
            return_softmax_lse=True,
            **call,
        )
        for b in range(2):
            k, v = (torch.cat([before[i, rows[b], : held[b]], new[i, b]])[None] for i in range(2))
            found = [
                softmax_attention(q[b : b + 1].to(d), k.to(d), v.to(d), **plain_settings(call))
                for d in (torch.float32, torch.float64)
            ]
            for i, x in enumerate((out, lse)):
                assert_close(x[b : b + 1], found[0][i], found[1][i])
            assert_same_bits(caches[0, rows[b], : held[b] + 2], k[0])
        untouched = [1, 2]
        assert_same_bits(caches[:, untouched], before[:, untouched])
        again = flash_attn.flash_attn_with_kvcache(
            q, *caches[:, rows], cache_seqlens=held + 2, **call
        )
        assert_same_bits(again, out)
        full = flash_attn.flash_attn_with_kvcache(q, *caches[:, rows], **call)
        eight = flash_attn.flash_attn_with_kvcache(q, *caches[:, rows], cache_seqlens=8, **call)
        assert_same_bits(full, eight)
        pages, table = caches.view(2, 8, 4, 2, 16), torch.tensor([[6, 7], [0, 1]]).int()
        paged = flash_attn.flash_attn_with_kvcache(
            q, *pages, cache_seqlens=held + 2, block_table=table, **call
        )
        assert_same_bits(paged, out)


def test_flash_attn_head_dims_between_multiples_of_8():
    """With the scale of the head dim as it is given, in pages too."""
    q, k, v = torch.randn(1, 5, 4, 20), torch.randn(1, 9, 2, 20), torch.randn(1, 9, 2, 20)
    cu_q, cu_k = torch.tensor([0, 5]).int(), torch.tensor([0, 9]).int()
    dense = {"causal": True, "return_attn_probs": True}
    compare(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **dense)[:2],
        lambda q, k, v: softmax_attention(q, k, v, causal=True),
        *(q, k, v),
    )
    compare(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, **dense)[:2],
        lambda q, k, v: tuple(x[0] for x in softmax_attention(q[None], k[None], v[None], True)),
        *(q[0], k[0], v[0]),
    )
    lengths, table = (cu_q, cu_k, 5, 9), torch.zeros(1, 1).int()
    paged = flash_attn.flash_attn_varlen_func(q[0], k, v, *lengths, block_table=table, causal=True)
    assert_same_bits(
        paged, flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *lengths, causal=True)
    )


def test_flash_attn_rotary():
    """Pairs (2i, 2i + 1) by default; positions count from cache_seqlens."""
    angles = torch.rand(8, 8) * 3
    cos, sin = angles.cos(), angles.sin()
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 16)
    caches = torch.randn(2, 1, 8, 2, 16)

    def turn(x):  # at positions 3 and 4
        pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)))
        return torch.view_as_real(pairs * torch.polar(cos * 0 + 1, angles)[3:5, None]).flatten(-2)

    settings = {"cache_seqlens": 3, "causal": True}
    turned = flash_attn.flash_attn_with_kvcache(turn(q), *caches.clone(), turn(k), v, **settings)
    out = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cos, sin, **settings)
    torch.testing.assert_close(out, turned, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="rotary_cos must be None for T > 1"):
        flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cos, sin, cache_seqlens=3)
    rest = torch.zeros(8, 4)  # the first eight dims alone
    part = (torch.cat([cos[:, :4], rest + 1], 1), torch.cat([sin[:, :4], rest], 1))
    whole = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, *part, **settings)
    some = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cos[:, :4], sin[:, :4], **settings)
    assert_same_bits(some, whole)
    for columns, interleaved in ((4, False), (9, True)):
        bad = torch.ones(2, 8, columns)
        with pytest.raises(ValueError, match=rf"cos must be \(8, 8\), got \(8, {columns}\)"):
            flash_attn.flash_attn_with_kvcache(
                *(q, *caches, k, v, *bad), rotary_interleaved=interleaved, **settings
            )


def test_flash_attn_refuses():
    q = torch.randn(1, 2, 2, 16)
    cu = torch.tensor([0, 2]).int()
    with pytest.raises(NotImplementedError, match="flash_attn_func: dropout_p must be 0.*got 0.1"):
        flash_attn.flash_attn_func(q, q, q, 0.1)
    with pytest.raises(NotImplementedError, match="varlen_func: dropout_p must be 0.*got 0.1"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 2, 2, 0.1)
    with pytest.raises(NotImplementedError, match="cache_leftpad must be None"):
        flash_attn.flash_attn_with_kvcache(q, q, q, cache_leftpad=cu[:1])
    with pytest.raises(ValueError, match=r"k_new must be \(2, 2, 16\), got \(1, 2, 16\)"):
        flash_attn.flash_attn_with_kvcache(q, q, q, q[:, :1], q[:, :1], cache_seqlens=0)


def logprobs_and_entropy(logits, index, temperature=1.0):
    found = (logits / temperature).log_softmax(-1)
    chosen = found.gather(-1, index if index.ndim == logits.ndim else index[..., None])
    entropy = -(found.exp() * found).sum(-1)
    return chosen.view(index.shape), entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trl(dtype):
    logits, index = 3 * torch.randn(2, 7, 33).to(dtype), torch.randint(33, (2, 7))
    compare(
        lambda x: trl.selective_log_softmax(x, index, 0.7),
        lambda x: logprobs_and_entropy(x, index, 0.7)[0],
        logits,
    )
    compare(trl.entropy_from_logits, lambda x: logprobs_and_entropy(x, index)[1], logits)
    compare(
        lambda x: trl.selective_log_softmax_and_entropy(x, index.int(), temperature=1.3),
        lambda x: logprobs_and_entropy(x, index, 1.3),
        logits,
    )
    several = torch.randint(33, (2, 7, 3))
    compare(
        lambda x: trl.selective_log_softmax(x, several, 0.7),
        lambda x: logprobs_and_entropy(x, several, 0.7)[0],
        logits,
    )
    assert trl.selective_log_softmax(logits[0, 0], index[0, 0]).shape == ()


def test_trl_mask_and_gradient():
    logits, index = torch.randn(2, 7, 33, requires_grad=True), torch.randint(33, (2, 7))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    bad = logits.detach().masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    logprobs, entropy = trl.selective_log_softmax_and_entropy(bad, index, False, row_mask=mask)
    assert not entropy.requires_grad
    for x in (logprobs, entropy, trl.selective_log_softmax(bad, index, row_mask=mask)):
        assert torch.equal(x == 0, mask == 0)
    logprobs.sum().backward()
    assert torch.equal(bad.grad.abs().sum(-1) == 0, mask == 0)
    several = trl.selective_log_softmax(
        logits, index[..., None].expand(-1, -1, 2), row_mask=mask[..., None].expand(-1, -1, 2)
    )
    torch.testing.assert_close(several, logprobs[..., None].expand(-1, -1, 2))
    hidden = logits.detach().index_fill(-1, torch.tensor([3, 5]), -torch.inf)
    for chosen in ([3, 4], [4, 3], [3, 5]):
        found = trl.selective_log_softmax(hidden, torch.tensor(chosen).expand(2, 7, -1))
        torch.testing.assert_close(found, hidden.log_softmax(-1)[..., chosen])
    with pytest.raises(ValueError, match="temperature"):
        trl.selective_log_softmax(logits, index, 0.0)
    with pytest.raises(ValueError, match=r"index must be .*2, 7.*, got .*7, 2"):
        trl.selective_log_softmax(logits, index.T)


def test_trl_head():
    hidden, weight, bias = torch.randn(9, 16), torch.randn(33, 16), torch.randn(33)
    targets = torch.randint(33, (9,))
    apply = trl.ChunkedLogProbFunction.apply
    compare(
        lambda h, w, b: apply(h, w, b, targets.int(), 1.4, 8, None, 2.0, ("entropy",))[:2],
        lambda h, w, b: logprobs_and_entropy(h @ w.T + b, targets, 0.7),
        *(hidden, weight, bias),
    )
    logprobs, *rest = apply(hidden, weight, None, targets, 1.0, 8, outputs=())
    assert rest == [None] * 4
    top1 = apply(hidden, weight, None, targets, 1.0, 8, outputs=("is_top1",))[4]
    assert torch.equal(top1, (hidden @ weight.T).argmax(1) == targets)
    for b in (None, bias):  # every output, which is the default; of p, the logits' probabilities
        leaf = hidden.clone().requires_grad_()
        squares, mean = apply(leaf, weight, b, targets, 1.4, 8, None, 2.0)[2:4]
        assert not squares.requires_grad and not mean.requires_grad
        native, truth = (
            (hidden.to(dtype) @ weight.to(dtype).T + (0 if b is None else b)) / 0.7
            for dtype in (torch.float32, torch.float64)
        )
        assert_close(mean, native.mean(-1), truth.mean(-1))
        lse = truth.logsumexp(-1)  # the difference of two numbers of about twice its size
        error = (squares - (2 * truth).logsumexp(-1) + 2 * lse).abs().max()
        assert error <= 2 * EPS[torch.float32] * 2 * lse.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        low = apply(hidden, weight, None, targets, 1.0, 8, outputs=())[0]
        mean = apply(hidden, weight, None, targets, 1.0, 8)[3]
    rounded = hidden.bfloat16(), weight.bfloat16()
    mean_of_rounded = (rounded[0].float() @ rounded[1].float().T).mean(-1)
    torch.testing.assert_close(mean, mean_of_rounded, rtol=1e-5, atol=1e-5)
    assert_same_bits(low, apply(*rounded, None, targets, 1.0, 8, outputs=())[0])
    wide = apply(hidden, weight.bfloat16(), None, targets, 1.0, 8, outputs=())[0]
    assert_same_bits(
        wide, apply(hidden, weight.bfloat16().float(), None, targets, 1.0, 8, outputs=())[0]
    )
    for wrong, given in {
        "final_logit_softcapping must be None, got 30.0": {"final_logit_softcapping": 30.0},
        "logit_scale must be above 0, got 0.0": {"logit_scale": 0.0},
    }.items():
        with pytest.raises(NotImplementedError, match=wrong):
            apply(hidden, weight, None, targets, 1.0, 8, **given)


def test_trl_head_is_theirs():
    """Through the model of their trainers, theirs replaced by ours, padding included."""
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("trl is older than 1.16")
    models = [make("llama", "sdpa") for _ in range(2)]
    padded = inputs("padded")
    outputs = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    found = []
    for ours, model in zip((False, True), models, strict=True):
        utils.add_fused_lm_head(model, 0.7, outputs=outputs)
        if ours:
            assert any("ChunkedLogProbFunction" in line for line in trl.use())
        try:
            out = model(**padded, fused_lm_head=True)
        finally:
            if ours:
                trl.restore()
        (out.loss + out.entropy.mean()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append([*(getattr(out, name) for name in outputs), grads])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_verl():
    logits, labels = torch.randn(2, 7, 33), torch.randint(33, (2, 7))
    given = logits.clone()
    compare(
        lambda x: verl.logprobs_from_logits(x, labels),
        lambda x: logprobs_and_entropy(x, labels)[0],
        given,
    )
    assert_same_bits(given, logits)
    compare(
        lambda h, w: verl.linear_cross_entropy(h, w, labels, 0.7, "none"),
        lambda h, w: logprobs_and_entropy((h @ w.T).flatten(0, 1), labels.flatten(), 0.7),
        *(torch.randn(2, 7, 16), torch.randn(33, 16)),
    )
    hidden, weight = torch.randn(2, 7, 16), torch.randn(33, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = verl.linear_cross_entropy(hidden, weight, labels)
    rounded = verl.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert_same_bits(low[0], rounded[0])
    with pytest.raises(NotImplementedError, match="reduction must be .none., got mean"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    with pytest.raises(NotImplementedError, match="dist_process_group must be None"):
        verl.linear_cross_entropy(hidden, weight, labels, dist_process_group="a group")


def test_verl_gae():
    """verl's definition: steps outside the mask pass the state on, whitening by the mask."""
    rewards, values = torch.randn(3, 9), torch.randn(3, 9)
    mask = torch.rand(3, 9) < 0.7

    def plain(dtype):
        r, v, m = rewards.to(dtype), values.to(dtype), mask.to(dtype)
        following = carried = torch.zeros(3, dtype=dtype)
        found = []
        for t in reversed(range(9)):
            step = r[:, t] + 0.9 * following - v[:, t] + 0.9 * 0.8 * carried
            following = torch.where(mask[:, t], v[:, t], following)
            carried = torch.where(mask[:, t], step, carried)
            found.insert(0, carried)
        raw = torch.stack(found, dim=1)
        kept = raw[mask]
        return (raw - kept.mean()) * (kept.var() + 1e-8).rsqrt() * m, (raw + v) * m

    ours = verl.compute_gae_advantage_return(rewards, values, mask.long(), torch.tensor(0.9), 0.8)
    for a, native, truth in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_close(a, native, truth)
    with pytest.raises(ValueError, match="two unmasked tokens or more, got 1"):
        verl.compute_gae_advantage_return(
            rewards, values, torch.eye(3, 9)[:1].expand(3, 9) * torch.eye(3)[:, :1], 0.9, 0.8
        )


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cce(reduction, shift):
    targets = torch.randint(33, (2, 7))
    targets[0, 3] = targets[1, 0] = -7
    kept = targets[:, shift:].flatten()

    def plain(e, c, bias, softcap=None):
        logits = e[:, : 7 - shift].flatten(0, 1) @ c.T + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, kept, ignore_index=-7, reduction=reduction)
        lse = logits.logsumexp(-1).masked_fill(kept == -7, 0.0).view(2, -1)
        return loss.view(lse.shape) if reduction == "none" else loss, lse

    shapes = (2, 7, 16), (33, 16), (33,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    how = {"ignore_index": -7, "reduction": reduction, "shift": shift}
    for softcap in (None, 2.0):
        both = {**how, "softcap": softcap, "return_lse": True}
        found = []
        for result in (
            cce.linear_cross_entropy(*leaves[:2], targets, leaves[2], **both),
            plain(*leaves, softcap),
        ):
            total = sum((x * (1 + torch.arange(x.numel()).view(x.shape))).sum() for x in result)
            found.append([*result, *torch.autograd.grad(total, leaves)])
        for ours, theirs in zip(*found, strict=True):  # lse and its gradient are sums of the
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # loss's and a logit's
    compare(
        lambda e, c, b: cce.linear_cross_entropy(e, c, targets.int(), b, **how),
        lambda e, c, b: plain(e, c, b)[0],
        *leaves,
    )


def test_cce_refuses():
    e, c, targets = torch.randn(2, 7, 16), torch.randn(33, 16), torch.randint(33, (2, 7))
    with pytest.raises(NotImplementedError, match="vocab_parallel_options must be None, the voc"):
        cce.linear_cross_entropy(e, c, targets, vocab_parallel_options="some")
    for shift in (-1, 7):
        with pytest.raises(ValueError, match=rf"shift must be in \[0, 7\), got {shift}"):
            cce.linear_cross_entropy(e, c, targets, shift=shift)
    for lse in (False, True):
        with pytest.raises(ValueError, match="linear_cross_entropy: reduction must be"):
            cce.linear_cross_entropy(e, c, targets, reduction="batch", return_lse=lse)


def liger_plain(logits, target, weight, ignore, z, smoothing, reduction, softcap, scaled=False):
    """(loss, z-loss) as Liger defines them: the mean of z-loss is over all rows that count."""
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    valid = target != ignore
    share = torch.ones(()).to(logits)
    if scaled:
        share = (-F.cross_entropy(logits, target, ignore_index=ignore, reduction="none")).exp()
    each = F.cross_entropy(logits, target, weight, None, ignore, None, "none", smoothing)
    drift = (z * logits.logsumexp(-1) ** 2).masked_fill(~valid, 0.0)
    each, drift = each * share.detach(), drift * share.detach()
    if reduction == "none":
        return each + drift, drift
    each, drift = each.sum(), drift.sum()
    if reduction == "mean":
        drift = drift / valid.sum()
        each = each / (valid.sum() if weight is None else weight[target[valid]].sum())
    return each + drift, drift


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger(reduction, weighted, softcap):
    """Losses, also where they are parts of a larger graph, z-loss, accuracy and best tokens."""
    logits, target = 3 * torch.randn(11, 33), torch.randint(33, (11,))
    hidden, head, bias = torch.randn(11, 16), torch.randn(33, 16), torch.randn(33)
    target[3:5] = logits[3:5].argmax(-1)  # two are right
    target[2] = -1
    weight = torch.rand(33) if weighted else None

    def plain(x, scaled=False):
        share = None if weight is None else weight.to(x)
        return liger_plain(x, target, share, -1, 0.01, 0.1, reduction, softcap, scaled)

    settings = (-1, 0.01, 0.1, reduction, softcap, True)
    ours = liger.LigerCrossEntropyLoss(weight, *settings, True, True)
    compare(lambda x: ours(x, target).loss, lambda x: plain(x)[0], logits)
    fused = liger.LigerFusedLinearCrossEntropyLoss(weight, *settings, torch.float32, False, True)
    compare(
        lambda w, h, b: fused(w, h, target, b).loss,
        lambda w, h, b: plain(h @ w.T + b)[0],
        *(head, hidden, bias),
    )
    scaled = liger.LigerFusedLinearCrossEntropyLoss(weight, *settings, None, True)
    leaves = [x.requires_grad_() for x in (head, hidden, bias)]
    found = []
    for loss in (
        scaled(head, hidden, target, bias).loss,
        plain(hidden.double() @ head.double().T + bias.double(), True)[0].float(),
    ):
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for a, b in zip(*found, strict=True):  # exp of a loss of 10 is off by 10 times its rounding
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    hidden, head, bias = (x.detach() for x in (hidden, head, bias))
    formed = hidden @ head.T + bias
    for found, x, scale in (
        (ours(logits, target), logits, False),
        (fused(head, hidden, target, bias), formed, False),
        (scaled(head, hidden, target, bias), formed, True),
    ):
        # The sum of a loss and a logit, of 5 to 10 nats, squared.
        torch.testing.assert_close(found.z_loss, plain(x, scale)[1], rtol=1e-5, atol=1e-6)
        right = (x.argmax(-1) == target).float()
        if scale:
            assert found.token_accuracy is None
        else:
            right = right if reduction == "none" else right.sum() / 10
            torch.testing.assert_close(found.token_accuracy, right)
    best = logits.argmax(-1)
    best[2] = -1
    assert torch.equal(ours(logits, target).predicted_tokens, best)
    assert fused(head, hidden, target).predicted_tokens is None
    lone = liger.LigerFusedLinearCrossEntropyLoss(weight, -1, 0.0, 0.1, reduction)

    def smooth(w, h):
        share = None if weight is None else weight.to(w)
        return F.cross_entropy(h @ w.T, target, share, None, -1, None, reduction, 0.1)

    compare(lambda w, h: lone(w, h, target), smooth, head, hidden)


def test_liger_of_mixed_types():
    """A float32 head is not rounded to the hidden states' type, nor are 16-bit class weights used
    as such: z-loss is the loss's part, and the best tokens those of the logits behind it. A target
    that is a class can be the ignored one."""
    hidden, target = torch.randn(300, 16).bfloat16(), torch.randint(33, (300,))
    weight = (1 + torch.rand(33)).half()
    for head in (torch.randn(33, 16), torch.randn(33, 16).bfloat16()):
        bias = torch.randn(33)
        logits = hidden.double() @ head.double().T + bias.double()
        settings = (2, 0.1, 0.0, "mean", None)
        loss, z_loss = liger_plain(logits, target, weight.double(), *settings)
        ours = liger.LigerFusedLinearCrossEntropyLoss(
            weight, *settings[:4], return_z_loss=True, return_predicted_tokens=True
        )
        found = ours(head, hidden, target, bias)
        torch.testing.assert_close(found.loss, loss.float(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(found.z_loss, z_loss.float(), rtol=1e-5, atol=0.0)
        best = logits.argmax(-1).masked_fill(target == 2, -1)
        assert torch.equal(found.predicted_tokens, best)
    e, c = hidden[None], torch.randn(33, 16)
    _, lse = cce.linear_cross_entropy(e, c, target[None], return_lse=True)
    torch.testing.assert_close(lse, (e.float() @ c.T).logsumexp(-1), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = cce.linear_cross_entropy(e.float(), c, target[None])
    assert_same_bits(low, cce.linear_cross_entropy(e, c.bfloat16(), target[None]))


def test_liger_reaches_its_callers(monkeypatch):
    """Forms that hold Liger's function call ours between `use` and `restore`."""
    functional = types.ModuleType("liger_kernel.transformers.functional")
    code = (
        "class LigerCrossEntropyFunction:\n"
        "    def apply(*_):\n"
        "        raise RuntimeError('theirs')\n"
        "class LigerFusedLinearCrossEntropyFunction(LigerCrossEntropyFunction):\n"
        "    pass\n"
        "def liger_cross_entropy(input, target):\n"
        "    return LigerCrossEntropyFunction.apply(input, target, None)[0]\n"
    )
    exec(code, vars(functional))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    logits, target = torch.randn(5, 33), torch.randint(33, (5,))
    liger.use()
    ours = functional.liger_cross_entropy(logits, target)
    liger.restore()
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))
    with pytest.raises(RuntimeError, match="theirs"):
        functional.liger_cross_entropy(logits, target)


def test_liger_results_are_of_their_types():
    """The logits' type, but float32 where the head is fused, whose products autocast rounds."""
    logits, target = torch.randn(11, 33).bfloat16(), torch.randint(33, (11,))
    found = liger.LigerCrossEntropyLoss(return_z_loss=True, return_token_accuracy=True)(
        logits, target.int()
    )
    assert [x.dtype for x in found[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact = liger.LigerCrossEntropyLoss()(logits.float(), target)
    assert torch.equal(liger.LigerCrossEntropyLoss()(logits, target), exact.bfloat16())
    hidden, head = torch.randn(11, 16), torch.randn(33, 16)
    fused = liger.LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True)
    bias, rounded = torch.randn(33), (head.bfloat16(), hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        low, _, _, best = fused(head, hidden, target, bias)
    assert_same_bits(low, fused(*rounded, target, bias.bfloat16()).loss)
    logits = rounded[1].float() @ rounded[0].float().T + bias.bfloat16()
    assert torch.equal(best, logits.argmax(-1))
    assert_same_bits(
        fused(head.bfloat16(), hidden, target).loss,
        fused(head.bfloat16().float(), hidden, target).loss,
    )
    nothing = torch.full((11,), -100)
    for loss in (
        liger.LigerCrossEntropyLoss(torch.rand(33), lse_square_scale=0.1)(logits, nothing),
        fused(head, hidden, nothing).loss,
        *liger.LigerCrossEntropyLoss(return_z_loss=True, return_token_accuracy=True)(
            logits, nothing
        )[:3],
    ):
        assert loss == 0


def test_liger_refuses():
    fused = liger.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="accum_dtype must be None or float32, got t"):
        fused(torch.randn(33, 16), torch.randn(11, 16), torch.zeros(11).long())


@pytest.mark.parametrize("time_dim", [-2, 0, -1])
def test_torchrl(time_dim):
    shape = (3, 4, 5)
    value, following, reward = (torch.randn(shape) for _ in range(3))
    terminated = torch.rand(shape) < 0.2
    done = terminated | (torch.rand(shape) < 0.2)

    def plain(dtype, ends):
        v, n, r = (x.to(dtype).movedim(time_dim, 0) for x in (value, following, reward))
        stops, last = (x.movedim(time_dim, 0) for x in (done, ends))
        carried, found = torch.zeros_like(v[0]), []
        for t in reversed(range(len(v))):
            step = r[t] + 0.9 * torch.where(last[t], 0.0, n[t]) - v[t]
            carried = step + 0.9 * 0.8 * torch.where(stops[t], 0.0, carried)
            found.insert(0, carried)
        found = torch.stack(found)
        return found.movedim(0, time_dim), (found + v).movedim(0, time_dim)

    for ends in (terminated, None):
        expected = [plain(d, done if ends is None else ends) for d in (reward.dtype, torch.double)]
        for f in (
            torchrl.generalized_advantage_estimate,
            torchrl.vec_generalized_advantage_estimate,
        ):
            ours = f(
                0.9, torch.tensor(0.8), value, following, reward, done, ends, time_dim=time_dim
            )
            for a, native, truth in zip(ours, *expected, strict=True):
                assert_close(a, native, truth)


def test_torchrl_refuses():
    x, done = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="gamma must be one number"):
        torchrl.vec_generalized_advantage_estimate(torch.ones(2), 0.9, x, x, x, done)
    with pytest.raises(NotImplementedError, match="lmbda must be one number"):
        torchrl.generalized_advantage_estimate(0.9, torch.ones(2), x, x, x, done)
    with pytest.raises(NotImplementedError, match="state_value must be without gradient"):
        torchrl.generalized_advantage_estimate(0.9, 0.9, x.clone().requires_grad_(), x, x, done)
    with pytest.raises(ValueError, match="shapes must be one"):
        torchrl.generalized_advantage_estimate(0.9, 0.9, x, x, x, done[:1])


def test_cleanrl():
    """The loop of CleanRL's ppo.py."""
    rewards, values = torch.randn(6, 3), torch.randn(6, 3)
    dones, next_done = (torch.rand(6, 3) < 0.3).float(), torch.tensor([1.0, 0.0, 0.0])
    next_value = torch.randn(1, 3)

    def plain(dtype):
        r, v, n = rewards.to(dtype), values.to(dtype), next_value.to(dtype).reshape(-1)
        carried, found = 0, []
        for t in reversed(range(6)):
            goes_on = 1 - (next_done if t == 5 else dones[t + 1])
            following = n if t == 5 else v[t + 1]
            delta = r[t] + 0.9 * following * goes_on - v[t]
            carried = delta + 0.9 * 0.8 * goes_on * carried
            found.insert(0, carried)
        return torch.stack(found), torch.stack(found) + v

    ours = cleanrl.advantages_and_returns(rewards, values, dones, next_value, next_done, 0.9, 0.8)
    for a, native, truth in zip(ours, plain(torch.float32), plain(torch.double), strict=True):
        assert_close(a, native, truth)


# ---- transformers

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
WINDOW = {**SHAPE, "sliding_window": 8}
# name: (configuration, its settings). Windows in every layer; in every second one, with a cap on
# the logits; in every second one, with sinks.
MODELS = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE),
    "mistral": ("MistralConfig", WINDOW),
    "gemma2": (
        "Gemma2Config",
        {**WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": ("GptOssConfig", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.fixture
def hf(threads):
    pytest.importorskip("transformers", reason="transformers is not installed")
    threads(1)  # two would wait for each other at every little step
    return importlib.import_module("instructcore.adapters.transformers")


def make(name, attention="eager"):
    import transformers

    config, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**settings), attn_implementation=attention
    )
    for parameter_name, parameter in model.named_parameters():
        if name == "gemma2" and "q_proj" in parameter_name:
            parameter.data *= 100  # for logits that the cap bends
    return model


def plain_attention(module, query, key, value, mask, scaling=None, softcap=0.0, s_aux=None, **_):
    """transformers' own, but in the dtype of its arguments throughout."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logits = logits.masked_fill(~mask, -1e30)
    if s_aux is not None:
        sink = s_aux[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]] * mask.any(-1, keepdim=True)
    return (weights @ value).transpose(1, 2), None


def plain_loss(logits, labels, vocab_size, **_):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def plain_norm(self, x):
    eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
    weight = self.weight + 1 if type(self).__name__.startswith("Gemma") else self.weight
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def in_float64(model):
    """With the parts replaced that transformers computes in float32 come what may."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    def mask(*args, **kwargs):
        return masking_utils.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", mask)
    model = model.double()
    model.set_attn_implementation("plain")
    model.loss_function = plain_loss
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(plain_norm, module)
        elif type(module).__name__.endswith("Experts"):
            model.set_experts_implementation("eager")
    return model


TOKENS = torch.randint(2, 96, (3, 33), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(TOKENS)
PADDED[1, :7] = PADDED[2, -9:] = 0
STARTS = torch.cat([torch.arange(n) for n in (11, 1, 5, 16)])[None]


def inputs(kind):
    """Of a model's forward; where they are padded, on both sides."""
    if kind == "packed":
        labels = torch.where(STARTS == 0, -100, TOKENS[:1])  # none across a border
        return {"input_ids": TOKENS[:1], "position_ids": STARTS, "labels": labels}
    labels = torch.where(PADDED.bool(), TOKENS, -100)
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    masks = {"attention_mask": PADDED, "position_ids": positions}
    return {"input_ids": TOKENS, "labels": labels, **masks}


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_training(hf, name, kind):
    """20 steps; at each, the loss and all gradients with, without and in float64. All three take
    the weights that ours led to: runs on their own part, as any two that round differently do."""
    models = [make(name, "sdpa").train() for _ in range(3)]
    assert len(hf.use(models[0])) == 2
    in_float64(models[2])
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.05)
    losses, gradients = ([[], [], []] for _ in range(2))
    for _ in range(20):
        for i, model in enumerate(models):
            model.load_state_dict(models[0].state_dict())
            model.zero_grad()
            loss = model(**inputs(kind), use_cache=False).loss
            loss.backward()
            losses[i].append(loss.detach())
            gradients[i].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    assert losses[0][-1] < losses[0][0] - 0.3
    for found in (losses, gradients):
        assert_close(*map(torch.stack, found))


@pytest.mark.parametrize("name", MODELS)
def test_logits(hf, name):
    """At every token, of rows that are plain, padded on either side or in the middle, packed."""
    models = [make(name).eval() for _ in range(3)]
    hf.use(models[0])
    in_float64(models[2])
    padded = inputs("padded")
    del padded["labels"]
    holes = PADDED.clone()
    holes[0, 5:7] = 0
    windows = name in ("mistral", "gemma2", "gpt_oss")
    if windows:
        with pytest.raises(NotImplementedError, match="without padding between tokens"):
            models[0](TOKENS, attention_mask=holes)
    for given, mask in (
        ({"input_ids": TOKENS}, torch.ones_like(TOKENS)),
        (padded, PADDED),
        ({"input_ids": TOKENS, "attention_mask": holes}, None if windows else holes),
        ({"input_ids": TOKENS, "position_ids": STARTS.expand(3, -1)}, torch.ones_like(TOKENS)),
    ):
        if mask is not None:
            with torch.no_grad():
                found = [m(**given, use_cache=False).logits[mask.bool()] for m in models]
            assert_close(*found)


@pytest.mark.parametrize("name", MODELS)
def test_generate(hf, name):
    """Greedy in float32, token for token, past the window, from left-padded and equal prompts."""
    model = make(name).eval()
    model.generation_config.pad_token_id = 0
    left = torch.ones_like(TOKENS)
    left[1, :7] = 0
    calls = (
        {},
        {"attention_mask": left},
        {"attention_mask": left, "cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask": left, "num_beams": 2, "max_new_tokens": 4},
    )
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}

    def run():
        return [model.generate(TOKENS, **{**settings, **call}) for call in calls]

    expected = run()
    hf.use(model)
    for ours, theirs in zip(run(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_packing_by_cu_seq_lens(hf):
    """What the collators for flash attention pass: sequences in all rows, one after another."""
    ends = torch.tensor([0, 5, 9, 12, 18])
    q, k, v = (torch.randn(2, h, 9, 16) for h in (4, 2, 2))
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    told, _ = hf.attention_forward(torch.nn.Identity(), q, k, v, None, **given)
    ids = torch.tensor([[1] * 5 + [2] * 4, [1] * 3 + [2] * 6])
    assert_same_bits(told, hf.attention_forward(torch.nn.Identity(), q, k, v, ids)[0])
    one, _ = hf.attention_forward(torch.nn.Identity(), *(x[1:, :, :3] for x in (q, k, v)), None)
    assert_same_bits(told[1:, :3], one)


def test_chunks(hf):
    """A chunk is a sequence; a key of an earlier chunk is in the cache, and unseen."""
    from transformers import masking_utils

    chunks = masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2]))
    ids = hf.attention_mask(2, 3, 9, 6, 0, mask_function=chunks)
    assert ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 2, 2, 2, 2, 3, 3, 3]]
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 3), (2, 9), (2, 9)))
    ours, _ = hf.attention_forward(torch.nn.Identity(), q, k, v, ids)
    at = torch.arange(9)
    shown = chunks(torch.arange(2)[:, None, None], 0, at[6:, None], at)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    native, truth = (
        F.scaled_dot_product_attention(q.to(d), k.to(d), v.to(d), shown[:, None]).transpose(1, 2)
        for d in (torch.float32, torch.float64)
    )
    assert_close(ours, native, truth)


def test_loss(hf):
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.where(torch.rand(2, 9) < 0.3, -100, torch.randint(33, (2, 9)))
    logits = torch.randn(2, 9, 33)
    for settings in (
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": labels.flip(1)},
        {"ignore_index": int(labels.max())},
    ):
        if "ignore_index" in settings:
            settings["shift_labels"] = labels.clamp(min=0)

        def plain(x, settings=settings):
            # ForCausalLMLoss rounds to float32: the truth is the same without that.
            if x.dtype == torch.float32:
                return ForCausalLMLoss(x, labels, 33, **settings)
            ignored = settings.get("ignore_index", -100)
            targets = settings.get("shift_labels", F.pad(labels, (0, 1), value=-100)[:, 1:])
            items = settings.get("num_items_in_batch")
            loss = F.cross_entropy(
                x.flatten(0, 1),
                targets.flatten(),
                ignore_index=ignored,
                reduction="mean" if items is None else "sum",
            )
            return loss if items is None else loss / items

        compare(lambda x, s=settings: hf.causal_lm_loss(x, labels, 33, **s), plain, logits)
    assert hf.causal_lm_loss(logits, torch.full_like(labels, -100), 33) == 0


def test_use_and_restore(hf):
    model, other = make("llama", "sdpa").eval(), make("llama", "sdpa").eval()
    expected = model(**inputs("padded"))
    with pytest.raises(ValueError, match="use\\(\\) must come first"):
        hf.restore(model)
    gc.collect()  # other tests' models
    before = adapters.report()
    lines = hf.use(model)
    assert lines == [
        "LlamaForCausalLM: attention sdpa -> instructcore.adapters.transformers.attention_forward",
        "LlamaForCausalLM: ForCausalLMLoss -> instructcore.adapters.transformers.causal_lm_loss",
    ]
    assert hf.use(model) == lines and adapters.report() == [*before, *lines]
    assert other.config._attn_implementation == "sdpa"
    assert model.loss_function is hf.causal_lm_loss is not other.loss_function
    changed = model(**inputs("padded"))
    assert not torch.equal(changed.logits, expected.logits)
    hf.restore(model)
    again = model(**inputs("padded"))
    assert model.loss_function is other.loss_function
    assert_same_bits(again.logits, expected.logits)
    assert_same_bits(again.loss, expected.loss)
    assert adapters.report() == before
    with pytest.raises(ValueError, match="use\\(\\) must come first"):
        hf.restore(model)
    hf.use(model)
    model.loss_function = print  # somebody else's
    hf.restore(model)
    assert model.config._attn_implementation == "sdpa" and model.loss_function is print
    # A loss that is not the causal one stays; a model that is gone is not reported.
    assert hf.use(model) == lines[:1] and model.loss_function is print
    del model
    gc.collect()
    assert adapters.report() == before


def test_refuses(hf):
    from transformers import masking_utils

    with pytest.raises(TypeError, match="must be a PreTrainedModel, got Linear"):
        hf.use(torch.nn.Linear(2, 2))
    model = make("llama").train()
    model._supports_flash_attn = False
    with pytest.raises(ValueError, match="must be of text and support flash attention, got Llama"):
        hf.use(model)
    model._supports_flash_attn = True
    hf.use(model)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="dropout must be 0.*got 0.1"):
        model(TOKENS)
    model.eval()
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \(B, S\).*1, 33, 33"):
        model(TOKENS, attention_mask=torch.zeros(3, 1, 33, 33))
    with pytest.raises(NotImplementedError, match="mask_function must be causal.*later tokens"):
        hf.attention_mask(1, 4, 4, mask_function=masking_utils.bidirectional_mask_function)
    causal = masking_utils.causal_mask_function
    with pytest.raises(NotImplementedError, match="mask_function must be causal.*caller's"):
        hf.attention_mask(1, 4, 4, mask_function=causal, use_vmap=True)
    q = torch.randn(1, 2, 3, 16)
    module = torch.nn.Identity()
    for name in ("position_bias", "output_attentions", "block_table"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None or False"):
            hf.attention_forward(module, q, q, q, None, **{name: "given"})
    with pytest.raises(NotImplementedError, match="where attention is causal"):
        hf.attention_forward(module, q, q, q, torch.ones(1, 3), is_causal=False)
