"""Random tiny LLaVA checkpoints with a real processor, and transformers-only oracles to compare the engine with."""

from __future__ import annotations

import random

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = 120
VISUAL_TOKENS = 16  # a picture of 28 x 28 in patches of 7
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
DECODERS = {
    "llama": dict(model_type="llama", num_key_value_heads=4),
    "llama-gqa": dict(model_type="llama", num_key_value_heads=2),
    "mistral": dict(model_type="mistral", num_key_value_heads=1),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, use_sliding_window=False),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=24),
}


def tokenizer(specials: list[str], words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """One token a word; `specials` begin with <pad>, <s>, </s>, <unk>."""
    vocab = {w: i for i, w in enumerate([*specials, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=specials[4:],
    )


def processor(vision: str = "clip") -> transformers.LlavaProcessor:
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = ["user", "assistant", ":", "abcdef", *(f"w{i}" for i in range(WORDS))]
    clip = vision == "clip"
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"height": 28, "width": 28}, do_center_crop=False, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer(specials, words),
        patch_size=7,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=1 if clip else 0,
        chat_template=TEMPLATE,
    )


def model(
    decoder: str = "llama-gqa", vision: str = "clip", layers: int = 4, seed: int = 0, tower_layers: int = 2
) -> transformers.LlavaForConditionalGeneration:
    options = dict(DECODERS[decoder])
    text = transformers.AutoConfig.for_model(
        options.pop("model_type"),
        vocab_size=WORDS + 9,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.25,  # far from uniform attention, so that a missing token shows
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    vision_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[vision]
    tower = transformers.AutoConfig.for_model(
        vision_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=tower_layers,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        image_seq_length=VISUAL_TOKENS,
    )
    torch.manual_seed(seed)
    built = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "vision" in name or "projector" in name:
                torch.nn.init.normal_(weight, std=0.5)
            elif "norm" in name or "bias" in name:
                weight += 0.2 * torch.randn_like(weight)
    built.generation_config.eos_token_id, built.generation_config.pad_token_id = 2, 0
    return built


def save(path, **options) -> str:
    """A checkpoint folder as `from_pretrained` reads it."""
    model(**options).save_pretrained(path)
    processor(options.get("vision", "clip")).save_pretrained(path)
    return str(path)


def picture(rng: random.Random) -> Image.Image:
    width, height = rng.randint(8, 60), rng.randint(8, 60)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def question(rng: random.Random, images: int, longest: int = 20) -> str:
    """A raw prompt of random words with image marks at random places, ending in words."""
    words = [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(1, longest))]
    for _ in range(images):
        words.insert(rng.randrange(len(words)), "<image>")
    return " ".join(words)


def prompts(seed: int, n: int, images=(0, 1, 1, 2, 3)) -> tuple[list[str], list[list[Image.Image]]]:
    rng = random.Random(seed)
    counts = [rng.choice(images) for _ in range(n)]
    return [question(rng, c) for c in counts], [[picture(rng) for _ in range(c)] for c in counts]


@torch.no_grad()
def hf_greedy(hf, proc, text: str, images, new_tokens: int, **options) -> list[int]:
    """transformers' own generate on one prompt."""
    inputs = proc(text=[text], images=images or None, return_tensors="pt").to(hf.device)
    out = hf.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def embed(hf, proc, text: str, images) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """inputs_embeds [n, d], visual bool [n], ids: vision and merge written out from public HF parts."""
    inputs = proc(text=[text], images=images or None, return_tensors="pt").to(hf.device)
    ids = inputs["input_ids"][0]
    embeds = hf.get_input_embeddings()(ids)
    visual = ids == hf.config.image_token_id
    if images:
        tower = hf.model.vision_tower(inputs["pixel_values"].to(embeds.dtype), output_hidden_states=True)
        features = tower.hidden_states[hf.config.vision_feature_layer]
        if hf.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        embeds[visual] = hf.model.multi_modal_projector(features).flatten(0, 1)
    return embeds, visual, ids.tolist()


@torch.no_grad()
def masked_logits(hf, embeds: torch.Tensor, hidden_columns, positions=None) -> torch.Tensor:
    """HF's own layers on a whole sequence [n, d] with a 4-D mask per layer; returns logits [n, vocab].

    `hidden_columns(layer)` gives bool [n, n]: true where a row must not see a column (beside causality).
    """
    lm, n = hf.model.language_model, len(embeds)
    causal = torch.ones(n, n, dtype=torch.bool, device=embeds.device).triu(1)
    position_ids = (torch.arange(n, device=embeds.device) if positions is None else positions)[None]
    rotation = lm.rotary_emb(embeds[None], position_ids)
    hidden = embeds[None]
    for number, layer in enumerate(lm.layers):
        blocked = causal | hidden_columns(number).to(embeds.device)
        blocked = blocked & ~torch.eye(n, dtype=torch.bool, device=embeds.device)
        mask = torch.zeros(1, 1, n, n, dtype=embeds.dtype, device=embeds.device).masked_fill_(
            blocked, torch.finfo(embeds.dtype).min
        )
        out = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotation)
        hidden = out[0] if isinstance(out, tuple) else out
    return hf.lm_head(lm.norm(hidden))[0]


def see_all(n: int):
    """The mask rule that hides nothing."""
    return lambda layer: torch.zeros(n, n, dtype=torch.bool)


def masked_choices(hf, embeds, visual, tokens: list[int], gone, first_new_blind: bool = False) -> list[int]:
    """The best token after the prompt and after each of `tokens` but the last, from one run without a cache.

    Equal to `tokens` exactly where these are greedy. gone(layer) -> bool [n_prompt], the prompt columns that later rows
    must not see in that layer. With `first_new_blind`, new rows see none of `visual` in any layer (drop_early_kv).
    """
    n_prompt, new = len(embeds), torch.tensor(tokens[:-1], dtype=torch.long, device=embeds.device)
    embeds = torch.cat((embeds, hf.get_input_embeddings()(new)))

    def hidden(layer: int, n: int = len(embeds)) -> torch.Tensor:
        blocked = torch.zeros(n, n, dtype=torch.bool, device=embeds.device)
        blocked[:, :n_prompt] = gone(layer)[None]
        blocked[:n_prompt, :n_prompt] &= ~visual[:, None]  # rows that left are not computed: what they see is moot
        if first_new_blind:
            blocked[n_prompt:, :n_prompt] |= visual[None]
        return blocked

    return masked_logits(hf, embeds, hidden)[n_prompt - 1 :].argmax(-1).tolist()


def masked_greedy(hf, embeds, visual, new_tokens: int, gone, first_new_blind: bool = False, eos: int = 2) -> list[int]:
    """Greedy tokens by recomputing everything for every token (`masked_choices`)."""
    tokens: list[int] = []
    while len(tokens) < new_tokens and eos not in tokens:
        tokens.append(masked_choices(hf, embeds, visual, [*tokens, 0], gone, first_new_blind)[-1])
    return tokens
