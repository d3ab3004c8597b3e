"""Exit labels against the plain definition: one masked run of the Hugging Face decoder per exit layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.training import labels
from dyvte_engine.training.labels import Sample, exit_outcomes

LAYERS, WIDTH, VOCABULARY = 4, 32, 50


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def make_sample(seed: int, before: int, pictures: int, after: int, answer: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    n = before + pictures + after + answer
    visual = torch.zeros(n, dtype=torch.bool)
    visual[before : before + pictures] = True
    embeds = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return Sample(embeds, visual, torch.arange(n), torch.randint(VOCABULARY, (answer,), generator=generator))


def masked_run(model: LlamaForCausalLM, sample: Sample, exit_layer: int) -> torch.Tensor:
    """Logits float64 [A, vocabulary] when the columns of visual tokens are hidden after `exit_layer`."""
    n = len(sample.visual)
    causal = torch.full((n, n), -1e9, dtype=torch.float64).triu(1)
    hidden_columns = causal.clone()
    hidden_columns[:, sample.visual] = -1e9
    hidden_columns.fill_diagonal_(0)
    hidden, positions = sample.inputs_embeds[None], sample.positions[None]
    rotation = model.model.rotary_emb(hidden, positions)
    for index, layer in enumerate(model.model.layers):
        mask = (causal if index <= exit_layer else hidden_columns)[None, None]
        output = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.lm_head(model.model.norm(hidden))[0, -len(sample.answer) - 1 : -1]


def test_one_pass_equals_a_masked_run_per_exit(model: LlamaForCausalLM) -> None:
    samples = [make_sample(0, 2, 7, 5, 3), make_sample(1, 1, 4, 1, 1), make_sample(2, 3, 7, 2, 6)]
    outcomes = exit_outcomes(model.model, model.lm_head, samples)
    some = set()
    assert {outcomes.agreement.shape, outcomes.ce_exit.shape, outcomes.kl.shape} == {(len(samples), LAYERS)}
    for b, sample in enumerate(samples):
        full = masked_run(model, sample, LAYERS)
        ce_full = F.cross_entropy(full, sample.answer)
        torch.testing.assert_close(outcomes.ce_full[b].double(), ce_full, rtol=1e-4, atol=1e-5)
        for layer in range(LAYERS):
            logits = masked_run(model, sample, layer)
            same = (logits.argmax(-1) == full.argmax(-1)).float().mean()
            ce = F.cross_entropy(logits, sample.answer)
            torch.testing.assert_close(outcomes.ce_exit[b, layer].double(), ce, rtol=1e-4, atol=1e-5)
            assert outcomes.agreement[b, layer] == same
            kl = F.kl_div(logits.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True)
            torch.testing.assert_close(outcomes.kl[b, layer].double(), kl, rtol=1e-3, atol=1e-5)
            some.add(bool(same == 1))
    assert some == {False, True}


@pytest.mark.parametrize("at_once", [100, 200, 350])  # no branch of three positions fits, one does, and two do
def test_the_vocabulary_may_come_in_parts(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, at_once) -> None:
    samples = [make_sample(0, 2, 7, 5, 3)]
    whole = exit_outcomes(model.model, model.lm_head, samples)
    monkeypatch.setattr(labels, "LOGITS_AT_ONCE", at_once)
    parts = exit_outcomes(model.model, model.lm_head, samples)
    for name in ("agreement", "ce_exit", "kl"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_pooled_states_are_the_stream_leaving_each_layer(model: LlamaForCausalLM) -> None:
    sample = make_sample(3, 2, 5, 4, 2)
    pooled = exit_outcomes(model.model, model.lm_head, [sample]).pooled
    n = len(sample.visual)
    reference = model.model(inputs_embeds=sample.inputs_embeds[None], output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # HF reports the last layer only after the final norm
        text = reference[layer + 1][0, 7 : n - 2].float()
        torch.testing.assert_close(pooled["mean_text"][0, layer], text[:-1].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled["last_text"][0, layer], text[-1], rtol=1e-4, atol=1e-5)
        visual = reference[layer + 1][0, 2:7].float()
        torch.testing.assert_close(pooled["mean_visual"][0, layer], visual.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled["last_visual"][0, layer], visual[-1], rtol=1e-4, atol=1e-5)


def test_batching_changes_nothing(model: LlamaForCausalLM) -> None:
    samples = [make_sample(4, 2, 7, 5, 3), make_sample(5, 4, 2, 3, 1)]
    together = exit_outcomes(model.model, model.lm_head, samples)
    for b, sample in enumerate(samples):
        alone = exit_outcomes(model.model, model.lm_head, [sample])
        torch.testing.assert_close(together.ce_exit[b], alone.ce_exit[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pictures, answer", [(0, 1), (3, 0)])
def test_bad_samples_are_refused(pictures: int, answer: int) -> None:
    with pytest.raises(InvalidArgumentError):
        make_sample(0, 2, pictures, 2, answer)
