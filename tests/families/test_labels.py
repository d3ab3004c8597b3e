"""Exit labels of every family, all exits in one packed pass, against one masked run of transformers' layers each."""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.training import label_store
from dyvte_engine.training.head_data import Example
from tests.families import oracle, zoo
from tests.families.test_families import each_family


def examples(family, n):
    rng, mark = random.Random(170), zoo.FAMILIES[family].mark
    words = lambda low: " ".join(f"w{rng.randrange(zoo.WORDS)}" for _ in range(rng.randint(low, 5)))  # noqa: E731
    return [Example(zoo.picture(rng), f"{words(0)} {mark} {words(1)}", words(1), f"line {i}") for i in range(n)]


@pytest.mark.feature("labels for exit heads")
@each_family
def test_one_pass_is_a_masked_run_for_each_exit(family, tmp_path, monkeypatch):
    hf = zoo.model(family)
    model = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 256)
    monkeypatch.setattr(label_store, "render", lambda prompt, images, processor: prompt)  # no chat template
    given = examples(family, 6)
    label_store.label(model, given, tmp_path, batch=4)
    columns = load_file(tmp_path / "shard-00000.safetensors")
    tokenizer, agreements = model.processor.tokenizer, set()
    for row, example in enumerate(given):
        answer = torch.tensor([*tokenizer(example.answer, add_special_tokens=False).input_ids, 2])
        entry = oracle.enter(hf, zoo.encode(family, example.prompt, [example.picture]))
        runs = [oracle.run(hf, entry, answer[:-1].tolist(), oracle.fixed(layer))[0] for layer in range(zoo.LAYERS)]
        full = runs[-1].log_softmax(-1)
        torch.testing.assert_close(columns["ce_full"][row], F.nll_loss(full, answer), rtol=1e-3, atol=1e-4)
        for layer, logits in enumerate(runs):
            got = {name: columns[name][row, layer] for name in ("agreement", "ce_exit", "kl")}
            left = logits.log_softmax(-1)
            same = (left.argmax(-1) == full.argmax(-1)).float().mean()
            assert got["agreement"] == same
            torch.testing.assert_close(got["ce_exit"], F.nll_loss(left, answer), rtol=1e-3, atol=1e-4)
            kl = F.kl_div(left, full, reduction="batchmean", log_target=True)
            torch.testing.assert_close(got["kl"], kl, rtol=1e-2, atol=1e-4)
            agreements.add(float(same) == 1)
    assert agreements == {True, False}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_pooled_states_are_what_the_engine_sees(family, tmp_path, monkeypatch):
    """The mean of the visual rows leaving each layer, what deepstack adds to them included."""
    hf = zoo.model(family)
    model = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 256)
    monkeypatch.setattr(label_store, "render", lambda prompt, images, processor: prompt)
    given = examples(family, 2)
    label_store.label(model, given, tmp_path)
    columns = load_file(tmp_path / "shard-00000.safetensors")
    for row, example in enumerate(given):
        entry, seen = oracle.enter(hf, zoo.encode(family, example.prompt, [example.picture])), []
        oracle.run(hf, entry, [], lambda at, seen=seen: seen.append(at.hidden.clone()))
        for layer, hidden in enumerate(seen):  # all but the last
            pooled = columns["pooled.mean_visual"][row, layer]
            torch.testing.assert_close(pooled, hidden[entry.visual].mean(0), rtol=1e-3, atol=1e-4)
