"""Removing rows is the same as masking them, for every layer, every member of a batch, and through decoding."""

from dataclasses import dataclass

import pytest
import torch

from dyvte_engine import DynamicExit, ExitHeadConfig, ExitHeads, FastV, FixedExit, KeepAll, VisualTokenPolicy, compose
from tests import tiny
from tests.engine.conftest import build
from tests.policies import reference as ref

LAYERS = 4


def random_heads(seed: int, states=("mean_text", "last_text"), rms_eps=None, shared=False) -> ExitHeads:
    heads = ExitHeads(ExitHeadConfig(64, LAYERS, 32, states, rms_eps, shared), seed=seed)
    heads.w2.data *= 8  # opinions, not coin tosses around 0.5
    return heads.requires_grad_(False)


def answers(engine, texts, images, n=6):
    return engine.generate(texts, images, chat=False, max_new_tokens=n)


@pytest.mark.parametrize(("decoder", "vision"), [("llama", "clip"), ("qwen2", "siglip"), ("qwen3", "clip")])
@pytest.mark.parametrize("layer", range(-1, LAYERS))
def test_fixed_exit_equals_a_masked_model(decoder, vision, layer):
    engine, hf = build(decoder, vision, policy=FixedExit(layer))
    texts, images = tiny.prompts(seed=layer, n=6)
    got = answers(engine, texts, images)
    for text, pictures, result in zip(texts, images, got):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        want = tiny.masked_greedy(hf, embeds, visual, 6, lambda k, v=visual: v & (k > layer))
        assert result.token_ids == want
        leaves = layer < LAYERS - 1 and pictures
        assert result.stats.exit_layer == (layer if leaves else None)


@pytest.mark.parametrize("layer", range(-1, LAYERS))
def test_fixed_exit_logits(layer):
    engine, hf = build(policy=FixedExit(layer))
    texts, images = tiny.prompts(seed=20 + layer, n=4, images=(1, 2, 3))
    for text, pictures in zip(texts, images):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)

        def hidden(k, visual=visual):
            return (visual & (k > layer))[None] & ~visual[:, None]

        want = tiny.masked_logits(hf, embeds, hidden)[-1]
        with engine.prefill(embeds, visual) as running:
            torch.testing.assert_close(running.logits[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("states", [("mean_text", "last_text"), ("mean_visual", "last_visual", "last_text")])
@pytest.mark.parametrize(("rms_eps", "shared"), [(None, False), (1e-6, False), (1e-6, True)])
def test_dynamic_exit_is_per_sequence_and_first_time_only(states, rms_eps, shared):
    """The layer is the first whose head, in plain torch on transformers' hidden states, says exit."""
    engine, hf = build()
    texts, images = tiny.prompts(seed=31, n=16)
    entries = [tiny.embed(hf, engine.model.processor, *prompt)[:2] for prompt in zip(texts, images)]
    for seed in range(6, 40):  # releases of torch draw other weights from a seed
        heads = random_heads(seed, states, rms_eps, shared)
        want_layers = [
            next((n for n, p in enumerate(oracle_layers(hf, heads, *entry)) if p > 0.7), None) if pictures else None
            for entry, pictures in zip(entries, images)
        ]
        if len(set(want_layers)) >= 3:
            break
    assert len(set(want_layers)) >= 3, "no seed mixes exits"
    engine.policy = DynamicExit(heads, threshold=0.7)
    got = answers(engine, texts, images)
    want_tokens = []
    for (embeds, visual), layer in zip(entries, want_layers):
        last = LAYERS if layer is None else layer
        want_tokens.append(tiny.masked_greedy(hf, embeds, visual, 6, lambda k, v=visual, e=last: v & (k > e)))
    assert [r.stats.exit_layer for r in got] == want_layers
    assert [r.token_ids for r in got] == want_tokens
    alone = [answers(engine, t, i) for t, i in zip(texts, images)]
    assert [r.token_ids for r in alone] == want_tokens
    assert [r.stats.exit_layer for r in alone] == want_layers


@torch.no_grad()
def oracle_layers(hf, heads, embeds, visual) -> list[float]:
    """p_exit after each layer but the last."""
    out = hf.model.language_model(inputs_embeds=embeds[None], output_hidden_states=True)
    states = [ref.token_states(hidden[0], visual) for hidden in out.hidden_states[1:LAYERS]]  # the raw residual stream
    return [ref.head(heads, of_layer, layer) for layer, of_layer in enumerate(states)]


def test_heads_that_never_fire_change_nothing():
    heads = random_heads(0)
    heads.w2.data.zero_()
    engine, _ = build(policy=DynamicExit(heads, threshold=0.5))
    texts, images = tiny.prompts(seed=8, n=8)
    asked = answers(engine, texts, images)
    engine.policy = KeepAll()
    assert [r.token_ids for r in asked] == [r.token_ids for r in answers(engine, texts, images)]
    assert all(r.stats.exit_layer is None for r in asked)


@pytest.mark.parametrize("policy", [FixedExit(0), FastV(1, 0.9), compose(FastV(1, 0.5), FixedExit(2))])
def test_text_only_prompts_pass_through(policy):
    engine, hf = build(policy=policy)
    texts, images = tiny.prompts(seed=12, n=4, images=(0,))
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 6) for t, i in zip(texts, images)]
    assert [r.token_ids for r in answers(engine, texts, images)] == want


