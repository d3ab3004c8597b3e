"""smol: a LLaVA of pretrained parts (SmolLM2-135M-Instruct, DINOv2 ViT-S/14), trained on composed emoji scenes."""
