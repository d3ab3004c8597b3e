"""The methods once more, plain and slow, from HF's modules and the papers: one picture, one prompt, loops, full maps.

Nothing here comes from the package. `Reference` says what a policy does to the pictures before the language model
(`entry`) and which rows stay after a layer (`stay`); `logits` runs HF's own layers on exactly those rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class At:
    """What is there after layer `number`: hidden [n, d] entering and leaving it, visual [n], positions [n], V."""

    hf: object
    number: int
    entering: Tensor
    leaving: Tensor
    visual: Tensor
    positions: Tensor
    v: int

    def attention(self, layer: int, hidden: Tensor) -> Tensor:
        """Eager attention map [H, n, n] that `layer` makes of hidden [n, d]."""
        lm = self.hf.model.language_model
        module = lm.layers[layer].self_attn
        x = lm.layers[layer].input_layernorm(hidden)
        q, k = (p(x).view(len(x), -1, module.head_dim).transpose(0, 1)[None] for p in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *lm.rotary_emb(hidden[None], self.positions[None]))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT)[0] / math.sqrt(module.head_dim)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def best_visual(self, score: Tensor, keep: int) -> Tensor:
        """bool [n]: text, and the `keep` visual rows with the highest score."""
        ranked = sorted(self.visual.nonzero()[:, 0].tolist(), key=lambda row: -score[row].item())
        stay = ~self.visual
        stay[ranked[:keep]] = True
        return stay


@dataclass
class Reference:
    """`entry(hf, features [V, d], pixels [1, 3, h, w])` -> [V', d]; `stay(At)` -> bool [n] or None."""

    entry: Callable[..., Tensor] = lambda hf, features, pixels: features
    stay: Callable[[At], Tensor | None] = lambda at: None
    renumber: bool = False


@torch.no_grad()
def enter(hf, proc, reference: Reference, text: str, images) -> tuple[Tensor, Tensor]:
    """inputs_embeds [n, d] and visual [n] with every picture as the reference makes it."""
    inputs = proc(text=[text], images=images or None, return_tensors="pt")
    ids, pictures = inputs["input_ids"][0], iter(inputs["pixel_values"] if images else ())
    rows, visual, at = [], [], 0
    while at < len(ids):
        if ids[at] != 4:
            rows.append(hf.get_input_embeddings()(ids[at : at + 1]))
            visual.append(False)
            at += 1
            continue
        pixels = next(pictures)[None]
        out = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[hf.config.vision_feature_layer]
        patches = out[:, 1:] if hf.config.vision_feature_select_strategy == "default" else out
        features = hf.model.multi_modal_projector(patches)[0]
        at += len(features)
        rows.append(reference.entry(hf, features, pixels))
        visual += [True] * len(rows[-1])
    return torch.cat(rows), torch.tensor(visual)


@torch.no_grad()
def logits(hf, reference: Reference, embeds: Tensor, visual: Tensor, new: list[int]) -> tuple[Tensor, list[int]]:
    """Logits [vocab] after the prompt and the tokens `new`, all recomputed; and the prompt rows of each layer."""
    lm = hf.model.language_model
    prompt, rows = len(embeds), []
    hidden = torch.cat((embeds, hf.get_input_embeddings()(torch.tensor(new, dtype=torch.long))))
    positions, visual = torch.arange(len(hidden)), torch.cat((visual, torch.zeros(len(new), dtype=torch.bool)))
    v = int(visual.sum())
    for number, layer in enumerate(lm.layers):
        n = len(hidden)
        rows.append(prompt)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        mask = hidden.new_zeros(1, 1, n, n).masked_fill_(future, torch.finfo(hidden.dtype).min)
        turned = lm.rotary_emb(hidden[None], positions[None])
        out = layer(hidden[None], attention_mask=mask, position_ids=positions[None], position_embeddings=turned)
        out = (out[0] if isinstance(out, tuple) else out).view(n, -1)
        at = At(hf, number, hidden[:prompt], out[:prompt], visual[:prompt], positions[:prompt], v)
        stay = reference.stay(at) if number < len(lm.layers) - 1 and at.visual.any() else None
        hidden = out
        if stay is None or stay.all():
            continue
        stay = torch.cat((stay, torch.ones(len(new), dtype=torch.bool)))
        hidden, visual, positions = hidden[stay], visual[stay], positions[stay]
        prompt = len(hidden) - len(new)
        if reference.renumber:
            positions = torch.arange(len(hidden))
    return hf.lm_head(lm.norm(hidden[-1])), rows


def then_exit(reference: Reference, layer: int) -> Reference:
    """The same method with all visual rows leaving after `layer`."""

    def stay(at: At) -> Tensor | None:
        return ~at.visual if at.number == layer else reference.stay(at)

    return Reference(reference.entry, stay, reference.renumber)


def keep_best(layer: int, keep: int) -> Reference:
    def stay(at: At) -> Tensor | None:
        if at.number != layer:
            return None
        return at.best_visual(at.attention(layer, at.entering)[:, -1].mean(0), keep)

    return Reference(stay=stay)


def random_rows(n: int, ratio: float, seed: int) -> list[int]:
    """Of n rows int(ratio * n) leave, the first of a permutation drawn from the seed; those that stay, in order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(set(range(n)) - set(order[: int(ratio * n)]))


def random_later(place: int, ratio: float, seed: int) -> Reference:
    def stay(at: At) -> Tensor | None:
        if at.number != place - 1:
            return None
        rows, chosen = at.visual.nonzero()[:, 0], ~at.visual
        chosen[rows[random_rows(len(rows), ratio, seed)]] = True
        return chosen

    return Reference(stay=stay)


STATES = ("mean_visual", "last_visual", "mean_text", "last_text")


def token_states(hidden: Tensor, visual: Tensor) -> dict[str, Tensor]:
    """The four states that heads look at; T, the text, begins behind the last of the visual rows."""
    text = hidden[int(visual.nonzero()[-1]) + 1 :]
    mean_text = text[:-1].mean(0) if len(text) > 1 else text[0]
    return dict(zip(STATES, (hidden[visual].mean(0), hidden[visual][-1], mean_text, text[-1])))


def head(heads, states: dict[str, Tensor], layer: int) -> float:
    """p_exit of the head after `layer`, in float64: each state by its RMS, two layers, exact GELU, softmax.

    Only the weights of `heads` are used, and which states its config names.
    """
    used = [states[name].double() for name in STATES if name in heads.config.states]
    if heads.config.rms_eps is not None:
        used = [x / math.sqrt(float(x @ x) / len(x) + heads.config.rms_eps) for x in used]
    trunk = 0 if heads.config.shared else layer
    inner = heads.w1[trunk].double() @ torch.cat(used)
    if heads.config.shared:
        inner = inner + heads.b1[layer].double()
    keep, leave = (heads.w2[trunk].double() @ (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)).tolist()
    return 1 / (1 + math.exp(keep - leave))


def fastv(k: int, r: float) -> Reference:
    def stay(at: At) -> Tensor | None:
        if at.number != k - 1:
            return None
        score = at.attention(at.number, at.entering)[:, -1].mean(0)
        return at.best_visual(score, int(at.visual.sum()) - int(r * int(at.visual.sum())))

    return Reference(stay=stay)


def pyramid_drop(renumber: bool) -> Reference:
    def stay(at: At) -> Tensor | None:
        layers = len(at.hf.model.language_model.layers)
        share = {layers // 4: 0.5, layers // 2: 0.25, 3 * layers // 4: 0.125}.get(at.number + 1)
        if share is None:
            return None
        score = at.attention(at.number + 1, at.leaving)[:, -1].mean(0)  # the next layer's projections
        return at.best_visual(score, int(share * at.v))

    return Reference(stay=stay, renumber=renumber)


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return 1 - (a @ b / (a.norm() * b.norm())).item()  # the same for both orders, so that ties are ties


def divprune_rows(features: Tensor, keep: float) -> list[int]:
    """Greedy max-min over features [V, d], in float64."""
    x = features.double()
    n = len(x)
    chosen: list[int] = []
    while len(chosen) < round(keep * n):
        others = (lambda i: [j for j in range(n) if j != i]) if not chosen else (lambda i: chosen)
        free = [i for i in range(n) if i not in chosen]
        chosen.append(max(free, key=lambda i: min(cosine_distance(x[i], x[j]) for j in others(i))))
    return sorted(chosen)


def downsample(features: Tensor, factor: int) -> Tensor:
    side = math.isqrt(len(features))
    cells = []
    for top in range(0, side, factor):
        for left in range(0, side, factor):
            inside = [
                features[y * side + x]
                for y in range(top, min(top + factor, side))
                for x in range(left, min(left + factor, side))
            ]
            cells.append(torch.stack(inside).mean(0))
    return torch.stack(cells)


def tower_blocks(hf) -> tuple[list, bool]:
    """The blocks whose output is used, and whether there is a class token."""
    blocks = next(m for m in hf.model.vision_tower.modules() if isinstance(m, torch.nn.ModuleList))
    return list(blocks)[: hf.config.vision_feature_layer % (len(blocks) + 1)], hasattr(
        hf.config.vision_config, "projection_dim"
    ) and "clip" in hf.config.vision_config.model_type


def heads(block, x: Tensor, which: str) -> Tensor:
    """x [n, d] -> [H, n, D] by a projection of the block's attention."""
    module = block.self_attn
    return getattr(module, which)(x).view(len(x), module.num_heads, -1).transpose(0, 1)


def tome_features(hf, pixels: Tensor, keep: float) -> Tensor:
    """[V', d_vision] of one picture. A token is a vector and the list of patches it stands for (none: the class)."""
    blocks, has_class = tower_blocks(hf)
    x = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[0][0]
    members = [[i] for i in range(len(x))]
    patches = len(x) - has_class
    leave, left = patches - round(keep * patches), 0
    for number, block in enumerate(blocks):
        normed = block.layer_norm1(x)
        q, k, v = (heads(block, normed, name) for name in ("q_proj", "k_proj", "v_proj"))
        sizes = torch.tensor([float(len(m)) for m in members])
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + sizes.log()).softmax(-1)
        x = x + block.self_attn.out_proj((weights @ v).transpose(0, 1).flatten(1))
        r = leave * (number + 1) // len(blocks) - left
        left += r
        x, members = tome_merge(x, members, k.mean(0), r, has_class)
        if number == len(blocks) - 1:
            order = sorted(range(len(x)), key=lambda i: sum(members[i]) / len(members[i]))
            x = x[order]
        x = x + block.mlp(block.layer_norm2(x))
    return x[1:] if has_class else x


