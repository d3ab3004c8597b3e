"""A page in the browser that shows where the picture leaves the model (docs/inspector.md).

`run` asks and measures, `attention` looks into one prefill, `charts`, `tables` and `figure` draw: none of them knows of
a browser, nor of gradio, which `page` and `app` put around them: `pip install dyvte-engine[inspect]`.
"""
