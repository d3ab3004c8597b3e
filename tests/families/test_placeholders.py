"""Pictures take the places of their placeholders as in transformers' forward, without a number read from the device.

And whatever somebody has put into that forward still acts.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyvte_engine import ModelError
from dyvte_engine.models import FAMILIES, VisionLanguageModel, placeholders, vision_language
from dyvte_engine.models.vision_run import VisionRun
from tests.families import oracle, zoo

ONE_MASK = [name for name, family in FAMILIES.items() if family.one_mask]
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten._is_all_true.default}


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: reads of numbers, and results whose sizes depend on them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS or (function is aten.index.Tensor and any(i.dtype == torch.bool for i in args[1])):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


def loaded(family, change=lambda model: None):
    model = zoo.model(family)
    change(model.model)
    return VisionLanguageModel(model, zoo.processor(family), family, 384)


def close(rows, want):
    """Their towers round differently."""
    torch.testing.assert_close(rows, want, atol=1e-3, rtol=1e-3)


def entering(model, texts, images):
    return [p.inputs_embeds for p in model.prepare(model.tokenize(texts, images))]


def compare(family, change):
    """A changed model enters the decoder as transformers' does, changed in the same way, and not as the plain one."""
    texts, images = zoo.prompts(family, seed=90, n=4, images=(1, 2))
    got, plain = (entering(loaded(family, c), texts, images) for c in (change, lambda model: None))
    hf = zoo.model(family)
    change(hf.model)
    for words, pictures, rows, before in zip(texts, images, got, plain, strict=True):
        close(rows, oracle.enter(hf, zoo.encode(family, words, pictures)).embeds)
        assert not torch.equal(rows, before)


@pytest.mark.parametrize("family", ONE_MASK)
def test_rows_are_those_of_transformers_own_count(family, monkeypatch):
    texts, images = zoo.prompts(family, seed=90, n=6)
    model = loaded(family)

    def both():
        alone = [entering(model, [t], [i])[0] for t, i in zip(texts, images)]
        return [*alone, *entering(model, texts, images)]

    ours = both()
    monkeypatch.setattr(vision_language, "count_on_host", lambda *args: None)
    assert all(torch.equal(a, b) for a, b in zip(ours, both(), strict=True))
    hf = zoo.model(family)
    for words, pictures, rows in zip(texts, images, ours):
        close(rows, oracle.enter(hf, zoo.encode(family, words, pictures)).embeds)


@pytest.mark.parametrize("family", ["llava", "vipllava", "internvl", "deepseek_vl"])
def test_nothing_is_read_on_the_way(family, monkeypatch):
    reads, to_entry = Reads(), VisionRun.to_entry

    def watched(run, decoder, inputs):
        with reads:
            return to_entry(run, decoder, inputs)

    monkeypatch.setattr(VisionRun, "to_entry", watched)
    texts, images = zoo.prompts(family, seed=90, n=4, images=(1, 2))
    entering(loaded(family), texts, images)
    assert reads.seen == []
    monkeypatch.setattr(vision_language, "count_on_host", lambda *args: None)
    entering(loaded(family), texts, images)
    assert reads.seen, "transformers' own code reads nothing any more: is `count_on_host` still of use?"


def reversed_mask(plain):
    def mask(self, input_ids, inputs_embeds, image_features):
        """The first placeholder of each prompt is left out, and the row after its last one is a picture's."""
        out = plain(self, input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
        out = out.expand_as(inputs_embeds).clone()
        first, last = out[..., 0].int().argmax(1), out.shape[1] - 1 - out[..., 0].flip(1).int().argmax(1)
        for b, (i, j) in enumerate(zip(first.tolist(), last.tolist())):
            out[b, i], out[b, j + 1] = False, True
        return out

    return mask


def patched_instance(model):
    mask = reversed_mask(type(model).get_placeholder_mask)
    model.get_placeholder_mask = mask.__get__(model)


def scaled_projector(model):
    model.multi_modal_projector.register_forward_hook(lambda module, args, out: 2 * out)


def patched_features(model):
    plain = model.get_image_features

    def features(*args, **kwargs):
        out = plain(*args, **kwargs)
        if hasattr(out, "pooler_output"):
            out.pooler_output = [3 * one for one in out.pooler_output]
            return out
        return [3 * one for one in out]

    model.get_image_features = features


@pytest.mark.parametrize("change", [patched_instance, scaled_projector, patched_features])
def test_what_somebody_put_there_acts(change):
    compare("llava", change)


def test_a_hook_on_the_embedding_acts():
    """The guard refuses one that is there when a model is taken over."""
    texts, images = zoo.prompts("llava", seed=90, n=4, images=(1, 2))
    model, hf = loaded("llava"), zoo.model("llava")
    for one in (model.hf, hf):
        one.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 1)
    for words, pictures, rows in zip(texts, images, entering(model, texts, images), strict=True):
        close(rows, oracle.enter(hf, zoo.encode("llava", words, pictures)).embeds)


def test_a_patched_class_acts(monkeypatch):
    cls = type(zoo.model("llava").model)
    plain = cls.get_placeholder_mask
    mask = reversed_mask(plain)
    mask.__module__, mask.__qualname__ = plain.__module__, plain.__qualname__  # as functools.wraps leaves it

    texts, images = zoo.prompts("llava", seed=90, n=4, images=(1, 2))
    before = entering(loaded("llava"), texts, images)
    monkeypatch.setattr(cls, "get_placeholder_mask", mask)
    hf = zoo.model("llava")
    for words, pictures, rows, plain_rows in zip(texts, images, entering(loaded("llava"), texts, images), before):
        close(rows, oracle.enter(hf, zoo.encode("llava", words, pictures)).embeds)
        assert not torch.equal(rows, plain_rows)


def test_other_ids_are_counted_by_transformers():
    """A hook of the user's gives the forward other ids: placeholders are where these have them."""
    texts, images = zoo.prompts("llava", seed=90, n=1, images=(1,))

    def turned(module, args, kwargs):
        return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}

    plain = loaded("llava")
    before, hf = entering(plain, texts, images)[0], zoo.model("llava")
    for one in (plain.hf, hf):
        one.model.register_forward_pre_hook(turned, with_kwargs=True)
    rows = entering(plain, texts, images)[0]
    close(rows, oracle.enter(hf, zoo.encode("llava", texts[0], images[0])).embeds)
    assert not torch.equal(rows, before)


def test_features_that_do_not_fit_are_refused():
    model = loaded("llava")
    model.hf.model.multi_modal_projector.register_forward_hook(lambda module, args, out: out[:, 1:])
    with pytest.raises(ModelError, match=r"fails before its decoder: .*tokens: 16, features:? "):
        entering(model, *zoo.prompts("llava", seed=90, n=1, images=(1,)))


def test_the_method_is_back_afterwards():
    model = loaded("llava")
    entering(model, *zoo.prompts("llava", seed=90, n=1, images=(1,)))
    assert "get_placeholder_mask" not in vars(model.hf.model)
    assert placeholders._is_own(model.hf.model)
