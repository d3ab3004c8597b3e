"""The page: gradio's components around `run`, `charts` and `tables`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..assets import EXAMPLES
from ..errors import DyvteError
from . import charts, figure, link, tables
from .run import Inspector, Run, Settings, read_picture

_HERE = Path(__file__).parent
# In the head: what gradio is given as css it takes apart at commas.
HEAD = f"<style>{(_HERE / 'style.css').read_text()}</style><script>{(_HERE / 'page.js').read_text()}</script>"
_POLICIES = ["auto", "keep-all", "fixed:3", "fastv:2,0.5", "fastv:2,0.5+dynamic:auto", "visionzip", "divprune", "tome"]
_COMPARE = "keep-all\nauto\nfixed:3\nfastv:2,0.5"
# gradio would open an upload before the engine has checked it, and say in its own words what is wrong with it.
_RAW: dict[str, Any] = dict(preprocess=False)
_TOGETHER = 8  # questions of all tabs that are answered at a time; the engine batches them
_EXAMPLES: list[dict[str, str]] = json.loads((EXAMPLES / "examples.json").read_text())

_TELL_SLIDER = """
element.addEventListener('change', (event) => {
    const number = element.querySelector('input[type=number]');
    if (number && event.target !== element) trigger('moved', {threshold: Number(number.value)});
});
element.addEventListener('click', (event) => {
    const button = event.target.closest('button'), number = element.querySelector('input[type=number]');
    if (!button) return;
    number.value = button.value;
    number.dispatchEvent(new Event('input', {bubbles: true}));
    trigger('moved', {threshold: null});
});
"""
_TELL_EXAMPLE = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button) trigger('chosen', {number: button.value});
});
"""
_ADDRESS = "(query) => { history.replaceState(null, '', query || location.pathname); return location.href; }"
_SAVE = """(file) => {
    if (!file) return;
    const {name, url} = JSON.parse(file), a = document.createElement('a');
    a.href = url; a.download = name; a.click();
}"""


@dataclass
class Session:
    """What one browser tab has seen: its last run, those about the same picture, and where that is.

    newest: number of the last question asked; those before it end at their next token.
    """

    run: Run | None = None
    about: str | None = None
    history: list[Run] = field(default_factory=list)
    newest: int = 0


@dataclass
class Controls:
    """Components that several events read or write."""

    picture: Any
    question: Any
    policy: Any
    max_new_tokens: Any
    temperature: Any
    seed: Any
    layer: Any
    threshold: Any
    session: Any

    @property
    def asked(self) -> list[Any]:
        """What a question is made of, in the order of `_settings`."""
        return [self.policy, self.threshold, self.max_new_tokens, self.temperature, self.seed]


def build(inspector: Inspector, webcam: bool = False) -> gr.Blocks:
    """The page over one engine. `webcam`: pictures may come from a camera too."""
    with gr.Blocks(title="dyvte inspect", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_header(inspector), elem_classes="dy-header")
        with gr.Row(elem_classes="dy-columns"):
            with gr.Column(scale=1, min_width=300, elem_classes="dy-side"):
                controls, ask, stop, examples = _inputs(inspector, webcam)
            with gr.Column(scale=3, min_width=320):
                problem = gr.HTML(elem_id="problem")
                with gr.Tabs():
                    with gr.Tab("Look inside", id="inside"):
                        shown, slider = _inside(inspector, controls)
                    with gr.Tab("Compare", id="compare"):
                        _compare(inspector, controls, problem)
                    with gr.Tab("Ask again", id="again"):
                        again, turns = _again()
                    with gr.Tab("Batch", id="batch"):
                        _batch(inspector, controls, problem)
        asked = _Asked(inspector, controls, [controls.session, problem, *shown, turns])
        _wire(page, asked, slider, ask, stop, examples, again)
    return page


def _header(inspector: Inspector) -> str:
    shape, config = inspector.engine.model.shape, inspector.engine.config
    kind = str(config.dtype).removeprefix("torch.")
    return (
        "<h1>dyvte <span>inspect</span></h1><p>Which layers still look at the picture, when each question lets go, and "
        f"what that saves. <b>{escape(Path(inspector.model).name)}</b>, {shape.num_layers} layers, {kind}, "
        f"{config.device.type}.</p>"
    )


