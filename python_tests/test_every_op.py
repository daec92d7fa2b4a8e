"""What holds for all ops alike: the same bits again, in part of a batch, in a CUDA graph."""

from __future__ import annotations

import sys

import pytest
import torch
from tolerance import assert_same_bits

from instructcore import _C, ops
from instructcore.data import Packed
from instructcore.model import GPT, ModelConfig
from instructcore.pretrain import next_token_loss, to_device

B, T, N, V = 6, 40, 12, 1025


def lengths(device, *sizes):
    return torch.tensor([0, *sizes], device=device).cumsum(0).int()


def tensors(device, *shapes, dtype=torch.bfloat16):
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


# Each case gives its op's tensors by name, and the other arguments. The first dimension of a tensor
# is the batch's, so that part of the batch is part of each, unless its name begins with "_".
def attention(device):
    q, k, v = tensors(device, (B, T, 4, 64), (B, 100, 2, 64), (B, 100, 2, 64))
    return {"q": q, "k": k, "v": v}, {"window": (70, 0), "return_lse": True}


def attention_float32(device):
    q, k, v = tensors(device, *[(B, T, 2, 16)] * 3, dtype=torch.float32)
    return {"q": q, "k": k, "v": v}, {"return_lse": True}


def attention_varlen(device):
    q, k, v = tensors(device, (B * T, 4, 64), (B * T, 2, 64), (B * T, 2, 64))
    cu = lengths(device, 3, 90, 0, 60, 77)
    return {"_q": q, "_k": k, "_v": v, "_cu_seqlens_q": cu, "_cu_seqlens_k": cu}, {}


def attention_paged_(device):
    q, k, v = (x.detach() for x in tensors(device, (B, 4, 64), (B, 2, 64), (B, 2, 64)))
    caches = [x.detach() for x in tensors(device, (4 * B, 16, 2, 64), (4 * B, 16, 2, 64))]
    table = torch.arange(4 * B, device=device).reshape(B, 4).int()
    held = torch.tensor([0, 5, 15, 16, 40, 63], device=device).int()
    named = {"q": q, "_k_cache": caches[0], "_v_cache": caches[1], "block_table": table}
    named |= {"cache_seqlens": held, "_cu_seqlens_q": torch.arange(B + 1, device=device).int()}
    return named | {"k_new": k, "v_new": v}, {}


def swiglu(device):
    (gate_up,) = tensors(device, (N, 2 * 259))
    return {"gate_up": gate_up}, {}


def gelu(device):
    (x,) = tensors(device, (N, 259), dtype=torch.float32)
    return {"x": x}, {}


def add_norm(device):
    x, branch = tensors(device, (N, 259), (N, 259))
    weight, bias = torch.rand(2, 259, device=device)
    x = x.detach().float().requires_grad_()
    named = {"x": x, "branch": branch, "_weight": weight, "_bias": bias}
    return named, {"eps": 1e-5, "dtype": torch.bfloat16}


def rotary(device):
    (qkv,) = tensors(device, (N, 8, 24))
    angles = torch.outer(torch.arange(50.0), torch.rand(12)).to(device)
    positions = torch.arange(N, device=device).int() + 3
    named = {"qkv": qkv, "_cos": angles.cos(), "_sin": angles.sin(), "positions": positions}
    return named, {"heads": 4, "kv_heads": 2}


def cross_entropy(device):
    (logits,) = tensors(device, (N, V))
    return {"logits": logits, "targets": torch.randint(V, (N,), device=device)}, {
        "reduction": "none"
    }


def token_logprobs(device):
    named, _ = cross_entropy(device)
    return named | {"temperature": torch.rand(N, device=device) + 0.5}, {}


def linear(device):
    x, weight, bias = tensors(device, (N, 200), (V, 200), (V,))
    return {"x": x, "_weight": weight, "_bias": bias}, {}


def linear_cross_entropy(device):
    hidden, weight = tensors(device, (N, 64), (V, 64))
    targets = torch.randint(V, (N,), device=device)
    return {"_hidden": hidden, "_weight": weight, "_targets": targets}, {}


def linear_token_logprobs(device):
    named, _ = linear_cross_entropy(device)
    return named, {}


def gae(device):
    rewards, values = (x.detach() for x in tensors(device, (B, 3000), (B, 3000)))
    return {"rewards": rewards, "values": values}, {"gamma": 0.99, "lambda_": 0.95}


def ppo_advantage(device):
    mask = torch.rand(B, T, device=device) < 0.8
    rows = (torch.randn(B, T, device=device) for _ in range(3))
    named = dict(zip(("logprobs", "ref_logprobs", "values"), rows, strict=True))
    named |= {"scores": torch.randn(B, device=device), "mask": mask}
    return named, {"kl_coef": 0.1, "gamma": 1.0, "lambda_": 0.95, "whiten": False}


