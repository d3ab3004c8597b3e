"""A policy of your own: after a layer, keep the visual tokens whose states are largest; compose it with an exit."""

from dataclasses import dataclass

from dyvte_engine import EXAMPLES, Engine, FixedExit, VisualTokenPolicy, compose
from dyvte_engine.policies.base import highest


@dataclass(frozen=True)
class LargestStates(VisualTokenPolicy):
    """`count` visual tokens of each sequence stay after `layer`."""

    layer: int = 2
    count: int = 48

    def layers(self, num_layers):
        return {self.layer}

    def decide(self, state):
        norms = state.hidden.float().norm(dim=-1)[state.rows.visual_rows]
        return [highest(scores, self.count) for scores in norms.split(state.rows.n_visual)]


engine = Engine.from_pretrained("nano")
for policy in ("keep-all", LargestStates(), compose(LargestStates(), FixedExit(7))):
    result = engine.generate("What color is the rectangle?", EXAMPLES / "7_color.png", policy=policy)
    print(f"{result.text.strip()}  {result.stats.tokens_per_layer}  {policy}")