def fastv_oracle(hf, embeds, visual, k, r, queries):
    """Visual columns that leave entering layer k, from transformers' eager attention map of layer k - 1."""
    attention = hf.model.language_model(inputs_embeds=embeds[None], output_attentions=True).attentions[k - 1][0]
    score = attention.mean(0)[-1] if queries == "last" else attention.mean(0).mean(0)
    columns = visual.nonzero()[:, 0]
    kept = columns[score[columns].argsort(descending=True)[: len(columns) - int(len(columns) * r)]]
    gone = visual.clone()
    gone[kept] = False
    return gone


@pytest.mark.parametrize(
    ("k", "r", "queries"), [(1, 0.5, "last"), (2, 0.75, "last"), (2, 0.3, "all"), (3, 1.0, "last")]
)
@pytest.mark.parametrize("then_exit", [None, 2])
def test_fastv_equals_masking_what_eager_attention_scores_low(k, r, queries, then_exit):
    policy = FastV(k, r, queries)
    engine, hf = build(policy=policy if then_exit is None else compose(policy, FixedExit(then_exit)))
    hf.set_attn_implementation("eager")
    texts, images = tiny.prompts(seed=40 + k, n=8, images=(0, 1, 2))
    got = answers(engine, texts, images)
    for text, pictures, result in zip(texts, images, got):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        gone = fastv_oracle(hf, embeds, visual, k, r, queries)
        last = LAYERS if then_exit is None else then_exit
        columns = lambda layer, g=gone, v=visual, last=last: (g & (layer >= k)) | (v & (layer > last))  # noqa: E731
        # Visual rows that stay see only what stays, so here they are masked like text rows.
        assert result.token_ids == partial_greedy(hf, embeds, visual, gone, 6, columns, k)
        kept = int(visual.sum() - gone.sum())
        assert result.stats.tokens_per_layer[k] == len(embeds) - int(visual.sum()) + (kept if k <= last else 0)


def partial_greedy(hf, embeds, visual, gone, new_tokens, columns, k):
    tokens, n_prompt = [], len(embeds)
    for _ in range(new_tokens):
        n = len(embeds)

        def hidden(layer, n=n):
            blocked = torch.zeros(n, n, dtype=torch.bool)
            blocked[:, :n_prompt] = columns(layer)[None]
            return blocked

        tokens.append(int(tiny.masked_logits(hf, embeds, hidden)[-1].argmax()))
        if tokens[-1] == 2:
            break
        embeds = torch.cat((embeds, hf.get_input_embeddings()(torch.tensor(tokens[-1:]))))
    return tokens


@pytest.mark.parametrize("layer", range(LAYERS))
def test_drop_early_kv_hides_visual_columns_from_new_tokens(layer):
    engine, hf = build(policy=FixedExit(layer), drop_early_kv=True)
    texts, images = tiny.prompts(seed=50, n=6)
    got = answers(engine, texts, images)
    for text, pictures, result in zip(texts, images, got):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        want = tiny.masked_greedy(hf, embeds, visual, 6, lambda k, v=visual: v & (k > layer), first_new_blind=True)
        assert result.token_ids == want


