"""LangChain's OpenAI models against a server: prints what they got as JSON. Runs in an environment of its own."""

import asyncio
import json
import sys

from langchain_openai import ChatOpenAI, OpenAI

url = f"{sys.argv[1]}/v1"
options = {"base_url": url, "api_key": sys.argv[2], "model": "demo", "temperature": 0, "max_retries": 0}
prompt = "Once upon a time"

llm = OpenAI(**options, max_tokens=32)
chat = ChatOpenAI(**options, max_completion_tokens=24)
asked = [("system", "You tell stories."), ("human", "Tell one.")]


async def later() -> dict:
    texts = await llm.abatch([prompt, "The sea"])
    streamed = [part.content async for part in chat.astream(asked)]
    return {"batch": texts, "chat_streamed": "".join(streamed)}


schema = {"title": "answer", "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
found = {
    "whole": llm.invoke(prompt),
    "streamed": "".join(llm.stream(prompt)),
    "generated": llm.generate([prompt]).llm_output["token_usage"],
    "chat": chat.invoke(asked).content,
    "structured": chat.with_structured_output({**schema, "additionalProperties": False}, method="json_schema").invoke(
        asked
    ),
    **asyncio.run(later()),
}
print(json.dumps(found))