def _inputs(inspector: Inspector, webcam: bool) -> tuple[Controls, Any, Any, Any]:
    sources: list[Any] = ["upload", "clipboard", *(["webcam"] if webcam else [])]
    first = EXAMPLES / _EXAMPLES[0]["file"]
    picture = gr.Image(
        first, label="Picture", sources=sources, type="filepath", height=190, elem_id="picture", buttons=[]
    )
    shown = tables.examples([(EXAMPLES / e["file"], e["prompt"]) for e in _EXAMPLES])
    examples = gr.HTML(shown, js_on_load=_TELL_EXAMPLE, elem_id="examples")
    question = gr.Textbox(_EXAMPLES[0]["prompt"], label="Question", lines=1, max_lines=1, elem_id="question")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
    policy = gr.Dropdown(
        list(dict.fromkeys([inspector.first_policy, *_POLICIES])),
        value=inspector.first_policy,
        allow_custom_value=True,
        label="Policy",
        info="When visual tokens leave; any notation",
        elem_id="policy",
    )
    with gr.Accordion("Options", open=False):
        tokens = gr.Number(64, label="Longest answer, tokens", precision=0, minimum=1, elem_id="tokens")
        temperature = gr.Number(0, label="Temperature (0: greedy)", minimum=0, step=0.1, elem_id="temperature")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    last = inspector.engine.model.shape.num_layers - 1
    layer = gr.Slider(
        0, last, value=min(link.State().layer, last), step=1, label="Layer", elem_id="layer", render=False
    )
    threshold, session = gr.State(None), gr.State(Session(), time_to_live=3600)
    controls = Controls(picture, question, policy, tokens, temperature, seed, layer, threshold, session)
    return controls, ask, stop, examples


