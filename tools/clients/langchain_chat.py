"""LangChain's ChatOpenAI about a picture, whole and streamed: ADDRESS QUESTIONS -> JSON, in LangChain's environment."""

import base64
import json
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

address, questions = sys.argv[1:]
model = ChatOpenAI(model="nano", base_url=f"{address}/v1", api_key="none", max_retries=0, max_tokens=12)
answers = []
for asked in json.loads(Path(questions).read_text()):
    picture = base64.b64encode(Path(asked["picture"]).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": asked["question"]},
    ]
    message = [HumanMessage(content=parts)]
    whole = model.invoke(message)
    streamed = "".join(chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in model.stream(message))
    answers.append({"whole": whole.content, "streamed": streamed, "tokens": whole.usage_metadata["total_tokens"]})
print(json.dumps(answers))