@pytest.mark.parametrize("policy", [FixedExit(1), compose(FastV(1, 1.0), FixedExit(2))])
def test_a_prompt_that_ends_in_a_picture_keeps_its_last_row(policy):
    """The next token is predicted from that row, so it cannot leave."""
    engine, hf = build(policy=policy)
    first_blind = 2 if policy == FixedExit(1) else 1
    _, images = tiny.prompts(seed=90, n=4, images=(1,))
    texts = ["w3 w4 w5 <image>"] * 4
    got = answers(engine, texts, images)
    for text, pictures, result in zip(texts, images, got):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        visual[-1] = False
        want = tiny.masked_greedy(hf, embeds, visual, 6, lambda k, v=visual: v & (k >= first_blind))
        assert result.token_ids == want
        assert result.stats.tokens_per_layer[-1] == len(embeds) - tiny.VISUAL_TOKENS + 1


@dataclass(frozen=True, eq=False)
class EverySecond(VisualTokenPolicy):
    """Of the visual tokens that are left, before the first layer and after the second."""

    def layers(self, num_layers):
        return {-1, 1}

    def decide(self, state):
        return [torch.arange(0, n, 2) for n in state.rows.n_visual]


def test_early_kv_of_a_policy_that_acts_before_the_first_layer():
    """Fewer rows entered the layers than the prompts have."""
    early, plain = (build(policy=EverySecond(), drop_early_kv=drop)[0] for drop in (True, False))
    texts, images = tiny.prompts(seed=33, n=3, images=(1, 2))
    prompts = plain.prepare(texts, images, chat=False)
    with early.prefill_prepared(prompts) as got, plain.prefill_prepared(prompts) as all_rows:
        for b, prompt in enumerate(prompts):
            entered = torch.where(prompt.visual, prompt.visual.cumsum(0) % 2 == 1, True)
            left = torch.where(prompt.visual, prompt.visual.cumsum(0) % 4 == 1, True)
            for layer in range(LAYERS):
                for pool in ("k", "v"):
                    rows, want = (rows_of(one, pool, layer, b) for one in (got, all_rows))
                    assert torch.equal(rows, want[left[entered]] if layer < 2 else want)


def rows_of(running, pool, layer, sequence):
    cache = running.cache
    rows = getattr(cache.pool, pool)[cache.block_table[layer, sequence].long()].flatten(0, 1)
    return rows[: cache.host_lens[layer, sequence]]


@dataclass(frozen=True, eq=False)
class Later(VisualTokenPolicy):
    """The decisions of another policy, to be read when the next layer's projections are queued, as from a device."""

    inner: VisualTokenPolicy

    def bind(self, model):
        return Later(self.inner.bind(model))

    def layers(self, num_layers):
        return self.inner.layers(num_layers)

    def decide(self, state):
        decision = self.inner.decide(state)
        return decision if callable(decision) else lambda: decision


@pytest.mark.parametrize("drop_early_kv", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        *(FixedExit(layer) for layer in range(-1, LAYERS)),
        FastV(1, 0.5),
        DynamicExit(random_heads(LAYERS), 0.7),
        DynamicExit(random_heads(LAYERS), 0.7, hysteresis=2),
        DynamicExit(random_heads(LAYERS), 0.7, keep=2),
    ],
)
def test_a_decision_read_later_is_the_same_decision(policy, drop_early_kv):
    texts, images = tiny.prompts(seed=40, n=8)
    runs = {}
    for name, chosen in (
        ("now", policy),
        ("later", Later(policy)),
        ("both now", compose(policy, FixedExit(1))),
        ("both later", compose(Later(policy), FixedExit(1))),
    ):
        engine, _ = build(policy=chosen, drop_early_kv=drop_early_kv)
        results = engine.generate(texts, images, chat=False, max_new_tokens=4)
        stats = [(r.stats.exit_layer, r.stats.tokens_per_layer, r.stats.kv_bytes) for r in results]
        with engine.prefill_prepared(engine.model.prepare(engine.model.tokenize(texts, images))) as running:
            runs[name] = [r.token_ids for r in results], stats, running.logits
    for now, later in (("now", "later"), ("both now", "both later")):
        assert runs[now][:2] == runs[later][:2]
        torch.testing.assert_close(runs[now][2], runs[later][2])
