"""An HTTP server with OpenAI's interface (docs/serving.md): `pip install dyvte-engine[serve]`."""