def whiten_advantages(device):
    named = {"advantages": torch.randn(B, T, device=device)}
    return named | {"mask": torch.rand(B, T, device=device) < 0.8}, {"mean": 0.1, "var": 2.0}


def ppo_loss(device):
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    named = {"_" + name: torch.randn(B, T, device=device) for name in names}
    named["_logprobs"].requires_grad_()
    named["_values"].requires_grad_()
    return named | {"_mask": torch.rand(B, T, device=device) < 0.8}, {}


def sample(device):
    (logits,) = tensors(device, (N, V))
    rows = torch.arange(N, device=device)
    named = {"logits": logits.detach(), "seeds": rows, "positions": rows + 7}
    return named | {"top_p": torch.rand(N, device=device)}, {"temperature": 0.7}


CASES = {
    "activation": [swiglu, gelu],
    "add_norm": [add_norm],
    "attention": [attention, attention_float32, attention_varlen, attention_paged_],
    "cross_entropy": [cross_entropy, linear_cross_entropy],
    "token_logprobs": [token_logprobs, linear_token_logprobs],
    "gae": [gae],
    "linear": [linear],
    "ppo_advantage": [ppo_advantage, whiten_advantages],
    "ppo_loss": [ppo_loss],
    "rotary": [rotary],
    "sample": [sample],
}


@pytest.fixture(
    params=[
        pytest.param(case, id=case.__name__, marks=pytest.mark.kernel(op))
        for op, cases in CASES.items()
        for case in cases
    ]
)
def case(request):
    return request.param


def call(case, named, options):
    """All that the op gives, gradients with ones included."""
    op = getattr(ops, case.__name__.removesuffix("_float32"))
    named = {name.removeprefix("_"): x for name, x in named.items()}
    caches = {name: x.clone() for name, x in named.items() if name.endswith("_cache")}
    found = op(**named | caches, **options)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    found = [x for part in found for x in (part if isinstance(part, tuple) else [part])]
    found = [x for x in found if isinstance(x, torch.Tensor)]
    leaves = [x for x in named.values() if x.requires_grad]
    if leaves:
        outs = [x for x in found if x.requires_grad]
        grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
        found = [x.detach() for x in found] + list(grads)
    return found + list(caches.values())


def check_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert_same_bits(a, b)


def test_again(case, device, threads, full):
    named, options = case(device)
    expected = call(case, named, options)
    for i in range(1000 if full and device == "cuda" else 3):
        threads(i % 3 + 1)
        check_same(call(case, named, options), expected)


def test_part_of_a_batch(case, device):
    named, options = case(device)
    if all(name.startswith("_") for name in named):
        pytest.skip("a sum over the batch, or packed")
    expected = call(case, named, options)
    kept = {n: x if n.startswith("_") else x.detach()[2:5] for n, x in named.items()}
    kept = {n: x.requires_grad_() if named[n].requires_grad else x for n, x in kept.items()}
    if case is attention_paged_:
        kept["_cu_seqlens_q"] = named["_cu_seqlens_q"][:4]
    whole = len(named["q"] if "q" in named else next(iter(named.values())))
    pairs = zip(call(case, kept, options), expected, strict=True)
    pairs = [(a, b) for a, b in pairs if b.shape[:1] == (whole,) and a.shape[:1] == (3,)]
    assert pairs
    for a, b in pairs:
        assert_same_bits(a, b[2:5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stream_and_graph_cuda(case):
    if not _C.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    named, options = case("cuda")
    expected = call(case, named, options)
    first = next(x for x in named.values() if x.is_floating_point())
    right = first.detach().clone()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        first.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            first.copy_(right)  # on another stream the op would come before this
        ours = call(case, named, options)
    stream.synchronize()
    check_same(ours, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = call(case, named, options)
    with torch.no_grad():
        first.copy_(-right)  # read at each replay
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    check_same(ours, call(case, named, options))


@pytest.mark.kernel("attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(device, dtype, monkeypatch):
    """A model's loss and gradients, by the kernels under test and by the CPU's."""
    shape = ModelConfig(
        family="qwen3", vocab_size=300, context=128, layers=2, heads=4, kv_heads=2, width=64
    )
    tokens = torch.randint(300, (150,))
    cu = torch.tensor([0, 70, 71, 150], dtype=torch.int32)
    packed = Packed(tokens, cu, tokens.roll(-1), 79)

    def step(device):
        model = GPT(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
        loss = next_token_loss(model, to_device(packed, torch.device(device)), 150)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters()]
        return loss.detach().cpu(), torch.cat(grads).double().cpu()

    loss, grads = step(device)
    for name, module in sys.modules.items():
        if name.startswith("instructcore.ops.") and hasattr(module, "_C"):
            monkeypatch.setattr(module, "_C", _C)
    expected_loss, expected = step("cpu")
    # Two roundings of each activation in bfloat16, through 2 layers and back.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss - expected_loss) <= tolerance * expected_loss
    assert (grads - expected).norm() <= tolerance * expected.norm()