def tome_merge(x: Tensor, members: list[list[int]], keys: Tensor, r: int, has_class: bool):
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in first[1:] if has_class else first:
        similarity = {j: -cosine_distance(keys[i].double(), keys[j].double()) for j in second}
        partner = max(similarity, key=similarity.get)
        edges.append((similarity[partner], i, partner))
    groups = {j: [j] for j in second}
    merged = sorted(edges, reverse=True)[:r]
    for _, i, partner in merged:
        groups[partner].append(i)
    gone = {i for _, i, _ in merged}
    order = [[i] for i in first if i not in gone] + [groups[j] for j in second]
    weighted = [torch.stack([x[i] * len(members[i]) for i in g]).sum(0) for g in order]
    joined = [[p for i in g for p in members[i]] for g in order]
    return torch.stack([w / len(m) for w, m in zip(weighted, joined)]), joined


def visionzip_features(hf, pixels: Tensor, dominant: int, contextual: int) -> Tensor:
    """[dominant + contextual, d_vision] of one picture, from the whole attention map of the block used."""
    blocks, has_class = tower_blocks(hf)
    states = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    entering, x = states[len(blocks) - 1][0], states[len(blocks)][0]
    normed = blocks[-1].layer_norm1(entering)
    q, k = heads(blocks[-1], normed, "q_proj"), heads(blocks[-1], normed, "k_proj")
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # [H, n, n]
    if has_class:
        score = attention[:, 0].sum(0)
        score[0] = torch.inf  # the class token always stays
    else:
        score = attention.mean(dim=(0, 1))
    best = sorted(sorted(range(len(x)), key=lambda i: -score[i].item())[:dominant])
    rest = [i for i in range(len(x)) if i not in best]
    if contextual == 0:
        return x[best]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    joined: dict[int, list[int]] = {t: [] for t in targets}
    keys = k.mean(0).double()
    for i in rest:
        if i not in targets:
            joined[min(targets, key=lambda t: cosine_distance(keys[i], keys[t]))].append(i)
    context = [x[t] + (torch.stack([x[i] for i in j]).mean(0) if j else 0) for t, j in joined.items()]
    return torch.stack([x[i] for i in best] + context)
