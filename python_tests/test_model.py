"""The model: against transformers both ways, packing, decoding, precision, heads, bad files."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_same_bits

from instructcore.errors import UserError
from instructcore.model import FAMILIES, GPT, KVCache, ModelConfig, load
from instructcore.tokenizer import Tokenizer

TINY = {"vocab_size": 131, "context": 96, "layers": 2, "heads": 4, "width": 64, "mlp_width": 96}


def tiny(family: str = "llama", **changes) -> ModelConfig:
    shape = dict(TINY)
    if family != "gpt2":
        shape["kv_heads"] = 2  # GQA
    if family == "qwen3":
        shape["head_dim"] = 24  # not width / heads, and not a power of two
    return ModelConfig(family=family, **(shape | changes))


def disturbed(config: ModelConfig, head: str = "lm", **arguments) -> GPT:
    """A model whose norms and biases are not 1 and 0, so that leaving one out shows."""
    model = GPT(config, head, **arguments)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 131, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def theirs(family: str, tied: bool):
    """A random transformers model; its weights are wide enough for logits to differ."""
    import transformers as hf

    torch.manual_seed(1)
    if family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=131,
            n_positions=96,
            n_embd=64,
            n_layer=2,
            n_head=4,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
        return hf.GPT2LMHeadModel(config).eval()
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(hf, name + "Config")(
        vocab_size=131,
        max_position_embeddings=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=0,
        **({"head_dim": 24} if family == "qwen3" else {}),
    )
    model = getattr(hf, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_close(ours: torch.Tensor, truth: torch.Tensor, scale: float = 1e-5) -> None:
    torch.testing.assert_close(ours, truth, rtol=scale, atol=scale * truth.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_transformers(family, tied, tmp_path):
    model = theirs(family, tied)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.family == family and ours.config.tie_head == tied
    tokens, cu_seqlens = packed([40, 7])
    with torch.no_grad():
        got = ours(tokens, cu_seqlens)
        want = [model(part[None]).logits[0] for part in tokens.split([40, 7])]
    assert got.std() > 0.1
    assert_close(got, torch.cat(want))
    assert ours.token_ids["eos_token_id"] == (2 if family == "gpt2" else [2, 3])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_ours(family, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = {} if family == "gpt2" else {"rope_theta": 300.0}
    ours = disturbed(tiny(family, tie_head=tied, **changes))
    ours.token_ids = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": 6}
    ours.save(tmp_path, extra={"stage": "sft"})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens, cu_seqlens = packed([33])
    with torch.no_grad():
        assert_close(ours(tokens, cu_seqlens), model.eval()(tokens[None]).logits[0])
    for ids in (model.config, model.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (None, 5, 6)
    again = load(tmp_path)
    assert again.config == ours.config and again.extra == {"stage": "sft"}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_is_a_sequence_classifier(family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    ours = disturbed(tiny(family), "scalar")
    ours.token_ids = {"pad_token_id": 0, "eos_token_id": 1}
    ours.save(tmp_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.num_labels == 1
    tokens, cu_seqlens = packed([20, 9, 31])
    tokens = tokens.clamp(min=1)
    rows = torch.nn.utils.rnn.pad_sequence(tokens.split([20, 9, 31]), batch_first=True)
    with torch.no_grad():
        last = ours(tokens, cu_seqlens)[cu_seqlens[1:].long() - 1]
        assert_close(last, model.eval()(rows, attention_mask=(rows != 0).long()).logits[:, 0])
        # The calibration shift is ours: transformers has no place for it.
        ours.score_bias.fill_(0.1)
        ours.save(tmp_path)
        again = load(tmp_path)
        assert again.head == "scalar" and torch.equal(again.score_bias, ours.score_bias)
        assert torch.equal(again(tokens, cu_seqlens), ours(tokens, cu_seqlens))


def test_generates_the_same_text_as_transformers(tmp_path):
    """Greedy decoding through the paged cache against transformers' own loop."""
    model = theirs("qwen3", True)
    model.save_pretrained(tmp_path)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    ours, (tokens, cu_seqlens) = load(tmp_path), packed([11])
    want = model.generate(
        tokens[None],
        attention_mask=torch.ones(1, 11, dtype=torch.int64),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
    )
    cache = KVCache(ours, blocks=4, block_size=16, rows=1, max_blocks=4)
    cache.block_table[0] = torch.tensor([2, 0, 3, 1])
    out = tokens.tolist()
    for _ in range(20):
        hidden = ours.decode(tokens, cu_seqlens, cache)
        tokens = ours.logits(hidden[-1:])[:, 4:].argmax(-1) + 4
        cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
        out.append(int(tokens))
    assert out == want[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_equals_one_by_one(family):
    model, lengths = disturbed(tiny(family)), [1, 17, 0, 96, 5]
    tokens, cu_seqlens = packed(lengths)
    with torch.no_grad():
        together = model(tokens, cu_seqlens)
        for part, logits in zip(tokens.split(lengths), together.split(lengths), strict=True):
            alone = model(part, torch.tensor([0, len(part)], dtype=torch.int32))
            assert_close(alone, logits) if len(part) else None


@pytest.mark.parametrize("chunks", [[1] * 40, [40], [7, 1, 30, 2], [39, 1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equals_hidden(family, chunks):
    """Two rows of 40 and 23 tokens, cut differently, in blocks out of order."""
    model, lengths = disturbed(tiny(family)), [40, 23]
    tokens, cu_seqlens = packed(lengths)
    with torch.no_grad():
        want = model.hidden(tokens, cu_seqlens).split(lengths)
    cache = KVCache(model, blocks=9, block_size=8, rows=2, max_blocks=5)
    cache.block_table[0] = torch.tensor([7, 0, 5, 2, 8])
    cache.block_table[1, :3] = torch.tensor([1, 6, 3])
    got, done = ([], []), [0, 0]
    for chunk in chunks:
        take = [min(chunk, n - at) for n, at in zip(lengths, done, strict=True)]
        parts = [
            row[at : at + n] for row, at, n in zip(tokens.split(lengths), done, take, strict=True)
        ]
        cu = torch.tensor([0, take[0], sum(take)], dtype=torch.int32)
        hidden = model.decode(torch.cat(parts), cu, cache)
        for row, part in enumerate(hidden.split(take)):
            got[row].append(part)
            done[row] += take[row]
    assert cache.seqlens.tolist() == lengths
    for row in range(2):
        torch.testing.assert_close(torch.cat(got[row]), want[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_in_one_call_has_the_bits_of_the_ops(family, dtype, frozen, threads):
    model, lengths = disturbed(tiny(family)), [40, 0, 23]
    model.compute_dtype = dtype
    caches = [KVCache(model, blocks=9, block_size=8, rows=3, max_blocks=6) for _ in range(2)]
    for cache in caches:
        cache.block_table[0, :6] = torch.tensor([7, 0, 5, 2, 8, 4])
        cache.block_table[2, :3] = torch.tensor([1, 6, 3])
    with torch.no_grad(), model.frozen() if frozen else nullcontext():
        for step in (lengths, [1, 0, 0], [2, 0, 1]):
            tokens, cu_seqlens = packed(step)
            want = model._decode(tokens, cu_seqlens, caches[0])
            for count in (1, 3):
                threads(count)
                before = caches[1].seqlens.clone()
                assert_same_bits(model.decode(tokens, cu_seqlens, caches[1]), want)
                assert torch.equal(caches[1].seqlens, caches[0].seqlens)
                if count == 1:  # once more, over what was appended
                    caches[1].seqlens.copy_(before)
        logits = model.logits(want)
    assert_same_bits(logits, model.logits(want).detach())


def test_decode_rejects():
    model = GPT(tiny("qwen2"))

    def decode(tokens=(1, 2, 3), starts=(0, 2, 3), blocks=(0, 1), **other):
        cache = KVCache(model, blocks=2, block_size=4, rows=2, max_blocks=1)
        cache.block_table[:, 0] = torch.tensor(blocks)
        for name, value in other.items():
            setattr(cache, name, value)
        model.decode(torch.tensor(tokens), torch.tensor(starts, dtype=torch.int32), cache)

    decode()
    with pytest.raises(RuntimeError, match=r"trunk: tokens must be in 0..130, got 131 at 1"):
        decode(tokens=(1, 131, 3))
    for starts in ((0, 2, 2), (1, 2, 3), (0, 3)):
        with pytest.raises(RuntimeError, match="trunk: cu_seqlens must span the 3 tokens of 2"):
            decode(starts=starts)
    with pytest.raises(RuntimeError, match="block_table must be within 0..1 where tokens are"):
        decode(blocks=(0, -1))
    with pytest.raises(RuntimeError, match="must fit block_table.s 1 blocks of 4, got 5 tokens"):
        decode(seqlens=torch.tensor([3, 0], dtype=torch.int32))
    caches = [torch.zeros(2, 4, 2, 16)] * 2
    for bad in (
        [x.half() for x in caches],
        [caches[0], torch.zeros(1, 4, 2, 16)],
        [torch.zeros(2, 2, 4, 16).transpose(1, 2)] * 2,
        [torch.zeros(2, 128)] * 2,
    ):
        with pytest.raises(RuntimeError, match="the caches must be contiguous, alike and of"):
            decode(values=bad)
    with pytest.raises(RuntimeError, match="the cache must have the model's 2 layers, got 1"):
        decode(keys=caches[:1], values=caches[:1])
    with pytest.raises(RuntimeError, match="block_table must have 2 rows and seqlens be contigu"):
        decode(block_table=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="block_table must have 2 rows and seqlens be contigu"):
        decode(seqlens=torch.zeros(4, dtype=torch.int32)[::2])


def test_decode_of_gpt2_stays_within_its_positions():
    model = GPT(tiny("gpt2"))
    cache = KVCache(model, blocks=13, block_size=8, rows=1, max_blocks=13)
    cache.block_table[0] = torch.arange(13)
    with pytest.raises(RuntimeError, match="within the context of 96, got 97 tokens"):
        model.decode(*packed([97]), cache)


def test_logits_of_any_hidden_states():
    """Those that the kernel does not take as they are go through the op, with its errors."""
    model = disturbed(tiny(), dtype=torch.bfloat16)
    hidden = torch.randn(64, 6).bfloat16().t()
    with torch.no_grad(), model.frozen():
        want = model.logits(hidden.contiguous())
        assert_same_bits(model.logits(hidden), want)
        assert_same_bits(model.logits(hidden.contiguous().view(2, 3, 64)), want.view(2, 3, -1))
        assert_same_bits(model.logits(hidden[2].contiguous()), want[2])
        with pytest.raises(ValueError, match=r"linear: x must be \(..., K\)"):
            model.logits(torch.zeros(3, 72).bfloat16())
        with pytest.raises(TypeError, match="linear: weight must be torch.float32"):
            model.logits(torch.zeros(3, 64))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    """Backward formulas of our own against float64 differences along random directions."""
    model = disturbed(tiny(family, width=32, heads=2, kv_heads=2, layers=1, head_dim=16))
    tokens, cu_seqlens = packed([9, 14])
    weight = torch.randn(23, 131, generator=torch.Generator().manual_seed(7))
    (model(tokens, cu_seqlens) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11))
        direction *= 1e-2 / direction.norm()
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                parameter.add_(direction, alpha=sign)
                ends.append((model(tokens, cu_seqlens).double() * weight).sum())
            parameter.add_(direction)
        expected, got = float(ends[0] - ends[1]) / 2, float((parameter.grad * direction).sum())
        scale = float(parameter.grad.norm() * direction.norm())
        assert abs(got - expected) < 0.02 * scale + 1e-4, (name, got, expected, scale)


def test_same_bits_with_and_without_gradient():
    """So the ratio of PPO's first forward to old log-probs, made without gradient, is exactly 1."""
    for dtype in (torch.float32, torch.bfloat16):
        model, (tokens, cu_seqlens) = disturbed(tiny(), dtype=dtype), packed([30, 12])
        with_gradient = model.hidden(tokens, cu_seqlens)
        with torch.no_grad():
            assert torch.equal(model.hidden(tokens, cu_seqlens), with_gradient)
            logits = model.logits(with_gradient)
            with model.frozen():
                for _ in range(2):
                    assert torch.equal(model.hidden(tokens, cu_seqlens), with_gradient)
                    assert torch.equal(model.logits(with_gradient), logits)
        with torch.inference_mode():
            assert torch.equal(model.hidden(tokens, cu_seqlens), with_gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    """float32 masters and gradients, hidden in bfloat16, logits near the float32 ones."""
    full = disturbed(tiny(family))
    half = GPT(full.config, dtype=torch.bfloat16, initialise=False)
    half.load_state_dict(full.state_dict())
    tokens, cu_seqlens = packed([30, 12])
    hidden = half.hidden(tokens, cu_seqlens)
    assert hidden.dtype == torch.bfloat16 and half.head_weight.dtype == torch.bfloat16
    logits = half.logits(hidden)
    want = full(tokens, cu_seqlens)
    assert logits.dtype == torch.float32
    assert (logits - want).abs().max() < 0.05 * want.abs().max()
    logits.square().mean().backward()
    want.square().mean().backward()
    for (name, a), b in zip(half.named_parameters(), full.parameters(), strict=True):
        assert a.dtype == a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.05 * b.grad.norm() + 1e-3, name


def test_frozen_sees_updates_outside():
    model, (tokens, cu_seqlens) = disturbed(tiny(), dtype=torch.bfloat16), packed([8])

    def all_three():
        cache = KVCache(model, blocks=1, block_size=8, rows=1, max_blocks=1)
        cache.block_table[0] = 0
        with torch.no_grad(), model.frozen():
            hidden = model.hidden(tokens, cu_seqlens)
            return hidden, model.decode(tokens, cu_seqlens, cache), model.logits(hidden)

    before = all_three()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.hidden(tokens, cu_seqlens).float().square().sum().backward()
    optimizer.step()
    now = all_three()
    assert not any(map(torch.equal, now, before))
    assert_same_bits(now[1], now[0])


@pytest.mark.checklist(27)
def test_initialisation_is_a_function_of_the_generator():
    def weights(seed):
        return GPT(tiny(), generator=torch.Generator().manual_seed(seed)).state_dict()

    torch.manual_seed(123)
    state = torch.get_rng_state()
    first, same, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed"], other["embed"])
    assert all(torch.equal(GPT(tiny()).state_dict()[n], weights(0)[n]) for n in first)
    config = tiny(width=512, heads=8, layers=8)
    block = GPT(config).blocks[3]
    assert block.qkv.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.down.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert GPT(config, "scalar").score.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.15)


def test_dropout_only_while_training():
    model, (tokens, cu_seqlens) = disturbed(tiny(dropout=0.3)), packed([20])
    model.train()
    assert not torch.equal(model(tokens, cu_seqlens), model(tokens, cu_seqlens))
    model.eval()
    assert torch.equal(model(tokens, cu_seqlens), model(tokens, cu_seqlens))


def test_scalar_head_keeps_the_trunk():
    model, (tokens, cu_seqlens) = disturbed(tiny(tie_head=False)), packed([20])
    critic = model.to_scalar_head(torch.Generator().manual_seed(1))
    assert torch.equal(critic.hidden(tokens, cu_seqlens), model.hidden(tokens, cu_seqlens))
    assert critic(tokens, cu_seqlens).shape == (20,)
    assert critic.num_parameters() == model.num_parameters() - model.unembed.numel() + 64
    with torch.no_grad():
        critic.embed.zero_()
    assert model.embed.abs().sum() > 0
    with pytest.raises(ValueError, match="no head_weight"):
        _ = critic.head_weight


@pytest.mark.parametrize("tied", [True, False])
def test_resize_vocab(tied):
    model, (tokens, cu_seqlens) = disturbed(tiny(tie_head=tied)), packed([20])
    before = model(tokens, cu_seqlens)
    model.resize_vocab(100)
    assert model.config.vocab_size == 131
    model.resize_vocab(134)
    after = model(tokens, cu_seqlens)
    assert model.config.vocab_size == 134 and after.shape == (20, 134)
    assert_close(after[:, :131], before)
    assert after[:, 131:].amax() < before.amax()
    assert not torch.equal(after[:, 131], after[:, 132])


def test_reads_shards_halves_and_old_names(tmp_path):
    """Sharded bfloat16 weights, GPT-2's names without prefix as on the hub, a mask among them."""
    ours, (tokens, cu_seqlens) = disturbed(tiny("gpt2")), packed([12])
    ours.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())
        want = ours(tokens, cu_seqlens)
    tensors = {k.removeprefix("transformer."): v.bfloat16() for k, v in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    half = len(tensors) // 2
    weight_map = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(tokens, cu_seqlens), want)


def test_rejects_checkpoints(tmp_path):
    model = GPT(tiny(tie_head=False))
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"

    def rejected(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    rejected("no checkpoint there")
    model.save(tmp_path)
    good, weights = json.loads(config.read_text()), load_file(file)

    def with_tensors(**changes) -> None:
        tensors = {k: v for k, v in (weights | changes).items() if v is not None}
        save_file(tensors, file)

    name = "model.layers.1.self_attn.k_proj.weight"
    with_tensors(**{name: None})
    rejected(f": tensor {name} is missing")
    with_tensors(**{name: torch.zeros(5, 64)})
    rejected(rf"model.safetensors: {name} must be .* shape \[32, 64\], got torch.float32 \[5, 64\]")
    with_tensors(**{name: weights[name].int()})
    rejected(rf"{name} must be floating point")
    with_tensors(stranger=torch.zeros(3))
    rejected("unknown tensor stranger")
    with_tensors()
    for size in (0, 5, 300, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        rejected("model.safetensors: not a readable safetensors file")
        with_tensors()
    for changes, match in (
        ({"model_type": "bert"}, "model_type must be one of .*'bert'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rotary scaling 'linear'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "kv-heads must divide --heads"),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers must be of type int, got "two"'),
        ({"num_hidden_layers": 1.0}, "config.json: num_hidden_layers must be of type int, got 1.0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool, got 1"),
        ({"rope_parameters": [1]}, r"rope_parameters must be of type dict, got \[1\]"),
        ({"instructcore": None}, "instructcore must be of type dict, got null"),
        ({"instructcore": {"dropout": "x"}}, "instructcore.dropout must be of type float"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id must be of type int"),
        ({"id2label": 3}, "id2label must be of type dict, got 3"),
    ):
        config.write_text(json.dumps(good | changes))
        rejected(match)
    config.write_text('{"model_type": "lla')
    rejected("not a readable JSON file")
    config.write_text("[1]")
    rejected("must hold a JSON object")
    config.write_text(json.dumps(good))
    file.rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    rejected("index.json: weight_map must map names of tensors to files")


def test_a_run_is_no_checkpoint(tmp_path):
    """The message says where its model is."""
    GPT(tiny()).save(tmp_path / "final")
    for read in (load, Tokenizer.load):
        with pytest.raises(UserError, match="a run, whose .* is .*final"):
            read(tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"heads": 3}, "--heads must divide --width, got 3 and 64"),
        ({"kv_heads": 3}, "--kv-heads must divide --heads, got 3 and 4"),
        ({"head_dim": 12}, "multiple of 8 up to 256, got 12"),
        ({"width": 4 * 264}, "multiple of 8 up to 256, got 264"),
        ({"family": "bert"}, "must be one of"),
        ({"family": "gpt2", "kv_heads": 2}, "gpt2 has as many"),
        ({"layers": 0}, "--layers must be in"),
        ({"dropout": 1.0}, "--dropout must be in"),
    ],
)
def test_rejects_shapes(changes, match):
    with pytest.raises(UserError, match=match):
        ModelConfig(**(TINY | changes))


def test_rejects_calls():
    model, (tokens, cu_seqlens) = GPT(tiny()), packed([97])
    with pytest.raises(UserError, match="97 tokens, context is 96"):
        model(tokens, cu_seqlens)
    with pytest.raises(ValueError, match='head must be "lm" or "scalar"'):
        GPT(tiny(), "classifier")
    with pytest.raises(ValueError, match="dtype must be"):
        GPT(tiny(), dtype=torch.float64)


def test_zeros_are_resolved_in_the_model_alone():
    config = ModelConfig(width=128)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (0, 0, 0)
    shape = GPT(config).config
    assert (shape.kv_heads, shape.head_dim, shape.mlp_width) == (4, 32, 352)
    assert GPT(ModelConfig("gpt2", width=128)).config.mlp_width == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batch(family):
    model = GPT(tiny(family))
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    assert model(*none).shape == (0, 131)