def _inside(inspector: Inspector, controls: Controls) -> tuple[list[Any], Any]:
    """The first tab. Returns what an answer changes there, in the order of `_view`, and the threshold's slider."""
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            answer = gr.HTML(tables.answer(None), elem_id="answer")
        with gr.Column(scale=4, min_width=300):
            savings = gr.HTML(elem_id="savings")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            layers = gr.HTML(charts.layers(None), elem_id="layers")
            slider = gr.HTML(
                _slider(inspector.threshold(inspector.first_policy)), js_on_load=_TELL_SLIDER, elem_id="threshold"
            )
        with gr.Column(scale=2, min_width=280):
            heat = gr.HTML(charts.heat(None, 0), elem_id="heat")
            controls.layer.render()
            attention = gr.HTML(elem_id="attention")
    with gr.Row(elem_classes="dy-share"):
        address = gr.Textbox(label="Link to this state", interactive=False, buttons=["copy"], elem_id="link", scale=3)
        save_png = gr.Button("Save PNG", elem_id="save-png", min_width=100)
        save_json = gr.Button("Save JSON", elem_id="save-json", min_width=100)
    note = gr.HTML(elem_id="note")
    query, file = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    query.change(None, query, address, js=_ADDRESS)
    run = controls.session
    save_png.click(_png_file, [run, controls.layer], file).then(None, file, None, js=_SAVE)
    save_json.click(_json_file, run, file).then(None, file, None, js=_SAVE)
    controls.layer.input(
        _other_layer,
        [controls.session, controls.layer],
        [heat, attention],
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return [answer, savings, layers, heat, attention, query, note], slider


def _slider(standard: float | None, threshold: float | None = None) -> str:
    """Of the threshold, in logits as in the chart; nothing without heads. standard: what the policy itself has."""
    if standard is None:
        return ""
    low, high = (charts.logit(p) for p in charts.SHOWN)
    value = standard if threshold is None else threshold
    return (
        '<div class="dy-slider"><label>Threshold <input type="range" aria-label="threshold" '
        f'min="{low:.4f}" max="{high:.4f}" step="0.05" value="{charts.logit(value):.4f}"></label>'
        f'<input type="number" aria-label="threshold, exactly" min="0" max="1" step="any" value="{value:.6g}">'
        f'<button type="button" value="{standard:.6g}">as calibrated</button></div>'
    )


def _again() -> tuple[Any, Any]:
    question = gr.Textbox(
        label="Another question about the same picture", lines=1, max_lines=1, submit_btn="Ask", elem_id="again"
    )
    return question, gr.HTML(tables.turns([]), elem_id="turns")


def _compare(inspector: Inspector, c: Controls, problem: Any) -> None:
    policies = gr.Textbox(
        _COMPARE, label="Policies, one in a line; answers are compared with the first", lines=4, elem_id="policies"
    )
    button = gr.Button("Compare", variant="primary", elem_id="run-compare")
    table = gr.HTML(elem_id="comparison")

    def compared(picture: Any, question: str, policies: str, *settings: Any) -> tuple[str, Any]:
        lines = [line.strip() for line in policies.splitlines() if line.strip()]
        try:
            runs = inspector.compare(question, read_picture(_path(picture)), Settings(*settings), lines)
        except DyvteError as error:
            return tables.refused(str(error)), ""
        return "", tables.comparison(runs)

    button.click(compared, [c.picture, c.question, policies, *c.asked], [problem, table], **_RAW)


def _batch(inspector: Inspector, c: Controls, problem: Any) -> None:
    question = gr.Textbox(label="One question about all pictures", lines=1, max_lines=1, elem_id="batch-question")
    files = gr.File(label="Pictures", file_count="multiple", type="filepath", height=160, elem_id="batch-files")
    with gr.Row():
        folder = gr.UploadButton("Add a folder", file_count="directory", elem_id="batch-folder")
        button = gr.Button("Ask about all", variant="primary", elem_id="run-batch")
    table = gr.HTML(elem_id="batch")

    def asked(files: list[str] | None, question: str, *settings: Any) -> Iterator[tuple[str, str]]:
        try:
            sources = [(Path(file).name, file) for file in files or []]
            for runs in inspector.batch(question, sources, Settings(*settings)):
                yield "", tables.batch(runs)
        except DyvteError as error:
            yield tables.refused(str(error)), ""

    folder.upload(lambda have, more: [*(have or []), *more], [files, folder], files)
    button.click(asked, [files, question, *c.asked], [problem, table])


def _path(uploaded: dict[str, Any] | None) -> str | None:
    """Where gradio has put an upload."""
    return None if uploaded is None else uploaded["path"]


@dataclass
class _Asked:
    """Asks a question from the controls' values, and shows the run in `outputs` as it goes on."""

    inspector: Inspector
    controls: Controls
    outputs: list[Any]
    by_link: Any = field(default_factory=lambda: gr.State(False))  # whether the page's address asks something

    @property
    def event(self) -> dict[str, Any]:
        """Arguments of every event that asks `controls.question`."""
        return dict(
            fn=self.answer,
            **self.places,
            **_RAW,
            show_progress="hidden",
            concurrency_limit=_TOGETHER,
            concurrency_id="ask",
            trigger_mode="multiple",
        )

    @property
    def places(self) -> dict[str, Any]:
        c = self.controls
        return dict(inputs=[c.session, c.picture, c.layer, c.question, *c.asked], outputs=self.outputs)

    def answer(self, session: Session, uploaded: Any, layer: int, question: str, *settings: Any) -> Iterator[Any]:
        try:
            picture, chosen = _path(uploaded), Settings(*settings)
            state = link.State(link.example_of(picture), question, chosen, layer)
            shown = read_picture(picture)
            if session.about != picture:
                session.about, session.history = picture, []
            session.newest += 1
            mine, before = session.newest, None
            for run in self.inspector.ask(question, shown, chosen, state.example or "uploaded picture"):
                if session.newest != mine:
                    return
                if run.result is not None and (before is None or before.result is None):
                    session.history.append(run)
                session.run = run
                yield session, "", *_view(run, before, layer), *_linked(state), tables.turns(session.history)
                before = run
        except DyvteError as error:
            yield gr.skip(), tables.refused(str(error)), *[gr.skip()] * (len(self.outputs) - 2)

    def if_linked(self, linked: bool, *values: Any) -> Iterator[Any]:
        """As `answer`, where the address of the page asked something."""
        if linked:
            yield from self.answer(*values)
        else:
            yield [gr.skip()] * len(self.outputs)


def _view(run: Run, before: Run | None, layer: int) -> list[Any]:
    """Answer, savings, layers, heat, attention; pictures only when they are new."""
    looked = before is not None and before.look is run.look
    drawn = [gr.skip()] * 3 if looked else [charts.layers(run), charts.heat(run, layer), charts.attention(run, layer)]
    return [tables.answer(run), tables.savings(run), *drawn]


def _linked(state: link.State) -> tuple[str, str]:
    if state.example is None:
        return "", tables.note("An uploaded picture cannot be in a link: choose an example to get one.")
    return state.query, ""


def _wire(page: gr.Blocks, asked: _Asked, slider: Any, ask: Any, stop: Any, examples: Any, again: Any) -> None:
    inspector, c = asked.inspector, asked.controls
    problem = asked.outputs[1]

    def example(event: gr.EventData) -> tuple[str, str]:
        one = _EXAMPLES[int(event.number)]
        return str(EXAMPLES / one["file"]), one["prompt"]

    def moved(event: gr.EventData, *values: Any) -> Iterator[Any]:
        *before, policy, _, tokens, temperature, seed = values
        for shown in asked.answer(*before, policy, event.threshold, tokens, temperature, seed):
            yield [event.threshold, *shown]

    def another(policy: str) -> tuple[None, Any, str]:
        try:
            return None, _slider(inspector.threshold(policy)), ""
        except DyvteError as error:
            return None, "", tables.refused(str(error))

    def opened(request: gr.Request) -> list[Any]:
        return _opened(inspector, dict(request.query_params))

    chosen = examples.chosen(example, None, [c.picture, c.question], show_progress="hidden")
    places = [
        problem,
        c.picture,
        c.question,
        c.policy,
        c.threshold,
        slider,
        c.max_new_tokens,
        c.temperature,
        c.seed,
        c.layer,
    ]
    started = page.load(opened, None, [asked.by_link, *places])
    events = [
        ask.click(**asked.event),
        c.question.submit(**asked.event),
        chosen.then(**asked.event),
        slider.moved(**{**asked.event, "fn": moved, "outputs": [c.threshold, *asked.outputs]}),
        started.then(**{**asked.event, "fn": asked.if_linked, "inputs": [asked.by_link, *asked.places["inputs"]]}),
        again.submit(**{**asked.event, "inputs": [again if i is c.question else i for i in asked.places["inputs"]]}),
    ]
    c.policy.input(another, c.policy, [c.threshold, slider, problem], show_progress="hidden")
    stopped = stop.click(None, cancels=events)
    stopped.then(lambda session: tables.answer(session.run, stopped=True), c.session, asked.outputs[2])


def _opened(inspector: Inspector, query: dict[str, str]) -> list[Any]:
    """What a link changes: whether to ask at once, an error, and the controls' values; without a link nothing."""
    as_it_is = [gr.skip()] * 9
    try:
        state = link.read(query)
        if state.example is None:
            return [False, "", *as_it_is]
        s = state.settings
        standard = inspector.threshold(s.policy)
    except DyvteError as error:
        return [False, tables.refused(str(error)), *as_it_is]
    values = [
        s.policy,
        s.threshold,
        _slider(standard, s.threshold),
        s.max_new_tokens,
        s.temperature,
        s.seed,
        state.layer,
    ]
    return [bool(state.question), "", str(link.pictures()[state.example]), state.question, *values]


def _other_layer(session: Session, layer: int) -> tuple[str, str]:
    return charts.heat(session.run, layer), charts.attention(session.run, layer)


def _png_file(session: Session, layer: int) -> str:
    if session.run is None or session.run.look is None:
        return ""
    out = io.BytesIO()
    figure.draw(session.run, layer).savefig(out, format="png", dpi=150)
    return _file("dyvte-inspect.png", "image/png", out.getvalue())


def _json_file(session: Session) -> str:
    if session.run is None:
        return ""
    return _file("dyvte-inspect.json", "application/json", json.dumps(session.run.record(), indent=1).encode())


def _file(name: str, kind: str, data: bytes) -> str:
    """For the browser to save."""
    return json.dumps({"name": name, "url": f"data:{kind};base64,{base64.b64encode(data).decode()}"})
